"""POST /v1/chat/completions from a client's socket to real engines and back. After each test the harness
looks whether anything is left of any request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from router.settings import ModelLimits, ModelTimeouts
from serving.answers import LONGEST_ANSWER
from serving.engine import EngineDead
from tests.harness import Deployment, HandEngine, deployed, echo_engine, served
from tests.waiting import soon, until
from tests.wire import Answer


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[Deployment]:
    """One echo replica as fast as the machine allows."""
    async with deployed(served(echo_engine())) as deployment:
        yield deployment


def broken(answer: Answer) -> str | None:
    """The code of the error that ended a stream: the last event, no [DONE] after it, the body whole."""
    assert (answer.status, answer.complete, answer.done) == (200, True, False)
    assert answer.error is not None
    assert answer.error["message"]
    return str(answer.error["code"])


# ---- what a client reads ------------------------------------------------------------------------------

stops = st.lists(st.text(min_size=1, max_size=3), max_size=4)
seeds = st.none() | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60)
@given(text=st.text(max_size=40), n=st.integers(1, 3), max_tokens=st.integers(1, 20), seed=seeds, stop=stops)
async def test_streamed_and_whole_answers_are_the_same(
    echo: Deployment, text: str, n: int, max_tokens: int, seed: int | None, stop: list[str]
) -> None:
    """Whatever the text, the deltas of a stream spell the whole answer's text, with the same usage and finish
    reasons, and neither holds a stop string."""
    sampling: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "seed": seed, "stop": stop or None}
    whole = await echo.ask(text, **sampling)
    stream = await echo.stream(text, stream_options={"include_usage": True}, **sampling)
    assert (stream.done, stream.complete) == (True, True)
    assert len(whole["choices"]) == n
    for at, choice in enumerate(whole["choices"]):
        assert choice["index"] == at
        assert stream.text(at) == choice["message"]["content"]
        assert stream.choices(at)[-1]["finish_reason"] == choice["finish_reason"]
        assert stream.deltas(at)[0]["role"] == "assistant"
        assert sum("role" in delta for delta in stream.deltas(at)) == 1
        assert not any(each in choice["message"]["content"] for each in stop)
    assert stream.events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == len(text.split())
    assert len({event["id"] for event in stream.events}) == 1
    assert stream.events[0]["id"] != whole["id"]
    assert {event["model"] for event in stream.events} == {whole["model"]} == {"echo"}


async def test_two_hundred_streams_at_once_come_complete_and_in_order(echo: Deployment) -> None:
    """200 streams of 200 tokens each, together, each with the text that is its own."""

    async def run(at: int) -> bool:
        text = " ".join(f"{at}:{word}" for word in range(200))
        answer = await echo.stream(text, max_tokens=200, stream_options={"include_usage": True})
        assert answer.events[-1]["usage"]["completion_tokens"] == 200
        return answer.done and answer.text() == text

    assert all(await asyncio.gather(*map(run, range(200))))
    assert echo.metric("trunkline_generation_tokens_total") == 200 * 200


async def test_a_stream_is_read_while_it_is_made() -> None:
    """The first chunk is with the client before the second is generated, and so on to the last."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        for at in range(20):
            engine.say(f"{at}")
            assert json.loads(await wire.event())["choices"][0]["delta"]["content"] == f"{at}"
        engine.say("", "stop")
        assert (await wire.answer()).done


async def test_an_engine_step_is_one_frame_to_the_router() -> None:
    """With a pace that leaves time between two steps, streams share their frames: there are about as many as
    steps, however many streams."""
    async with deployed(served(echo_engine(tokens_per_second=50))) as deployment:
        (replica,) = deployment.replicas["echo"]
        before = replica.frames.value
        answers = await asyncio.gather(*(deployment.stream("a b c", max_tokens=30) for _ in range(40)))
        assert all(len(answer.text().split()) == 30 for answer in answers)
        # Clients do not come all in one step, and loads and pings are frames too.
        assert 30 <= replica.frames.value - before < 30 + 40 + 30


# ---- replicas that leave ------------------------------------------------------------------------------


