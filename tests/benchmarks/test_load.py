"""The load generator against small real servers that say, byte by byte, what it should have seen."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import load
from benchmarks.answer import Answer, StreamReader
from benchmarks.client import Client, Target, connected
from benchmarks.load import Plan, run
from benchmarks.points import wait
from benchmarks.result import Outcome
from benchmarks.workload import Workload
from tests.benchmarks.peer import (
    DONE,
    HEAD,
    LAST,
    ROLE,
    STREAM,
    USAGE,
    Asked,
    Peer,
    Script,
    chunk,
    event,
    framed,
    sized,
    usage,
)

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0

Serve = Callable[[Script], Awaitable[Peer]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers that answer as their script says."""
    peers: list[Peer] = []

    async def start(script: Script) -> Peer:
        peers.append(Peer(script))
        await peers[-1].start()
        return peers[-1]

    yield start
    for peer in peers:
        await peer.stop()


async def good(asked: Asked) -> None:
    """Answer with a good stream."""
    await asked.stream(*STREAM)


WORK = Workload(model="m", prompt="words", max_tokens=12)


def plan(peer: Peer, **changes: Any) -> Plan:
    """One stream, one request, unless changed."""
    target = Target("127.0.0.1", peer.port)
    return replace(Plan(target, WORK, streams=1, requests=1, timeout=DEADLINE), **changes)


async def loaded(peer: Peer, **changes: Any) -> Outcome:
    """The result of that plan."""
    return await run(plan(peer, **changes))


def number(result: Outcome, name: str) -> float:
    """A figure that must be there."""
    value = result.figures[name]
    assert value is not None
    return value


def kinds(result: Outcome) -> dict[str, int]:
    """How often each kind of failure occurred."""
    return {kind: failure.count for kind, failure in result.failures.items()}


# ---- counting -----------------------------------------------------------------------------------------


async def test_tokens_are_counted_from_usage_not_from_chunks(serve: Serve) -> None:
    """Streams send exactly the requests asked for; tokens are what usage says, however many the chunks."""
    peer = await serve(good)
    result = await loaded(peer, streams=8, requests=50, expect_tokens=True)
    assert not result.failures
    assert len(peer.asked) == 50
    assert result.figures["completed"] == 50
    assert result.figures["total_output_tokens"] == 50 * 12
    assert result.figures["total_input_tokens"] == 50 * 7
    assert number(result, "output_throughput") == pytest.approx(600 / number(result, "duration"))


