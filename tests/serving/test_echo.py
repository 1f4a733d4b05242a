from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.echo import LONGEST_TOKEN, EchoEngine, StopScanner
from serving.engine import FinishReason, Refusal, TokenLogprobs
from serving.messages import (
    Load,
    Message,
    NamedTool,
    Request,
    ResponseFormat,
    Sampling,
    Tool,
    ToolCall,
)
from tests.harness import echo_engine
from tests.serving.recorder import chat, completion
from tests.waiting import soon, until


class Recorder:
    """A sink that keeps what it is given, by choice."""

    def __init__(self) -> None:
        self.cached_tokens = 0
        self.texts: defaultdict[int, list[str]] = defaultdict(list)
        self.tokens: defaultdict[int, int] = defaultdict(int)
        self.ids: defaultdict[int, list[int]] = defaultdict(list)
        self.logprobs: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
        self.prompts: dict[int, tuple[str, list[TokenLogprobs]]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.times: list[float] = []

    def accepted(self) -> None:
        assert not self.texts

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        self.prompts[prompt] = first, list(logprobs)

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        assert choice not in self.ends, "a token after the end"
        self.texts[choice].append(text)
        self.tokens[choice] += len(token_ids)
        self.ids[choice] += token_ids
        self.logprobs[choice] += logprobs
        self.times.append(asyncio.get_running_loop().time())
        if finish_reason is not None:
            self.ends[choice] = finish_reason

    def fail(self, error: Exception) -> None:
        raise AssertionError(f"echo never fails, but said {error!r}")

    def text(self, choice: int = 0) -> str:
        """What a choice says."""
        return "".join(self.texts[choice])


async def run(engine: EchoEngine, request: Request, sink: Recorder) -> None:
    """Start generating for a request."""
    await engine.generate(request, await engine.render(request), sink)


async def begin(engine: EchoEngine, text: str, name: str = "one", **fields: Any) -> Recorder:
    """Start generating for one user message."""
    sink = Recorder()
    await run(engine, chat(text, id=name, **fields), sink)
    return sink


async def say(engine: EchoEngine, text: str, **fields: Any) -> Recorder:
    """All that it generates for one user message."""
    sink = await begin(engine, text, "one", **fields)
    choices = fields.get("n", 1)
    await until(lambda: len(sink.ends) == choices)
    return sink


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    """An echo engine as fast as the machine allows."""
    one = echo_engine()
    await one.start()
    yield one
    await one.close()


# ---- what it says -------------------------------------------------------------------------------------

texts = st.text(max_size=60)
few = st.integers(1, 40)


@given(text=texts, max_tokens=few)
async def test_it_repeats_the_words_until_max_tokens(engine: EchoEngine, text: str, max_tokens: int) -> None:
    """The words of the message over and over, each counted as one token; an empty message has no answer."""
    words = text.split()
    sink = await say(engine, text, max_tokens=max_tokens)
    expected = (words * max_tokens)[:max_tokens]
    assert sink.text() == " ".join(expected)
    assert sink.tokens[0] == len(expected)
    assert sink.ends == {0: "length" if words else "stop"}
    assert engine.load() == Load()


def scanned(tokens: list[str], stops: list[str]) -> tuple[str, bool]:
    """What the tokens spell up to the first stop string that any beginning of them holds."""
    spelled = ""
    for token in tokens:
        spelled += token
        if found := [spelled.index(stop) for stop in stops if stop in spelled]:
            return spelled[: min(found)], True
    return spelled, False


letters = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=150)
@given(tokens=st.lists(st.text("ab", max_size=4), max_size=12), stops=st.lists(letters, max_size=4))
def test_a_stop_string_ends_the_text_wherever_tokens_tear_it(tokens: list[str], stops: list[str]) -> None:
    """Text before the first stop string comes complete, the stop string and what follows never, and no
    character that could belong to one is given out early."""
    scanner = StopScanner(stops)
    given_out, met = "", False
    for token in tokens:
        text, met = scanner.feed(token)
        given_out += text
        if met:
            break
        assert not any(stop in given_out for stop in stops)
    if not met:
        given_out += scanner.rest()
    assert (given_out, met) == scanned(tokens, stops)


@given(text=texts, max_tokens=few, stops=st.lists(st.text(min_size=1, max_size=4), max_size=4).map(tuple))
async def test_it_ends_at_a_stop_string(
    engine: EchoEngine, text: str, max_tokens: int, stops: tuple[str, ...]
) -> None:
    """With stop strings it says what it says without, up to the first of them, and why it ended."""
    sink = await say(engine, text, max_tokens=max_tokens, stop=stops)
    words = text.split()
    tokens = [f" {word}" if at else word for at, word in enumerate((words * max_tokens)[:max_tokens])]
    expected, met = scanned(tokens, list(stops))
    assert sink.text() == expected
    assert sink.ends == {0: "stop" if met or not words else "length"}