async def test_a_drain_is_not_seen_by_clients() -> None:
    """While a replica drains its streams come to their end and new requests go to another."""
    async with deployed(served(*(echo_engine(tokens_per_second=100) for _ in range(2)))) as deployment:
        wires = [await deployment.open("a b c", stream=True, max_tokens=40) for _ in range(20)]
        for wire in wires:
            assert await wire.event()
        drained, other = deployment.replicas["echo"]
        assert min(drained.streams, other.streams) >= 8
        draining = asyncio.create_task(drained.stop())
        late = await asyncio.gather(*(deployment.stream("x y", max_tokens=20) for _ in range(20)))
        assert all(answer.done and len(answer.text().split()) == 20 for answer in late)
        answers = [await wire.answer() for wire in wires]
        assert all(answer.done and len(answer.text().split()) == 39 for answer in answers)
        await soon(draining)
        assert deployment.metric("trunkline_requests_total", outcome="completed") == 40
        await until(lambda: len(deployment.backend().trunks) == 1)


async def test_a_lost_replica_ends_its_streams_with_an_event() -> None:
    """When a replica is lost in mid-stream, each of its streams ends at once with an error event and nothing
    after it; those of other replicas go on."""
    engines = HandEngine(), HandEngine()
    async with deployed(served(*engines)) as deployment:
        wires = [await deployment.open("hi", stream=True) for _ in range(20)]
        await until(lambda: sum(len(engine.requests) for engine in engines) == 20)
        for engine in engines:
            engine.say("half")
        for wire in wires:
            assert await wire.event()
        await deployment.replicas["echo"][0].kill()
        await until(lambda: deployment.metric("trunkline_requests_total", outcome="failed") == 10, 10.0)
        engines[1].say(" whole", "stop")
        answers = [await wire.answer() for wire in wires]
        assert sorted(answer.done for answer in answers) == [False] * 10 + [True] * 10
        assert {broken(answer) for answer in answers if not answer.done} == {"replica_lost"}
        assert {answer.text() for answer in answers if answer.done} == {" whole"}


