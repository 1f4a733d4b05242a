"""From a request to the bytes that a client reads, on real engines, without a trunk."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from serving import chat
from serving.chat import LONGEST_ANSWER, fit
from serving.echo import EchoEngine
from serving.engine import EngineDead, Refusal
from serving.messages import Chat, Message, Sampling, Usage
from tests.harness import HandEngine, echo_engine
from tests.waiting import until


class Recorder:
    """An outlet that keeps what a client would be sent."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.data = b""
        self.tokens = 0
        self.chunks = 0
        self.progressed = 0
        self.refusal: Refusal | None = None
        self.usage: Usage | None = None
        self.failed = False

    @property
    def over(self) -> bool:
        """Whether the answer has ended, one way or the other."""
        return self.refusal is not None or self.usage is not None

    def accepted(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def refused(self, refusal: Refusal) -> None:
        self.refusal = refusal

    def chunk(self, data: bytes, tokens: int) -> None:
        assert not self.over
        assert data
        self.data += data
        self.tokens += tokens
        self.chunks += 1

    def progress(self) -> None:
        self.progressed += 1

    def ended(self, data: bytes, tokens: int, usage: Usage, *, failed: bool = False) -> None:
        assert not self.over
        self.data += data
        self.tokens += tokens
        self.usage = usage
        self.failed = failed

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream that has ended, without [DONE]."""
        assert self.data.endswith(b"\n\n")
        *events, done = self.data.removesuffix(b"\n\n").split(b"\n\n")
        assert done == b"data: [DONE]"
        assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    def choices(self, choice: int) -> list[dict[str, Any]]:
        """A choice's entry of every event that has one."""
        return [each for event in self.events for each in event["choices"] if each["index"] == choice]


def request(
    text: str = "to be or not to be", *, stream: bool = False, usage: bool = False, **fields: Any
) -> Chat:
    """A request with one user message."""
    sampling = Sampling(**{"max_tokens": 8, **fields})
    return Chat("chatcmpl-1", "a/b:C", 1234, (Message("user", text),), sampling, stream, usage)


async def answer(engine: EchoEngine, asked: Chat) -> Recorder:
    """The whole answer."""
    outlet = Recorder()
    await chat.generate(engine, asked, outlet)
    await until(lambda: outlet.over)
    return outlet


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
    whole = await answer(engine, request(text, **sampling))
    streamed = await answer(engine, request(text, stream=True, usage=True, **sampling))
    body = json.loads(whole.data)
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
    streamed = await answer(engine, request(text, stream=True, usage=usage, n=n, stop=stop))
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
async def test_every_token_is_counted_once(
    engine: EchoEngine, text: str, n: int, stop: tuple[str, ...]
) -> None:
    """The tokens that chunks carry add up to those of the usage, held back ones included, and the prompt's
    are those that were accepted."""
    for stream in (True, False):
        outlet = await answer(engine, request(text, stream=stream, n=n, stop=stop))
        assert outlet.usage is not None
        assert outlet.tokens == outlet.usage.completion_tokens
        assert outlet.prompt_tokens == outlet.usage.prompt_tokens == len(text.split())


async def test_each_put_with_text_is_a_chunk_and_each_without_is_progress() -> None:
    """What an engine has for the client goes out at once; that it works on what it must hold back, or on a
    whole answer, is heard of too."""
    engine = HandEngine()
    for stream, chunks, progressed in ((True, 2, 3), (False, 0, 5)):
        outlet = Recorder()
        await chat.generate(engine, request(stream=stream), outlet)
        for text in ("a", "", "", "b", ""):
            engine.say(text)
        assert (outlet.chunks, outlet.progressed) == (chunks, progressed)
        engine.say("c", "length")
        assert outlet.tokens == 6


@given(prompt=st.integers(0, 30), asked=st.integers(1, 30), least=st.integers(0, 30))
def test_an_answer_is_fitted_into_the_context(prompt: int, asked: int, least: int) -> None:
    """max_tokens is what was asked for or what the context leaves, whichever is less, and min_tokens never
    more than that; a prompt that leaves no room is refused with the numbers."""
    sampling = Sampling(max_tokens=max(asked, least), min_tokens=least)
    if prompt >= 20:
        with pytest.raises(Refusal, match=f"has {prompt} tokens.*context of 20 tokens") as refusal:
            fit(sampling, prompt, 20)
        assert (refusal.value.status, refusal.value.param) == (400, "messages")
        assert refusal.value.code == "context_length_exceeded"
        return
    fitted = fit(sampling, prompt, 20)
    assert fitted.max_tokens == min(sampling.max_tokens, 20 - prompt)
    assert fitted.min_tokens == min(least, fitted.max_tokens)
    changed = {"max_tokens": fitted.max_tokens, "min_tokens": fitted.min_tokens}
    assert fitted == msgspec.structs.replace(sampling, **changed)


async def test_an_answer_that_fills_the_context_ends_for_length() -> None:
    """A request for more than fits gets what fits, and its finish reason says so."""
    engine = echo_engine(max_model_len=10)
    await engine.start()
    body = json.loads((await answer(engine, request("a b c", max_tokens=100))).data)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 7
    refused = await answer(engine, request("a b c d e f g h i j"))
    assert refused.refusal is not None
    assert refused.refusal.code == "context_length_exceeded"
    await engine.close()


async def test_a_whole_answer_has_a_bounded_size() -> None:
    """A whole answer past LONGEST_ANSWER is refused, in words that say what may be longer; a stream may."""
    engine = HandEngine()
    whole, stream = Recorder(), Recorder()
    await chat.generate(engine, request(), whole)
    await chat.generate(engine, msgspec.structs.replace(request(stream=True), id="other"), stream)
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


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_gives_up_fails_the_answer(stream: bool) -> None:
    """An engine that dies after the start ends the answer as failed, with no bytes of its own and the usage
    so far."""
    engine, outlet = HandEngine(), Recorder()
    await chat.generate(engine, request("one two", stream=stream), outlet)
    engine.say("half")
    before = outlet.data
    engine.fail(EngineDead("a path of ours"))
    assert outlet.failed
    assert outlet.data == before
    assert outlet.usage == Usage(2, 1)


async def test_an_answer_that_fails_alone_is_an_internal_error() -> None:
    """Where the engine lives and gives up on one request, its client learns of a fault and not of which."""
    engine, outlet = HandEngine(), Recorder()
    await chat.generate(engine, request("one two"), outlet)
    engine.fail(RuntimeError("a path of ours"))
    assert outlet.refusal is not None
    assert (outlet.refusal.status, outlet.refusal.message) == (500, "internal error")
    assert not outlet.failed


async def test_an_engine_that_takes_no_request_says_why_only_to_those_who_may_know() -> None:
    """A refusal keeps its words, a fault of ours has none, and a dead engine is no answer at all."""
    engine = HandEngine()
    engine.refusal = Refusal("no such token", param="logit_bias")
    outlet = Recorder()
    await chat.generate(engine, request(), outlet)
    assert outlet.refusal is engine.refusal
    engine.refusal = ValueError("/a/path of ours")
    outlet = Recorder()
    await chat.generate(engine, request(), outlet)
    assert outlet.refusal is not None
    assert (outlet.refusal.status, outlet.refusal.message) == (500, "internal error")
    engine.refusal = EngineDead("gone")
    outlet = Recorder()
    await chat.generate(engine, request(), outlet)
    assert outlet.failed