@given(words=st.integers(1, 9), seed=st.integers(-(2**63), 2**63 - 1), n=st.integers(1, 5))
async def test_choices_differ_by_their_seeds(engine: EchoEngine, words: int, seed: int, n: int) -> None:
    """Choice i begins with the word that seed + i falls on, the same every time; without a seed, and at
    temperature 0, all are equal."""
    text = " ".join(map(str, range(words)))
    chosen, again = await say(engine, text, n=n, seed=seed), await say(engine, text, n=n, seed=seed)
    assert [chosen.text(i) for i in range(n)] == [again.text(i) for i in range(n)]
    firsts = [int(chosen.text(i).split()[0]) for i in range(n)]
    assert firsts == [Sampling(1, seed=seed).choice_seed(i) % words for i in range(n)]  # type: ignore[operator]
    repeatable: list[dict[str, Any]] = [{}, {"seed": seed, "temperature": 0.0}]
    for fields in repeatable:
        sink = await say(engine, text, n=n, **fields)
        assert {sink.text(i) for i in range(n)} == {" ".join(str(at % words) for at in range(8))}


async def test_a_prompt_counts_every_word_and_the_last_user_message_is_repeated(engine: EchoEngine) -> None:
    """The prompt's length is that of all messages; what is repeated is the user's last one."""
    messages = (
        Message("system", "be brief"),
        Message("user", "first question"),
        Message("assistant", "an answer"),
        Message("user", "the second"),
        Message("assistant", "well"),
    )
    asked = chat(messages=messages, max_tokens=2)
    (prompt,) = await engine.render(asked)
    assert prompt.length == 9
    sink = Recorder()
    await engine.generate(asked, [prompt], sink)
    await until(lambda: sink.ends)
    assert sink.text() == "the second"


@given(length=st.integers(1, 4 * LONGEST_TOKEN))
async def test_a_very_long_word_is_several_tokens(engine: EchoEngine, length: int) -> None:
    """No token has more than LONGEST_TOKEN characters and the space before it, and together they spell what
    the words do."""
    word = "x" * length
    (prompt,) = await engine.render(chat(f"{word} y {word}"))
    sink = await say(engine, f"{word} y {word}", max_tokens=prompt.length)
    assert sink.text() == f"{word} y {word}"
    assert max(map(len, sink.texts[0])) <= LONGEST_TOKEN
    assert prompt.length == sink.tokens[0] == 2 * -(-(length + 1) // LONGEST_TOKEN) + 1


# ---- what else it is asked for -------------------------------------------------------------------------


async def complete(engine: EchoEngine, *prompts: str | tuple[int, ...], **fields: Any) -> Recorder:
    """All that it generates for a text completion."""
    sink = Recorder()
    request = completion(*prompts, **fields)
    await run(engine, request, sink)
    await until(lambda: len(sink.ends) == request.sequences)
    return sink


async def test_it_goes_on_with_the_words_of_a_prompt(engine: EchoEngine) -> None:
    """A text is gone on with, space and all; of token ids each is the word of its digits."""
    sink = await complete(engine, "to be", (12, 7), "", max_tokens=3, n=2)
    assert [sink.text(choice) for choice in range(6)] == [" to be to"] * 2 + [" 12 7 12"] * 2 + ["", ""]
    assert sink.ends == dict.fromkeys(range(4), "length") | {4: "stop", 5: "stop"}


@given(k=st.none() | st.integers(0, 5), words=st.lists(st.text("ab", min_size=1), min_size=1, max_size=5))
async def test_each_token_is_certain(engine: EchoEngine, k: int | None, words: list[str]) -> None:
    """Where logprobs are asked for, a token has one of 0, and is the likeliest where those are wanted; the
    tokens spell what was said, those of an echoed prompt the prompt."""
    text = " ".join(words)
    sink = await complete(engine, text, max_tokens=4, logprobs=k, echo=True)
    if k is None:
        assert (sink.logprobs[0], sink.prompts) == ([], {})
        return
    first, others = sink.prompts[0]
    assert first + "".join(each.chosen.token for each in others) == text
    assert "".join(each.chosen.token for each in sink.logprobs[0]) == sink.text()
    for each in (*others, *sink.logprobs[0]):
        assert each.chosen.logprob == 0
        assert list(each.likeliest) == ([each.chosen] if k else [])


async def test_a_word_has_one_id(engine: EchoEngine) -> None:
    """The same word is the same token wherever it stands, and different words are different ones."""
    ids: dict[str, set[int]] = {}
    for text in ("to be or not to be", "be not"):
        sink = await complete(engine, text, max_tokens=6)
        for word, token_id in zip(sink.texts[0], sink.ids[0], strict=True):
            ids.setdefault(word, set()).add(token_id)
    assert all(len(each) == 1 for each in ids.values())
    assert len(set.union(*ids.values())) == len(ids) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": ResponseFormat()}, "response_format"),
        ({"tools": (Tool("f"),), "tool_choice": "required"}, "tool_choice"),
        ({"tools": (Tool("f"),), "tool_choice": NamedTool("f")}, "tool_choice"),
    ],
)
async def test_it_refuses_what_takes_a_model(engine: EchoEngine, fields: dict[str, Any], param: str) -> None:
    """It can hold no format and call no tool, and says so."""
    with pytest.raises(Refusal, match=f"^{param}: this model repeats words") as refusal:
        await engine.render(chat("hi", **fields))
    assert (refusal.value.status, refusal.value.param) == (400, param)


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_it_never_calls_a_tool_that_it_may_call(engine: EchoEngine, choice: Any) -> None:
    """Tools are there to be called or not, and messages of tools are messages like others, though not to be
    repeated; a call has no words."""
    called = Message("assistant", None, tool_calls=(ToolCall("1", "f", "{}"),))
    answered = Message("tool", "three words more", tool_call_id="1")
    messages = (Message("user", "what now"), called, answered)
    asked = chat(messages=messages, tools=(Tool("f"),), tool_choice=choice)
    (prompt,) = await engine.render(asked)
    assert prompt.length == 5
    sink = Recorder()
    await engine.generate(asked, [prompt], sink)
    await until(lambda: sink.ends)
    assert sink.text().startswith("what now what now")