async def test_what_is_asked(serve: Serve) -> None:
    """Each request carries the workload and its usage option, and no two begin with the same prompt."""
    peer = await serve(good)
    await loaded(peer, workload=replace(WORK, ignore_eos=True), requests=20)
    assert all(asked.head.startswith("POST /v1/chat/completions HTTP/1.1\r\n") for asked in peer.asked)
    first = peer.asked[0].body
    messages = first.pop("messages")
    assert first == {
        "model": "m",
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert messages == [{"role": "user", "content": "00000000 words"}]
    contents = {asked.body["messages"][0]["content"] for asked in peer.asked[1:]}
    assert contents == {f"{position:08d} words" for position in range(1, 20)}


async def test_a_stream_keeps_its_connection(serve: Serve) -> None:
    """Each stream opens one connection and sends all its requests over it."""
    peer = await serve(good)
    await loaded(peer, streams=3, requests=30)
    assert peer.connections == 3


async def test_a_connection_that_the_server_closes_is_opened_again(serve: Serve) -> None:
    """A server that closes after each whole answer has not failed any."""

    async def closing(asked: Asked) -> None:
        head = HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        await asked.say(head, *map(framed, STREAM), LAST)
        asked.writer.close()

    peer = await serve(closing)
    result = await loaded(peer, requests=5)
    assert not result.failures
    assert peer.connections == 5


async def test_whole_answers(serve: Serve) -> None:
    """A whole answer counts by its usage; it has an end-to-end latency and no token times."""

    async def whole(asked: Asked) -> None:
        assert "stream" not in asked.body
        choice = {"message": {"content": "text"}, "finish_reason": "stop"}
        await asked.say(sized(json.dumps({"choices": [choice], "usage": usage(7, 12)}).encode()))

    result = await loaded(await serve(whole), workload=replace(WORK, whole=True), requests=4)
    assert not result.failures
    assert result.figures["total_output_tokens"] == 48
    assert number(result, "mean_e2el_ms") > 0
    assert (
        result.figures["mean_ttft_ms"]
        is result.figures["p99_itl_ms"]
        is result.figures["mean_tpot_ms"]
        is None
    )


async def test_a_run_ends_after_its_duration(serve: Serve) -> None:
    """A run by duration begins no request after it, and lets those in flight end."""

    async def slow(asked: Asked) -> None:
        await asyncio.sleep(0.5)
        await good(asked)

    peer = await serve(slow)
    result = await loaded(peer, streams=3, requests=None, duration=0.2)
    assert number(result, "duration") >= 0.5
    assert (result.figures["completed"], len(peer.asked)) == (3, 3)


async def test_the_warm_up_does_not_count(serve: Serve) -> None:
    """Requests of the warm-up are sent first, on the run's own connections, and are in no figure."""
    peer = await serve(good)
    result = await loaded(peer, streams=2, requests=10, warm_up=4)
    assert result.figures["completed"] == 10
    assert len(peer.asked) == 14
    assert peer.connections == 2


async def test_a_run_by_duration_ends_with_a_whole_round(serve: Serve) -> None:
    """However streams' answers fall, as many requests are sent as streams make in whole rounds."""

    async def uneven(asked: Asked) -> None:
        await asyncio.sleep(0.01 * (1 + asked.number % 3))
        await good(asked)

    result = await loaded(await serve(uneven), streams=7, requests=None, duration=0.2)
    assert number(result, "completed") > 7
    assert number(result, "completed") % 7 == 0


# ---- open loop -----------------------------------------------------------------------------------------


async def test_requests_are_due_at_random_moments_that_a_seed_repeats(serve: Serve) -> None:
    """Arrivals come at the rate, with gaps that vary, and are the same for the same seed alone."""
    peer = await serve(good)

    def arrivals(seed: int) -> list[float]:
        wanted = plan(peer, rate=100.0, seed=seed, requests=2000)
        return [due for _, due in load._arrivals(wanted, 100.0, started=50.0)]

    moments = arrivals(1)
    gaps = [later - earlier for earlier, later in pairwise([50.0, *moments])]
    assert len(moments) == 2000
    assert min(gaps) > 0
    assert fmean(gaps) == pytest.approx(0.01, rel=0.1)
    assert stdev(gaps) == pytest.approx(0.01, rel=0.15), "a Poisson process: gaps vary as much as they last"
    assert arrivals(1) == moments != arrivals(2)


async def test_an_open_loop_asks_no_less_of_a_slow_server(serve: Serve) -> None:
    """Requests begin when they are due, whatever has been answered, over no more connections than needed."""

    async def slow(asked: Asked) -> None:
        await asyncio.sleep(0.5)
        await good(asked)

    peer = await serve(slow)
    result = await loaded(peer, streams=200, requests=None, rate=200.0, duration=0.4)
    sent = number(result, "completed")
    assert 40 <= sent <= 160
    assert number(result, "max_streaming") <= sent
    assert peer.connections == sent, "none was free again"
    assert number(result, "duration") < 2


async def test_latency_counts_from_when_a_request_was_due(serve: Serve) -> None:
    """A request that waits for a stream of the generator is late: the wait is in its latency and in the lag,
    and the run is marked."""

    async def slow(asked: Asked) -> None:
        await asyncio.sleep(0.1)
        await good(asked)

    result = await loaded(await serve(slow), streams=1, requests=8, rate=1000.0)
    assert number(result, "median_ttft_ms") > 300
    assert number(result, "p99_ttft_ms") > 700
    assert result.generator.p99_send_lag_ms == pytest.approx(number(result, "p99_ttft_ms") - 100, rel=0.2)
    assert result.generator.bounded


async def test_a_closed_loop_has_no_moment_to_be_late_for(serve: Serve) -> None:
    """In a closed loop no request is late; how late an answer's end is read, the loop's own lag tells. Here
    one loop serves both ends, and a server that holds it is felt."""
    peer = await serve(good)
    result = await loaded(peer, streams=4, requests=200)
    assert result.generator.p99_send_lag_ms is None
    assert result.generator.p99_loop_lag_ms is not None

    async def holding(asked: Asked) -> None:
        time.sleep(0.05)  # noqa: ASYNC251 - to hold the loop is the point
        await good(asked)

    held = (await loaded(await serve(holding), streams=4, requests=8)).generator
    assert held.p99_send_lag_ms is None
    assert (held.p99_loop_lag_ms or 0) > 30
    assert held.bounded


async def test_what_counts_begins_after_the_warm_up(serve: Serve) -> None:
    """Whoever wants to know is told when the warm-up has ended, before the first request that counts."""
    peer = await serve(good)
    sent: list[int] = []
    wanted = plan(peer, streams=2, requests=10, warm_up=4)
    await run(wanted, begins=lambda: sent.append(len(peer.asked)))
    assert sent == [4]


async def test_connections_stand_open_without_a_request(serve: Serve) -> None:
    """As many connections as are wanted stand open and ask nothing; one that the server closes is not counted
    as open."""
    peer = await serve(good)
    async with connected(Target("127.0.0.1", peer.port), 20) as still_open:
        await wait(lambda: peer.connections == 20, "every connection")
        assert still_open() == 20
        await peer.stop()
        await wait(lambda: still_open() == 0, "their ends")
    assert not peer.asked


# ---- torn and odd streams -----------------------------------------------------------------------------


async def test_bytes_that_come_one_by_one(serve: Serve) -> None:
    """An answer torn at every byte, in its HTTP framing too, is the same answer."""

    async def torn(asked: Asked) -> None:
        whole = b"".join([HEAD, framed(b"".join(STREAM)), LAST])
        for position in range(len(whole)):
            await asked.say(whole[position : position + 1])
            await asyncio.sleep(0)

    result = await loaded(await serve(torn), expect_tokens=True)
    assert not result.failures
    assert result.figures["total_output_tokens"] == 12


ODD_TEXTS = st.lists(
    st.text(min_size=1) | st.sampled_from(['"content": "x"', "\n\ndata: [DONE]", "\\"]), min_size=1
)


@given(texts=ODD_TEXTS, data=st.data(), ending=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_any_text_torn_anywhere_is_read_alike(texts: list[str], data: st.DataObject, ending: bytes) -> None:
    """Whatever the text and wherever the bytes are torn, each chunk with text is seen once, in order."""
    events = [ROLE, *map(chunk, texts), chunk(None, "stop"), event(b": not a comment")[6:], USAGE, DONE]
    body = b"".join(event.replace(b"\n\n", ending) for event in events)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=8)))
    answer = Answer(started=0.0)
    reader = StreamReader(answer)
    for moment, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(body)], strict=True), start=1):
        reader.feed(body[start:end], float(moment))
    reader.end(99.0)
    assert answer.failure is None
    assert len(answer.chunks) == len(texts)
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 12)
    assert answer.chunks == sorted(answer.chunks)
    assert answer.started < answer.chunks[0] <= answer.chunks[-1] <= answer.ended < 99.0


