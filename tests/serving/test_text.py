"""Text completions, from the request to the bytes that a client reads."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from serving.answers import LONGEST_ANSWER
from serving.echo import EchoEngine
from serving.engine import Logprob, TokenLogprobs
from serving.generate import generate
from tests.harness import HandEngine, echo_engine
from tests.serving.recorder import Part, Put, Recorder, answer, completion, perform

COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    """An echo engine as fast as the machine allows."""
    one = echo_engine()
    await one.start()
    yield one
    await one.close()


words = st.lists(st.text("ab\x01é\U0001f686", min_size=1, max_size=3), max_size=5).map(" ".join)
ids = st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple)
prompts = st.lists(words | ids, min_size=1, max_size=3)
stops = st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2).map(tuple)


def spelled(prompt: str | tuple[int, ...]) -> str:
    """A prompt as the echo engine echoes it."""
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def joined(entries: list[dict[str, Any]], *, told: bool) -> dict[str, Any]:
    """The choice of a whole answer that a stream's entries for it add up to; `told`: it has logprobs."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for entry in entries:
        if entry["logprobs"] is not None:
            assert entry["logprobs"]["tokens"]
            for name in COLUMNS:
                columns[name] += entry["logprobs"][name]
    assert [entry["finish_reason"] for entry in entries[:-1]] == [None] * (len(entries) - 1)
    return {
        "index": entries[0]["index"],
        "text": "".join(entry["text"] for entry in entries),
        "logprobs": columns if told else None,
        "finish_reason": entries[-1]["finish_reason"],
    }