async def test_a_prompt_that_does_not_fit_is_named(engine: EchoEngine) -> None:
    """The refusal of a prompt without room names the field that it came in."""
    for asked, param in ((chat("x " * 9000), "messages"), (completion("x " * 9000), "prompt")):
        with pytest.raises(Refusal, match=f"^{param}: the prompt has 9000 tokens") as refusal:
            await run(engine, asked, Recorder())
        assert (refusal.value.param, refusal.value.code) == (param, "context_length_exceeded")


# ---- how it goes about it -----------------------------------------------------------------------------


async def test_sequences_beyond_the_batch_wait_their_turn() -> None:
    """Never more than max_num_seqs run at once; the others wait, first come, first served, and the load says
    so."""
    engine = echo_engine(max_num_seqs=3, max_model_len=100, tokens_per_second=200)
    await engine.start()
    sinks = [await begin(engine, "a b", str(i), max_tokens=4) for i in range(8)]
    loads: set[Load] = set()

    def seen() -> bool:
        loads.add(engine.load())
        return all(sink.ends for sink in sinks)

    await until(seen)
    assert max(load.running for load in loads) == 3
    assert max(load.waiting for load in loads) == 5
    assert max(load.kv_used for load in loads) <= 3 * (2 + 4) / (3 * 100)
    assert [sink.times[-1] for sink in sinks] == sorted(sink.times[-1] for sink in sinks)
    assert engine.load() == Load()
    await engine.close()


async def test_a_cancelled_request_is_forgotten(engine: EchoEngine) -> None:
    """A cancelled request hears nothing more, running or waiting, and frees what it held; cancelling again,
    or something unknown, does nothing."""
    endless = await begin(engine, "over and over", "endless", max_tokens=10**9, n=3)
    await until(lambda: endless.tokens[2] > 5)
    engine.cancel("endless")
    heard = dict(endless.tokens)
    engine.cancel("endless")
    engine.cancel("unknown")
    assert engine.load() == Load()
    assert (await say(engine, "next", max_tokens=50)).tokens[0] == 50
    assert endless.tokens == heard


async def test_a_request_that_its_sink_has_cancelled_disturbs_no_other(engine: EchoEngine) -> None:
    """A sink may cancel its request while it is given a token, the last one of a choice included."""

    class Ungrateful(Recorder):
        def put(self, *output: Any) -> None:
            super().put(*output)
            engine.cancel("ungrateful")

    for max_tokens in (1, 5):
        sink = Ungrateful()
        await run(engine, chat("no thanks", id="ungrateful", max_tokens=max_tokens, n=4), sink)
        assert (await say(engine, "next")).tokens[0] == 8
        assert dict(sink.tokens) == {0: 1}


async def test_it_keeps_its_pace() -> None:
    """No sequence gets its tokens faster than tokens_per_second, nor its first before
    time_to_first_token_s."""
    engine = echo_engine(tokens_per_second=100, time_to_first_token_s=0.2)
    await engine.start()
    began = asyncio.get_running_loop().time()
    one, two = await begin(engine, "a b", "1", max_tokens=21), await begin(engine, "a b", "2", max_tokens=21)
    await until(lambda: one.ends and two.ends)
    for sink in (one, two):
        assert sink.times[0] - began > 0.19  # timers are exact to a few milliseconds
        assert sink.times[-1] - sink.times[0] > 0.18
    await engine.close()


async def test_it_has_died_once_it_no_longer_steps() -> None:
    """Whoever waits for its death hears of it when it ends, at once if it has ended already."""
    engine = echo_engine()
    await engine.start()
    waiting = asyncio.create_task(engine.died())
    await say(engine, "alive")
    assert not waiting.done()
    await engine.close()
    assert str(await soon(waiting)) == str(await soon(engine.died()))
    await engine.close()