async def test_a_dead_engine_ends_its_streams_with_an_event() -> None:
    """So it is when the engine dies and its replica lives to say so."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        engine.say("half")
        engine.fail(EngineDead("gone"))
        answer = await wire.answer()
        assert answer.text() == "half"
        assert broken(answer) == "replica_lost"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_without_a_byte_is_retried_unseen(stream: bool) -> None:
    """When a replica is lost before the first byte the client gets its answer from another, and is counted
    once, prompt and all."""
    engines = HandEngine(), HandEngine()
    async with deployed(served(*engines)) as deployment:
        wire = await deployment.open("one two", stream=stream)
        await until(lambda: any(engine.requests for engine in engines))
        lost = 0 if engines[0].requests else 1
        await deployment.replicas["echo"][lost].kill()
        await until(lambda: engines[1 - lost].requests)
        engines[1 - lost].say("retried", "stop")
        if stream:
            answer = await wire.answer()
            assert (answer.done, answer.text()) == (True, "retried")
        else:
            assert b"retried" in await wire.body()
        assert deployment.metric("trunkline_prompt_tokens_total") == 2
        assert deployment.metric("trunkline_requests_total", outcome="completed") == 1


async def test_requests_wait_for_a_replica_and_then_are_told_to_come_back() -> None:
    """Without a replica a request waits for queue_s and is answered 503 with Retry-After; one that waits when
    a replica comes is answered by it."""
    async with deployed(served(timeouts=ModelTimeouts(queue_s=0.3))) as deployment:
        response = await deployment.post({"model": "echo", "messages": [{"role": "user", "content": "hi"}]})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_replica"
        assert int(response.headers["retry-after"]) >= 1
        assert deployment.metric("trunkline_requests_total", outcome="refused", status="503") == 1
    async with deployed(served()) as deployment:
        waiting = asyncio.create_task(deployment.ask("to whom it may concern"))
        await until(lambda: deployment.metric("trunkline_waiting", model="echo") == 1)
        await deployment.add(echo_engine())
        assert (await soon(waiting))["choices"][0]["message"]["content"].startswith("to whom it may concern")


# ---- time-outs ----------------------------------------------------------------------------------------


async def test_a_model_that_produces_nothing_times_out() -> None:
    """Without a token for first_token_s the answer is a 504 that says so, streamed or not."""
    timeouts = ModelTimeouts(first_token_s=0.3)
    async with deployed(served(echo_engine(time_to_first_token_s=60.0), timeouts=timeouts)) as deployment:
        for stream in (True, False):
            wire = await deployment.open("hi", stream=stream)
            error = json.loads(await wire.body())["error"]
            assert (wire.status, error["code"], error["type"]) == (504, "first_token_timeout", "server_error")
            assert "0.3 s" in error["message"]


async def test_a_whole_answer_may_take_longer_than_its_first_token() -> None:
    """first_token_s and stall_s bound what they say they bound: an answer whose tokens keep coming is given,
    though it takes longer as a whole."""
    timeouts = ModelTimeouts(first_token_s=0.4, stall_s=0.4)
    async with deployed(served(echo_engine(tokens_per_second=20), timeouts=timeouts)) as deployment:
        answer = await deployment.ask("a b c", max_tokens=24)
        assert answer["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_stops_in_the_middle_times_out(stream: bool) -> None:
    """After a pause of stall_s a stream ends with an error event, and a whole answer is a 504."""
    engine = HandEngine()
    async with deployed(served(engine, timeouts=ModelTimeouts(stall_s=0.3))) as deployment:
        wire = await deployment.open("hi", stream=stream)
        await until(lambda: engine.requests)
        engine.say("half")
        if stream:
            answer = await wire.answer()
            assert answer.text() == "half"
            assert broken(answer) == "stalled"
        else:
            assert json.loads(await wire.body())["error"]["code"] == "stalled"
            assert wire.status == 504
        assert not engine.requests


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_takes_too_long_times_out(stream: bool) -> None:
    """After total_s a stream ends with an error event however lively it is, and a whole answer is a 504."""
    model = served(echo_engine(tokens_per_second=50), timeouts=ModelTimeouts(total_s=0.5))
    async with deployed(model) as deployment:
        wire = await deployment.open("on and on", stream=stream, max_tokens=8000)
        if stream:
            answer = await wire.answer()
            assert len(answer.text().split()) > 5
            assert broken(answer) == "total_timeout"
        else:
            assert json.loads(await wire.body())["error"]["code"] == "total_timeout"
            assert wire.status == 504


async def test_a_full_model_turns_requests_away() -> None:
    """A request that waits for queue_s in vain, and one that finds the queue full, get a 429 with
    Retry-After."""
    engine = HandEngine()
    limits = ModelLimits(in_flight=1, queued=1)
    async with deployed(served(engine, limits=limits, timeouts=ModelTimeouts(queue_s=0.5))) as deployment:
        running = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        queued = await deployment.open("hi")
        await until(lambda: deployment.model().admission.waiting == 1)
        for wire in (await deployment.open("hi"), queued):
            error = json.loads(await wire.body())["error"]
            assert (wire.status, error["code"], error["type"]) == (429, "overloaded", "rate_limit_error")
            assert int(wire.headers["retry-after"]) >= 1
        engine.say("done", "stop")
        assert (await running.answer()).done


async def test_no_more_is_generated_at_once_than_may_be() -> None:
    """Requests beyond in_flight wait and are served in the order in which they came; choices count singly."""
    engine = HandEngine()
    async with deployed(served(engine, limits=ModelLimits(in_flight=4))) as deployment:
        wires = []
        for length in range(1, 7):
            wires.append(await deployment.open("hi " * length, stream=True, n=2))
            await until(lambda: engine.seen + deployment.model().admission.waiting == len(wires))
        for oldest in range(1, 7):
            running = [length for length in (oldest, oldest + 1) if length <= 6]
            await until(lambda: len(engine.requests) == len(running))  # noqa: B023 - awaited here
            assert [request.prompt.length for request in engine.requests.values()] == running
            assert deployment.metric("trunkline_in_flight", model="echo") == 2 * len(running)
            engine.give(engine.only(oldest), "", "stop")
            assert (await wires[oldest - 1].answer()).done


async def test_a_router_that_ends_takes_nothing_new() -> None:
    """While it shuts down, running answers end and new requests are told to come back."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        deployment.application.completions.draining = True
        refused = await deployment.open("hi")
        assert json.loads(await refused.body())["error"]["code"] == "shutting_down"
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        engine.say("done", "stop")
        assert (await wire.answer()).done


# ---- what one request may do to others ----------------------------------------------------------------