@given(
    prompts=prompts,
    n=st.integers(1, 3),
    max_tokens=st.integers(0, 6),
    echo=st.booleans(),
    k=st.none() | st.integers(0, 5),
    stop=stops,
)
async def test_a_stream_says_what_the_whole_answer_says(
    engine: EchoEngine,
    prompts: list[str | tuple[int, ...]],
    n: int,
    max_tokens: int,
    echo: bool,
    k: int | None,
    stop: tuple[str, ...],
) -> None:
    """The texts of each choice's events, joined, are the whole answer's, and so are its logprobs; finish
    reasons, usage, id, model and time are the same, and tokens are counted once."""
    fields: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "echo": echo, "logprobs": k, "stop": stop}
    whole = await answer(engine, completion(*prompts, **fields))
    stream = await answer(engine, completion(*prompts, stream=True, include_usage=True, **fields))
    body, events = whole.body, stream.events
    assert [choice["index"] for choice in body["choices"]] == list(range(n * len(prompts)))
    for choice in body["choices"]:
        assert joined(stream.choices(choice["index"]), told=k is not None) == choice
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == body["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for answered in (body, *events):
        header = [answered[name] for name in ("id", "object", "created", "model")]
        assert header == ["cmpl-1", "text_completion", 1234, "a/b:C"]
    assert body["usage"]["completion_tokens"] == whole.tokens == stream.tokens
    assert body["usage"]["prompt_tokens"] == sum(len(spelled(prompt).split()) for prompt in prompts)
    assert whole.prompt_tokens == stream.prompt_tokens == body["usage"]["prompt_tokens"]


@given(prompts=prompts, n=st.integers(1, 3), max_tokens=st.integers(0, 6), echo=st.booleans())
async def test_each_choice_goes_on_with_its_own_prompt(
    engine: EchoEngine, prompts: list[str | tuple[int, ...]], n: int, max_tokens: int, echo: bool
) -> None:
    """Choice i belongs to prompt i // n: its text is what the model goes on with, after the prompt where that
    is to be echoed."""
    outlet = await answer(engine, completion(*prompts, n=n, max_tokens=max_tokens, echo=echo))
    for choice in outlet.body["choices"]:
        prompt = spelled(prompts[choice["index"] // n])
        going_on = "".join(f" {word}" for word in (prompt.split() * max_tokens)[:max_tokens])
        assert choice["text"] == (prompt if echo else "") + going_on


@given(prompts=st.lists(words | ids, min_size=1, max_size=2), n=st.integers(1, 2), k=st.integers(0, 5))
async def test_the_columns_of_logprobs(
    engine: EchoEngine, prompts: list[str | tuple[int, ...]], n: int, k: int
) -> None:
    """Each token stands at its offset in the text, the echo included; every one has a logprob and is among
    the likeliest there, but for a prompt's first, which nothing precedes."""
    outlet = await answer(engine, completion(*prompts, n=n, max_tokens=3, echo=True, logprobs=k))
    for choice in outlet.body["choices"]:
        columns = choice["logprobs"]
        assert tuple(columns) == COLUMNS
        tokens, offsets = columns["tokens"], columns["text_offset"]
        assert "".join(tokens) == choice["text"]
        for token, offset in zip(tokens, offsets, strict=True):
            assert choice["text"][offset:].startswith(token)
        assert columns["token_logprobs"] == [None, *[0.0] * (len(tokens) - 1)][: len(tokens)]
        assert columns["top_logprobs"] == [None, *[{token: 0.0} for token in tokens[1:]]][: len(tokens)]


async def test_the_likeliest_tokens() -> None:
    """Beside the likeliest tokens stands the one that was chosen, though it may be none of them; what cannot
    be has -9999."""
    told = TokenLogprobs(Logprob("c", -math.inf), [Logprob("a", -0.25), Logprob("b", -2.0)])
    outlet = await perform(HandEngine(), completion("p", logprobs=2), Part([Put("c", (0,), [told])]))
    assert outlet.body["choices"][0]["logprobs"] == {
        "tokens": ["c"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"a": -0.25, "b": -2.0, "c": -9999.0}],
        "text_offset": [0],
    }


async def test_without_an_echo_offsets_count_what_was_generated(engine: EchoEngine) -> None:
    """Logprobs are told of the generated tokens alone, and the first of them begins the text."""
    outlet = await answer(engine, completion("to be", max_tokens=2, logprobs=1))
    assert outlet.body["choices"][0]["logprobs"] == {
        "tokens": [" to", " be"],
        "token_logprobs": [0.0, 0.0],
        "top_logprobs": [{" to": 0.0}, {" be": 0.0}],
        "text_offset": [0, 3],
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("echo", [True, False])
async def test_no_tokens_are_given_where_none_are_wanted(stream: bool, echo: bool) -> None:
    """With max_tokens 0 the engine makes one token for each choice, and the client neither reads it nor pays
    for it: its text is its prompt or nothing, cut off for length."""
    engine, outlet = HandEngine(), Recorder()
    await generate(engine, completion("a b", "c", max_tokens=0, n=2, echo=echo, stream=stream), outlet)
    assert engine.requests["cmpl-1"].request.sampling.max_tokens == 1
    engine.say("secret", "stop")
    assert b"secret" not in outlet.data
    for index, prompt in enumerate(["a b", "a b", "c", "c"]):
        expected = {
            "index": index,
            "text": prompt if echo else "",
            "logprobs": None,
            "finish_reason": "length",
        }
        assert outlet.choices(index) == [expected] if stream else outlet.body["choices"][index] == expected
    assert outlet.usage is not None
    assert (outlet.usage.prompt_tokens, outlet.usage.completion_tokens, outlet.tokens) == (3, 0, 0)


async def test_an_echo_does_not_wait_for_text() -> None:
    """The prompt goes out with the first token, though that one's text is held back; a token without text
    that is not the last has no event of its own."""
    part = Part([Put(""), Put(""), Put("ab")])
    outlet = await perform(HandEngine(), completion("prompt", echo=True, stream=True), part)
    assert [(entry["text"], entry["finish_reason"]) for entry in outlet.choices(0)] == [
        ("prompt", None),
        ("ab", "stop"),
    ]
    assert (outlet.chunks, outlet.progressed) == (1, 1)


def too_long(outlet: Recorder, param: str) -> bool:
    """Whether the answer was refused for its length, which lies in this."""
    refusal = outlet.refusal
    return refusal is not None and (refusal.code, refusal.param) == ("answer_too_long", param)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_echo_has_a_bounded_size(stream: bool) -> None:
    """What has to be sent before anything is generated has a bound, streamed or not, with the prompts'
    logprobs once they are known; without an echo there is nothing to bound."""
    engine, told, refused = HandEngine(), Recorder(), Recorder()
    await generate(engine, completion("x", echo=True, n=128, logprobs=0, stream=stream), told)
    long = [TokenLogprobs(Logprob("x" * (3 * LONGEST_ANSWER // 128), -1.0), [])]
    engine.requests["cmpl-1"].sink.prompt_logprobs(0, "x", long)
    assert too_long(told, "echo")
    prompt = "x" * (LONGEST_ANSWER // 128)
    await generate(engine, completion(prompt + "x", echo=True, n=128, stream=stream), refused)
    assert too_long(refused, "echo")
    assert refused.prompt_tokens is None
    await generate(engine, completion(prompt + "x", n=128, stream=stream), unbounded := Recorder())
    assert unbounded.prompt_tokens == 1


async def test_a_whole_answer_has_a_bounded_size() -> None:
    """Its echoes, its texts and its logprobs count."""
    half = "x" * (LONGEST_ANSWER // 2)
    fits, exceeds = Part([Put(half)]), Part([Put(half), Put("x")])
    assert (await perform(HandEngine(), completion(half, echo=True), fits)).body["choices"][0][
        "text"
    ] == half * 2
    assert too_long(await perform(HandEngine(), completion(half, echo=True), exceeds), "stream")

    long = [TokenLogprobs(Logprob(f"{at}{'x' * 10_000}", -1.0), []) for at in range(100)]
    part = Part([Put("x", (0,) * 100, long)] * 30)
    assert too_long(await perform(HandEngine(), completion("x", logprobs=0), part), "stream")