async def test_finish_and_usage_may_come_with_the_last_text(serve: Serve) -> None:
    """A stream whose last chunk holds text, finish reason and usage at once is complete."""
    last = {"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}], "usage": usage(7, 2)}
    peer = await serve(lambda asked: asked.stream(chunk("a"), event(last), DONE))
    result = await loaded(peer)
    assert not result.failures
    assert result.figures["total_output_tokens"] == 2


async def test_a_client_can_leave_in_mid_answer(serve: Serve) -> None:
    """Who holds an answer sees it grow, and the server sees the client leave as soon as the asking is
    cancelled."""
    left = asyncio.Event()

    async def endless(asked: Asked) -> None:
        await asked.say(HEAD, framed(ROLE), framed(chunk("a")))
        await asked.gone()
        left.set()

    peer = await serve(endless)
    target = Target("127.0.0.1", peer.port)
    client, answer = Client(target), Answer(started=0.0)
    asking = asyncio.create_task(
        client.ask(WORK.requests(target)[0], stream=True, limit=DEADLINE, into=answer)
    )
    await wait(lambda: bool(answer.chunks), "text")
    asking.cancel()
    await asyncio.wait_for(left.wait(), DEADLINE)
    assert answer.failure is None


# ---- failures -----------------------------------------------------------------------------------------


async def test_a_stream_that_is_cut_off_has_failed(serve: Serve) -> None:
    """A connection lost in mid-stream fails that request alone, and none of its tokens count."""

    async def every_third_cut(asked: Asked) -> None:
        if asked.number % 3:
            await good(asked)
        else:
            await asked.say(HEAD, framed(ROLE), framed(chunk("half")))
            asked.writer.close()

    result = await loaded(await serve(every_third_cut), requests=9)
    assert kinds(result) == {"cut off": 3}
    assert (result.figures["completed"], result.figures["failed"]) == (6, 3)
    assert result.figures["total_output_tokens"] == 6 * 12


async def test_refusals_are_counted_by_status(serve: Serve) -> None:
    """Each status is a kind of its own, with the first one's words, and the connection is kept."""

    async def refusing(asked: Asked) -> None:
        status = ("429 Too Many Requests", "503 Service Unavailable", "503 Service Unavailable")[
            asked.number % 3
        ]
        await asked.say(sized(json.dumps({"error": {"message": f"number {asked.number}"}}).encode(), status))

    peer = await serve(refusing)
    result = await loaded(peer, requests=6)
    assert kinds(result) == {
        "status 429": 2,
        "status 503": 4,
    }
    assert "number 1" in result.failures["status 503"].example
    assert peer.connections == 1
    assert result.server_cpu_us_per_token is None


ERROR = event({"error": {"message": "the engine died", "code": None}})
INCOMPLETE = {
    "error event": (ROLE, chunk("half"), ERROR),
    "no [DONE]": STREAM[:-1],
    "no finish_reason": (chunk("text"), USAGE, DONE),
    "no usage": (chunk("text", "stop"), DONE),
    "bad event": (chunk("text"), event(b'{"choices": ['), *STREAM),
    "wrong length": (chunk("text", "stop"), event({"choices": [], "usage": usage(7, 11)}), DONE),
    "bad answer": (event({"choices": [], "usage": {"tokens": 3}}),),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
async def test_a_stream_that_is_not_as_it_should_be_has_failed(serve: Serve, kind: str) -> None:
    """A stream that ends as HTTP demands but lacks what a stream must say does not count as completed."""
    peer = await serve(lambda asked: asked.stream(*INCOMPLETE[kind]))
    result = await loaded(peer, expect_tokens=True)
    assert list(result.failures) == [kind]
    assert result.figures["completed"] == 0


async def test_a_server_that_does_not_speak_http(serve: Serve) -> None:
    """Bytes that are no HTTP answer fail the request instead of the run."""
    peer = await serve(lambda asked: asked.say(b"220 mail.example ESMTP\r\n"))
    assert list((await loaded(peer)).failures) == ["bad answer"]


async def test_an_answer_that_does_not_come_has_failed(serve: Serve) -> None:
    """A server that falls silent in mid-stream costs its request the timeout, and the run goes on."""

    async def first_hangs(asked: Asked) -> None:
        if asked.number:
            await good(asked)
        else:
            await asked.say(HEAD, framed(chunk("half")))
            await asyncio.Event().wait()

    result = await loaded(await serve(first_hangs), requests=3, timeout=1.0)
    assert kinds(result) == {"timeout": 1}
    assert result.figures["completed"] == 2


async def test_no_server(serve: Serve) -> None:
    """Where nothing listens, each request has failed to connect."""
    peer = await serve(good)
    await peer.stop()
    assert list((await loaded(peer)).failures) == ["connect"]


# ---- times --------------------------------------------------------------------------------------------


async def test_times_are_those_of_the_server(serve: Serve) -> None:
    """TTFT is the first text, not the role; ITL the pause between chunks; TPOT that over usage's tokens."""

    async def paced(asked: Asked) -> None:
        await asked.say(HEAD, framed(ROLE))
        await asyncio.sleep(0.2)
        await asked.say(framed(chunk("a")))
        for _ in range(4):
            await asyncio.sleep(0.05)
            await asked.say(framed(chunk("b c")))
        await asked.say(framed(chunk(None, "length")), framed(event({"choices": [], "usage": usage(7, 9)})))
        await asked.say(framed(DONE), LAST)

    result = await loaded(await serve(paced), streams=4, requests=8)
    assert not result.failures
    assert 200 <= number(result, "median_ttft_ms") < 600
    assert 45 <= number(result, "mean_itl_ms") < 150
    assert number(result, "mean_tpot_ms") == pytest.approx(number(result, "mean_itl_ms") / 2, rel=0.25)
    assert number(result, "mean_e2el_ms") >= number(result, "mean_ttft_ms") + 195


# ---- the command --------------------------------------------------------------------------------------


async def command(*arguments: str, limits: str = "true") -> tuple[int | None, str, str]:
    """Run the command, after a shell has set `limits`; its exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'{limits} && exec "$@"', "sh", sys.executable, "-m", "benchmarks.load", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    return process.returncode, out.decode(), err.decode()


async def test_a_result_names_command_machine_workload_and_commit(serve: Serve, tmp_path: Path) -> None:
    """The command prints a table and writes a file from which the run can be judged and repeated."""
    peer = await serve(good)
    options = f"--url http://127.0.0.1:{peer.port} --model org/m:1 --streams 2 --requests 6 --max-tokens 12"
    options += f" --expect-tokens --server-pid {os.getpid()} --results {tmp_path}"
    status, out, err = await command(*options.split())
    assert (status, err) == (0, "")
    (path,) = tmp_path.iterdir()  # noqa: ASYNC240 - one small folder
    assert str(path) in out
    assert path.name.endswith("-org-m-1.json")
    result = json.loads(path.read_text())
    assert result["command"] == f"python -m benchmarks.load {options}"
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["cpu"]
    assert re.fullmatch("[0-9a-f]{40}", result["commit"]["revision"] or "0" * 40)
    assert datetime.fromisoformat(result["started"]).tzinfo is not None
    assert result["workload"]["streams"] == 2
    assert result["workload"]["model"] == "org/m:1"
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 72)
    assert result["generator"]["cpu_share"] > 0
    assert os.getpid() in [process["pid"] for process in result["processes"]]  # and what it has started
    assert result["server_cpu_us_per_token"] >= 0
    for word in ("TTFT", "ITL", "TPOT", "E2EL", "6 completed and 0 failed", "load generator:", "us/token"):
        assert word in out


async def test_failures_show_in_the_exit_status(serve: Serve, tmp_path: Path) -> None:
    """A run with failed answers says how many and why, and exits with 1."""
    peer = await serve(lambda asked: asked.say(sized(b"{}", "503 Service Unavailable")))
    url = f"http://localhost:{peer.port}"
    status, out, _ = await command(
        "--url", url, "--model", "m", "--requests", "2", "--results", str(tmp_path)
    )
    assert status == 1
    assert "0 completed and 2 failed" in out
    assert "failed, status 503: 2" in out


async def test_more_streams_than_files_may_be_open(serve: Serve, tmp_path: Path) -> None:
    """A soft limit on open files is raised as far as the streams need; a hard limit below is an error."""
    peer = await serve(good)
    options = ["--url", f"http://127.0.0.1:{peer.port}", "--model", "m", "--results", str(tmp_path)]
    options += ["--streams", "90", "--requests", "90"]
    status, out, err = await command(*options, limits="ulimit -Sn 60")
    assert (status, err) == (0, "")
    assert "90 completed" in out
    status, _, err = await command(*options, limits="ulimit -n 120")
    assert status == 2
    assert "the hard limit (ulimit -Hn) is 120" in err


REFUSED = {
    "--url http://10.0.0.1:8000": "not a loopback address",
    "--url http://example.com": "not a loopback address",
    "--url http://127.0.0.1@example.com": "not a loopback address",
    "--url http://127.0.0.1.example.com": "not a loopback address",
    "--url http://0.0.0.0:8000": "not a loopback address",
    "--url http://[2001:db8::1]:8000": "not a loopback address",
    "--url https://127.0.0.1:8000": "is not of the form http://127.0.0.1:8000",
    "--url 127.0.0.1:8000": "is not of the form http://127.0.0.1:8000",
    "--url http://127.0.0.1:99999": "cannot be read: Port out of range 0-65535",
    "--url http://[::1": "cannot be read",
    "--url http://127.0.0.1:8000/v1": "has a path",
    "--streams 0": "--streams is 0; more than 0 is needed",
    "--max-tokens -1": "--max-tokens is -1; more than 0 is needed",
    "--timeout nan": "--timeout is nan; more than 0 is needed",
    "--warm-up -1": "--warm-up is -1; at least 0 is needed",
    "--results /dev/null": "File exists: '/dev/null'",
    "--rate 0": "--rate is 0.0; more than 0 is needed",
    "--streams 5": "--requests 4 would leave some of --streams 5 without work",
    "--server-pid 4194305": "no process with the id 4194305",  # above the highest id that Linux gives
    "--server-port 0": "no process of this user listens on port 0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_run_is_refused(
    options: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A target off this machine, or options that make no run, end the command in a sentence that says why."""
    arguments = f"--model m --requests 4 --results {tmp_path} {options}".split()
    assert load.main(arguments) == 2
    said = capsys.readouterr()
    assert REFUSED[options] in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80", "http://127.1.2.3/", "http://[::1]:8000", "http://localhost:1"]
)
def test_loopback_addresses_are_accepted(url: str) -> None:
    """Every way to write a loopback address is a target."""
    assert Target.parse(url).port in {80, 8000, 1}
