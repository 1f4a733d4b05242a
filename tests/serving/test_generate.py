"""Rendering and generating, and the ways in which a request ends without an answer."""

from __future__ import annotations

import pytest

from serving.engine import EngineDead, Refusal
from serving.generate import generate
from serving.messages import Usage
from tests.harness import HandEngine, echo_engine
from tests.serving.recorder import Recorder, answer, chat


async def test_an_answer_that_fills_the_context_ends_for_length() -> None:
    """A request for more than fits gets what fits, and its finish reason says so."""
    engine = echo_engine(max_model_len=10)
    await engine.start()
    body = (await answer(engine, chat("a b c", max_tokens=100))).body
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 7
    refused = await answer(engine, chat("a b c d e f g h i j"))
    assert refused.refusal is not None
    assert refused.refusal.code == "context_length_exceeded"
    await engine.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_gives_up_fails_the_answer(stream: bool) -> None:
    """An engine that dies after the start ends the answer as failed, with no bytes of its own and the usage
    so far."""
    engine, outlet = HandEngine(), Recorder()
    await generate(engine, chat("one two", stream=stream), outlet)
    engine.say("half")
    before = outlet.data
    engine.fail(EngineDead("a path of ours"))
    assert outlet.failed
    assert outlet.data == before
    assert outlet.usage == Usage(2, 1)


async def test_an_answer_that_fails_alone_is_an_internal_error() -> None:
    """Where the engine lives and gives up on one request, its client learns of a fault and not of which."""
    engine, outlet = HandEngine(), Recorder()
    await generate(engine, chat("one two"), outlet)
    engine.fail(RuntimeError("a path of ours"))
    assert outlet.refusal is not None
    assert (outlet.refusal.status, outlet.refusal.message) == (500, "internal error")
    assert not outlet.failed


async def test_an_engine_that_takes_no_request_says_why_only_to_those_who_may_know() -> None:
    """A refusal keeps its words, a fault of ours has none, and a dead engine is no answer at all."""
    engine = HandEngine()
    engine.refusal = Refusal("no such token", param="logit_bias")
    outlet = Recorder()
    await generate(engine, chat(), outlet)
    assert outlet.refusal is engine.refusal
    engine.refusal = ValueError("/a/path of ours")
    outlet = Recorder()
    await generate(engine, chat(), outlet)
    assert outlet.refusal is not None
    assert (outlet.refusal.status, outlet.refusal.message) == (500, "internal error")
    engine.refusal = EngineDead("gone")
    outlet = Recorder()
    await generate(engine, chat(), outlet)
    assert outlet.failed