async def test_an_answer_too_long_for_one_piece_is_refused_alone() -> None:
    """A whole answer past its limit is a 400 that says what to do; its engine work ends, and a stream on the
    same trunk goes on."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        whole, beside = await deployment.open("one"), await deployment.open("one two", stream=True)
        await until(lambda: len(engine.requests) == 2)
        for _ in range(3):
            engine.give(engine.only(1), "x" * (LONGEST_ANSWER // 3))
        engine.give(engine.only(1), "too much")
        error = json.loads(await whole.body())["error"]
        assert (whole.status, error["code"], error["param"]) == (400, "answer_too_long", "stream")
        assert len(engine.requests) == 1
        engine.say("fine", "stop")
        assert (await beside.answer()).text() == "fine"


async def test_a_long_echo_is_no_slow_reader(echo: Deployment) -> None:
    """A stream that begins with more of its prompt than its buffer holds comes whole to who reads it."""
    words = " ".join(["word"] * 6000)
    body = {"model": "echo", "prompt": words, "echo": True, "n": 60, "max_tokens": 1, "stream": True}
    answer = await echo.http.post("/v1/completions", json=body)
    assert answer.text.count(words) == 60
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_request_for_giant_words_disturbs_nobody(echo: Deployment) -> None:
    """A body of a few megabytes in one word, many times over, breaks no trunk: a stream beside it ends."""
    beside = await echo.open("a b c", stream=True, max_tokens=2000)
    giant = "x" * 2_000_000
    responses = await asyncio.gather(
        *(
            echo.post(
                {
                    "model": "echo",
                    "messages": [{"role": "user", "content": giant}],
                    "max_tokens": 300,
                    "n": 100,
                    "stream": stream,
                }
            )
            for stream in (True, False)
        )
    )
    assert all(response.status_code in {200, 400} for response in responses)
    answer = await beside.answer()
    assert (answer.done, len(answer.text().split())) == (True, 2000)


# ---- what is counted ----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.text("ab ", max_size=20), st.integers(1, 3), st.integers(1, 9), st.booleans()),
        max_size=8,
    )
)
async def test_usage_adds_up_to_the_counters(
    echo: Deployment, requests: list[tuple[str, int, int, bool]]
) -> None:
    """Over completed requests, the sums of their usages are what the counters have grown by, exactly."""
    names = ("trunkline_prompt_tokens_total", "trunkline_generation_tokens_total")
    before = [echo.metric(name, model="echo") for name in names]

    async def usage(text: str, n: int, max_tokens: int, *, stream: bool) -> tuple[int, int]:
        if stream:
            options = {"include_usage": True}
            answer = await echo.stream(text, n=n, max_tokens=max_tokens, stop="b a", stream_options=options)
            used = answer.events[-1]["usage"]
        else:
            used = (await echo.ask(text, n=n, max_tokens=max_tokens, stop="b a"))["usage"]
        return used["prompt_tokens"], used["completion_tokens"]

    used = await asyncio.gather(*(usage(text, n, most, stream=stream) for text, n, most, stream in requests))
    await until(echo.idle)
    grown = [echo.metric(name, model="echo") - was for name, was in zip(names, before, strict=True)]
    assert grown == [sum(prompt for prompt, _ in used), sum(completion for _, completion in used)]


@pytest.mark.parametrize("outcome", ["cancelled", "failed"])
async def test_an_answer_that_broke_off_counts_what_was_handed_over(outcome: str) -> None:
    """Of a stream that is cancelled or fails, the tokens that its client was sent are counted and no more."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("one two three", stream=True)
        await until(lambda: engine.requests)
        for _ in range(5):
            engine.say("token")
            assert await wire.event()
        if outcome == "cancelled":
            wire.leave()
            await until(lambda: not engine.requests)
        else:
            engine.fail(EngineDead("gone"))
            assert broken(await wire.answer()) == "replica_lost"
        status = "499" if outcome == "cancelled" else "200"
        counted = {"model": "echo", "outcome": outcome, "status": status}
        await until(lambda: deployment.metric("trunkline_requests_total", **counted) == 1)
        assert deployment.metric("trunkline_generation_tokens_total", model="echo") == 5
        assert deployment.metric("trunkline_prompt_tokens_total", model="echo") == 3
        assert deployment.metric("trunkline_requests_total") == 1
        assert deployment.metric("trunkline_in_flight", model="echo") == 0
