"""Chat completions of nothing but text, from the request to the bytes that a client reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serving.answers import LONGEST_ANSWER
from serving.echo import EchoEngine
from serving.generate import generate
from serving.messages import MAX_FRAME
from serving.parsing import Verbatim
from tests.harness import HandEngine, echo_engine
from tests.serving.recorder import Part, Put, Recorder, answer, chat, perform


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    """An echo engine as fast as the machine allows."""
    one = echo_engine()
    await one.start()
    yield one
    await one.close()


seeds = st.none() | st.integers(-(2**63), 2**63 - 1)
stops = st.lists(st.text(min_size=1, max_size=3), max_size=4).map(tuple)


@given(text=st.text(max_size=40), n=st.integers(1, 4), max_tokens=st.integers(1, 20), seed=seeds, stop=stops)
async def test_a_stream_says_what_the_whole_answer_says(
    engine: EchoEngine, text: str, n: int, max_tokens: int, seed: int | None, stop: tuple[str, ...]
) -> None:
    """The deltas of each choice, joined, are the text of the whole answer, whatever its characters; finish
    reasons, usage, id, model and time are the same; no stop string is in either."""
    sampling: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "seed": seed, "stop": stop}
    whole = await answer(engine, chat(text, **sampling))
    streamed = await answer(engine, chat(text, stream=True, include_usage=True, **sampling))
    body = whole.body
    *events, last = streamed.events
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == list(range(n))
    for choice in body["choices"]:
        entries = streamed.choices(choice["index"])
        assert "".join(entry["delta"].get("content", "") for entry in entries) == choice["message"]["content"]
        assert not any(each in choice["message"]["content"] for each in stop)
        reasons = [entry["finish_reason"] for entry in entries]
        assert reasons == [None] * (len(entries) - 1) + [choice["finish_reason"]]
    assert last["usage"] == body["usage"]
    for event in (*events, last):
        assert event["object"] == "chat.completion.chunk"
        assert [event[key] for key in ("id", "model", "created")] == ["chatcmpl-1", "a/b:C", 1234]
        assert [body[key] for key in ("id", "model", "created")] == ["chatcmpl-1", "a/b:C", 1234]


@given(text=st.text(max_size=40), n=st.integers(1, 4), stop=stops, usage=st.booleans())
async def test_the_shape_of_a_stream(
    engine: EchoEngine, text: str, n: int, stop: tuple[str, ...], *, usage: bool
) -> None:
    """Each choice says its role in its first delta and in no other, ends with an empty delta and a reason,
    and usage comes where it was asked for: as null in every chunk but one of its own, before [DONE]."""
    streamed = await answer(engine, chat(text, stream=True, include_usage=usage, n=n, stop=stop))
    events = streamed.events
    if usage:
        last = events.pop()
        assert last["choices"] == []
        assert streamed.usage is not None
        assert last["usage"] == {
            "prompt_tokens": streamed.usage.prompt_tokens,
            "completion_tokens": streamed.usage.completion_tokens,
            "total_tokens": streamed.usage.prompt_tokens + streamed.usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert all(event["usage"] is None for event in events)
    assert all(("usage" in event) == usage for event in events)
    assert all(len(event["choices"]) == 1 for event in events)
    for choice in range(n):
        first, *rest, end = [entry["delta"] for entry in streamed.choices(choice)]
        assert first["role"] == "assistant"
        assert "content" in first
        assert not any("role" in delta for delta in rest)
        assert end == {}


@given(text=st.text(max_size=40), n=st.integers(1, 4), stop=stops)
async def test_every_chunk_may_say_the_role(
    engine: EchoEngine, text: str, n: int, stop: tuple[str, ...]
) -> None:
    """For clients that need it each delta, the last of a choice included, has the role and a content that is
    not null; nothing else of the stream is changed by that."""
    plain = await answer(engine, chat(text, stream=True, n=n, stop=stop))
    every = await answer(engine, chat(text, stream=True, n=n, stop=stop, role_in_every_chunk=True))
    expected = plain.events
    for event in expected:
        for entry in event["choices"]:
            entry["delta"] = {"role": "assistant", "content": "", **entry["delta"]}
    assert every.events == expected


@given(text=st.text(max_size=40), n=st.integers(1, 4), stop=stops)
async def test_every_token_is_counted_once(
    engine: EchoEngine, text: str, n: int, stop: tuple[str, ...]
) -> None:
    """The tokens that chunks carry add up to those of the usage, held back ones included, and the prompt's
    are those that were accepted."""
    for stream in (True, False):
        outlet = await answer(engine, chat(text, stream=stream, n=n, stop=stop))
        assert outlet.usage is not None
        assert outlet.tokens == outlet.usage.completion_tokens
        assert outlet.prompt_tokens == outlet.usage.prompt_tokens == len(text.split())


async def test_each_put_with_text_is_a_chunk_and_each_without_is_progress() -> None:
    """What an engine has for the client goes out at once; that it works on what it must hold back, or on a
    whole answer, is heard of too."""
    engine = HandEngine()
    for stream, chunks, progressed in ((True, 2, 3), (False, 0, 5)):
        outlet = Recorder()
        await generate(engine, chat(stream=stream), outlet)
        for text in ("a", "", "", "b", ""):
            engine.say(text)
        assert (outlet.chunks, outlet.progressed) == (chunks, progressed)
        engine.say("c", "length")
        assert outlet.tokens == 6


async def test_a_whole_answer_has_a_bounded_size() -> None:
    """A whole answer past LONGEST_ANSWER is refused, in words that say what may be longer; a stream may."""
    engine = HandEngine()
    whole, stream = Recorder(), Recorder()
    await generate(engine, chat(), whole)
    await generate(engine, replace(chat(stream=True), id="other"), stream)
    text = "\x01" * (LONGEST_ANSWER // 4)
    for _ in range(4):
        engine.say(text)
        assert not whole.over
    engine.say("!")
    assert whole.refusal is not None
    assert (
        whole.refusal.message
        == f"the answer has more than {LONGEST_ANSWER} characters, which only a stream may have"
    )
    assert stream.chunks == 5


async def test_the_longest_answer_fits_a_frame() -> None:
    """An answer as long as it may be is given, in as many bytes as JSON can make of it."""
    part = Part([Put("\x01" * LONGEST_ANSWER)])
    outlet = await perform(HandEngine(), chat(), part)
    assert len(outlet.data) > 6 * LONGEST_ANSWER
    assert len(outlet.data) < MAX_FRAME


puts = st.builds(Put, st.text(max_size=4), st.lists(st.integers(0, 9), max_size=3))
parts = st.lists(
    st.builds(Part, st.lists(puts, min_size=1, max_size=6), st.sampled_from(["stop", "length"])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=50)
@given(parts=parts, usage=st.booleans(), every=st.booleans())
async def test_plain_text_is_the_same_on_both_paths(parts: list[Part], *, usage: bool, every: bool) -> None:
    """A model that has a parser and says nothing but text is answered for as one without: the same events,
    the same body, the same tokens with the same bytes. Only the usage tells that there was a parser."""
    plain, rich = HandEngine(), HandEngine()
    rich.parser = Verbatim
    fields: dict[str, Any] = {"n": len(parts), "include_usage": usage, "role_in_every_chunk": every}
    looked = {"completion_tokens_details": {"reasoning_tokens": 0}}

    whole = await perform(plain, chat(**fields), *parts)
    body = whole.body
    body["usage"] |= looked
    assert (await perform(rich, chat(**fields), *parts)).body == body

    stream = await perform(plain, chat(stream=True, **fields), *parts)
    events = stream.events
    if usage:
        events[-1]["usage"] |= looked
    other = await perform(rich, chat(stream=True, **fields), *parts)
    assert other.events == events
    assert (other.tokens, other.chunks, other.progressed) == (stream.tokens, stream.chunks, stream.progressed)
