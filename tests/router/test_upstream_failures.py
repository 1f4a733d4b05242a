"""A provider that misbehaves in every way that we could think of. Each time the client is told what is true,
in bounded time, the next request is served, and no connection, slot or key is left anywhere.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from router.backend import Job
from router.errors import ApiError
from router.reading import read_chat
from router.relay import MAX_ANSWER
from router.settings import Limits, ModelTimeouts, UpstreamModel
from router.upstream import Upstream
from tests.harness import Deployment, deployed, request
from tests.router.providers import (
    DONE,
    END,
    HEAD,
    KEY,
    Behaviour,
    Line,
    Provider,
    body,
    chunk,
    chunked,
    echoes_the_key,
    event,
    gzipped,
    hangs_at_once,
    provider,
    refuses,
    resets,
    says,
    says_and_hangs,
    usage,
    whole,
)
from tests.waiting import soon, until

pytestmark = pytest.mark.usefixtures("no_key_in_logs")

QUICK = ModelTimeouts(upstream_connect_s=1.0, first_token_s=1.0, stall_s=1.0)

AT_ONCE_S = 5.0


class Told(NamedTuple):
    """What a client is told."""

    status: int
    code: str | None = None
    says: str = ""
    """A part of the message."""
    text: str = "all is well"
    """What of a stream came before its end."""


WELL = Told(200)
CUT_OFF = Told(502, "upstream_failed", "before it was complete")
BROKEN = Told(502, "upstream_failed", "broke off the connection")
SENSELESS = Told(502, "upstream_failed", "is no answer")
SLOW_START = Told(504, "first_token_timeout", "within 1 s")
UNREACHABLE = Told(502, "upstream_failed", "the provider could not be reached")

ERROR = {"message": "the far end is busy", "type": "server_error", "param": None, "code": "far_busy"}
LONG = b"x" * 100_000

# How it behaves → what the client of a whole answer is told → what that of a stream is told.
ALIKE: dict[str, tuple[Behaviour, Told]] = {
    "it hangs before it reads": (hangs_at_once, SLOW_START),
    "it hangs after the request": (says_and_hangs(), SLOW_START),
    "it hangs in the head": (says_and_hangs(b"HTTP/1.1 200 OK\r\ncontent-"), SLOW_START),
    "it hangs after the head": (says_and_hangs(HEAD), SLOW_START),
    "it says to go on and hangs": (says_and_hangs(b"HTTP/1.1 100 Continue\r\n\r\n"), SLOW_START),
    "it closes at once": (says(), BROKEN),
    "it resets the connection": (resets, BROKEN),
    "it closes in the head": (says(b"HTTP/1.1 200 OK\r\ncontent-"), BROKEN),
    "it closes in the framing": (says(HEAD, b"5\r\nda"), BROKEN),
    "its framing is wrong": (says(HEAD, b"zz\r\ndata: x"), BROKEN),
    "it does not speak HTTP": (says(b"SSH-2.0-OpenSSH_9.6\r\n" * 3), BROKEN),
    "its head never ends": (says_and_hangs(b"HTTP/1.1 200 OK\r\n", b"x-fill: " + LONG), BROKEN),
    "it lies about its encoding": (
        says(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 9\r\n\r\nnot gzip."),
        BROKEN,
    ),
    "it redirects": (refuses(307, b"", location="/elsewhere"), Told(502, "upstream_failed", "status 307")),
    "it has no content": (says(b"HTTP/1.1 204 No Content\r\n\r\n"), Told(502, "upstream_failed", "204")),
    "it has an error in JSON": (
        refuses(503, json.dumps({"error": ERROR}).encode()),
        Told(503, "far_busy", "the far end is busy"),
    ),
    "it has an error of another shape": (
        refuses(422, b'{"object": "error", "message": "no such thing", "code": 40001}'),
        Told(422, "upstream_error", "no such thing"),
    ),
    "it has an error that is a text": (
        refuses(400, b'{"error": "no such thing"}'),
        Told(400, "upstream_error", "no such thing"),
    ),
    "it has an error in HTML": (
        refuses(500, b"<html>Oops</html>", "text/html"),
        Told(500, "upstream_error", "the provider answered with status 500"),
    ),
    "it has an empty error": (refuses(403, b""), Told(403, "upstream_error", "status 403")),
    "it has an endless error": (
        says_and_hangs(b"HTTP/1.1 500 No\r\n\r\n", LONG, LONG),
        Told(500, "upstream_error", "status 500"),
    ),
    "it has an error that is cut off": (
        says(b'HTTP/1.1 500 No\r\ncontent-length: 99\r\n\r\n{"error": "half'),
        Told(500, "upstream_error", "status 500"),
    ),
    "it has a status of its own": (refuses(799, b"{}"), Told(502, "upstream_failed", "status 799")),
    "it refuses and repeats the key": (
        echoes_the_key,
        Told(401, "invalid_api_key", "Incorrect API key provided: *** We know *** and '***'."),
    ),
}
OF_WHOLE: dict[str, tuple[Behaviour, Told]] = {
    "it hangs in the body": (
        says_and_hangs(b'HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"id":'),
        Told(504, "stalled", "for 1 s"),
    ),
    "it closes in the body": (
        says(b'HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"id":'),
        BROKEN,
    ),
    "it closes in a body without length": (says(b'HTTP/1.1 200 OK\r\n\r\n{"id":'), SENSELESS),
    "it answers with HTML": (says(body(b"<html>Welcome!</html>", b"text/html")), SENSELESS),
    "it answers with no JSON": (says(body(b"{nonsense}")), SENSELESS),
    "it answers with a list": (says(body(b"[]")), SENSELESS),
    "it answers with nothing": (says(body(b"")), SENSELESS),
    "it answers without choices": (says(body(b'{"id": "far"}')), SENSELESS),
    "it answers with no UTF-8": (says(body(whole("é").replace(b"\\u00e9", b"\xe9"))), SENSELESS),
    "it answers too deeply": (says(body(b'{"a":' * 100_000)), SENSELESS),
    "it answers with an error": (says(body(json.dumps({"error": ERROR}).encode())), Told(502, "far_busy")),
    "it compresses unasked": (says(gzipped(whole())), WELL),
    "its length is its connection's": (says(b"HTTP/1.1 200 OK\r\n\r\n" + whole()), WELL),
}
ONE = chunked(chunk("one"))
BEGUN = "one"
OF_STREAM: dict[str, tuple[Behaviour, Told]] = {
    "it only keeps the connection alive": (says_and_hangs(HEAD, chunked(b": still here\n\n")), SLOW_START),
    "it hangs in the stream": (
        says_and_hangs(HEAD, ONE),
        Told(200, "stalled", "for 1 s", BEGUN),
    ),
    "it hangs in an event": (
        says_and_hangs(HEAD, ONE, chunked(b'data: {"choices": [')),
        Told(200, "stalled", "for 1 s", BEGUN),
    ),
    "it closes in the stream": (says(HEAD, ONE, b"5\r\nda"), Told(200, *BROKEN[1:3], BEGUN)),
    "it ends in an event": (
        says(HEAD, ONE, chunked(b'data: {"choices": ['), END),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "it ends without its end": (says(HEAD, ONE, END), Told(200, *CUT_OFF[1:3], BEGUN)),
    "no choice has an end": (says(HEAD, ONE, chunked(DONE), END), Told(200, *CUT_OFF[1:3], BEGUN)),
    "it ends at once": (says(HEAD, chunked(DONE), END), CUT_OFF),
    "it answers with HTML": (says(body(b"<html>Welcome!</html>", b"text/html")), CUT_OFF),
    "it has no event": (says(HEAD, END), CUT_OFF),
    "its first event is an error": (says(HEAD, chunked(event({"error": ERROR})), END), Told(502, "far_busy")),
    "a later event is an error": (
        says_and_hangs(HEAD, ONE, chunked(event({"error": ERROR}))),
        Told(200, "far_busy", "the far end is busy", BEGUN),
    ),
    "a later event is an immense error": (
        says_and_hangs(HEAD, ONE, chunked(event({"error": {**ERROR, "more": "x" * 100_000}}))),
        Told(200, "upstream_error", "status 502", BEGUN),
    ),
    "an event is no JSON": (
        says_and_hangs(HEAD, ONE, chunked(b"data: nonsense\n\n")),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "an event is a list": (
        says_and_hangs(HEAD, ONE, chunked(b"data: []\n\n")),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "its choices are none": (
        says_and_hangs(HEAD, ONE, chunked(event({"choices": {"a": 1}}))),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "an event is no UTF-8": (
        says_and_hangs(HEAD, ONE, chunked(b'data: {"id": "\xff"}\n\n')),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "a line never ends": (
        says_and_hangs(HEAD, ONE, *[chunked(b"data: " + LONG)] + [chunked(LONG)] * 90),
        Told(200, *SENSELESS[1:3], BEGUN),
    ),
    "it is cut up and has marks": (
        says(
            HEAD,
            *(
                chunked(bytes([byte]))
                for byte in b"\xef\xbb\xbf"
                + (chunk("all is ") + b": hello\n\n" + chunk("well", "stop") + DONE).replace(b"\n", b"\r\n")
            ),
            END,
        ),
        WELL,
    ),
    "an event has several lines": (
        says(
            HEAD,
            chunked(b'data: {"id": "far",\ndata: "choices": [{"index": 0, "finish_reason": "stop",\r\n'),
            chunked(b'data: "delta":\ndata: {"content": "all is well"}}]}\n\n' + DONE + END),
            END,
        ),
        WELL,
    ),
    "it forgets its [DONE]": (says(HEAD, chunked(chunk("all is well", "stop")), END), WELL),
    "its choice has a strange index": (
        says(
            HEAD,
            ONE,
            chunked(chunk("", choices=[{"index": [0], "finish_reason": "stop"}])),
            chunked(DONE),
            END,
        ),
        Told(200, *CUT_OFF[1:3], BEGUN),
    ),
    "its length is its connection's": (
        says(
            b"HTTP/1.1 200 OK\r\n\r\n",
            chunk("all is well", "stop"),
            usage(),
            b"data: [DONE]",
        ),
        WELL,
    ),
}


CASES = [
    pytest.param(stream, *case, id=f"{name}, {'streamed' if stream else 'whole'}")
    for stream, table in ((False, ALIKE | OF_WHOLE), (True, ALIKE | OF_STREAM))
    for name, case in table.items()
]


@asynccontextmanager
async def asking(
    *behaviours: Behaviour, tls: ssl.SSLContext | None = None, timeouts: ModelTimeouts = QUICK
) -> AsyncIterator[tuple[Provider, Deployment]]:
    """A provider that behaves so, then well, and a deployment whose model `near` is there."""
    async with (
        provider(*behaviours, tls=tls) as one,
        deployed(near_at(one.url, timeouts)) as near,
    ):
        yield one, near


def near_at(url: str, timeouts: ModelTimeouts = QUICK) -> UpstreamModel:
    """The model `near` of the provider at that URL."""
    return UpstreamModel(
        name="near", base_url=url, upstream_name="far", api_key=SecretStr(KEY), timeouts=timeouts
    )


async def outcome(near: Deployment, *, stream: bool) -> tuple[Told, dict[str, Any]]:
    """What the client of one request is told, and the error in it."""
    if stream:
        answer = await near.stream("hi", model="near")
        assert answer.complete
        assert answer.done == (answer.error is None)
        error = answer.error or {}
        return Told(answer.status, error.get("code"), error.get("message", ""), answer.text()), error
    response = await near.post(request("hi", model="near"))
    content = response.json()
    assert KEY not in f"{response.headers}{response.text}"
    error = content.get("error", {})
    text = content["choices"][0]["message"]["content"] if not error else "all is well"
    return Told(response.status_code, error.get("code"), error.get("message", ""), text), error


@pytest.mark.parametrize(("stream", "behaviour", "expected"), CASES)
async def test_whatever_a_provider_does_the_client_is_told(
    stream: bool, behaviour: Behaviour, expected: Told
) -> None:
    """The right status or event with the right words; after that the next request is answered, and of the
    connection of the first nothing is left."""
    asyncio.get_running_loop().set_debug(True)
    async with asking(behaviour) as (one, near):
        told, error = await outcome(near, stream=stream)
        assert (told.status, told.code) == (expected.status, expected.code), told
        assert expected.says in told.says
        if error and told.status == 200:
            assert told.text == expected.text
        elif not error:
            assert told.text == "all is well"
        assert not error or error.keys() == {"message", "type", "param", "code"}
        assert not any(KEY[at : at + 6] in json.dumps(error) for at in range(len(KEY) - 5))
        assert (await outcome(near, stream=stream))[0] == WELL
        await until(lambda: len(one.lines) == 1, AT_ONCE_S)
        assert KEY not in (await near.http.get("/metrics")).text


# ---- before there is a connection ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1"])
async def test_a_provider_that_is_not_there_is_a_502(url: str, stream: bool) -> None:
    """No address and nobody at the address are told alike, and nothing of where that is."""
    async with deployed(near_at(url, ModelTimeouts(upstream_connect_s=20))) as near:
        told, error = await outcome(near, stream=stream)
        assert (told.status, told.code, told.says) == UNREACHABLE[:3]
        assert error["type"] == "server_error"


async def test_a_provider_that_does_not_finish_a_handshake_is_a_504() -> None:
    """The time for a connection includes the handshake of TLS."""
    async with provider(hangs_at_once) as one:
        url = one.url.replace("http:", "https:")
        async with deployed(near_at(url, ModelTimeouts(upstream_connect_s=1.0))) as near:
            told, _ = await outcome(near, stream=False)
            assert told[:3] == (504, "upstream_timeout", "the provider could not be connected to within 1 s")
        await until(lambda: not one.lines, AT_ONCE_S)


async def test_a_provider_without_a_trusted_certificate_is_not_spoken_to(tmp_path: Path) -> None:
    """What anybody can sign proves nothing: the key is not sent."""
    async with asking(tls=self_signed(tmp_path)) as (one, near):
        told, _ = await outcome(near, stream=False)
        assert told[:3] == UNREACHABLE[:3]
        assert one.asked == []


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither requests nor keys take another way than the configuration's."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with asking() as (_, near):
        assert (await outcome(near, stream=False))[0] == WELL


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's end of TLS, with a certificate for this machine that nobody trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    return context


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_provider_that_takes_nothing_holds_nobody_up(leaves: bool) -> None:
    """What a provider does not read of a long request keeps neither its client waiting nor the router from
    ending."""

    async def reads_nothing(line: Line) -> None:
        cast("asyncio.Transport", line.writer.transport).pause_reading()
        await over.wait()

    over = asyncio.Event()
    body = request("x" * 30_000_000, model="near")
    limits = Limits(body_bytes=32 * 2**20)
    async with provider(reads_nothing) as one, deployed(near_at(one.url), limits=limits) as near:
        wire = await near.dial()
        wire.post(body)
        await until(lambda: one.lines)
        if leaves:
            wire.leave()
        else:
            assert await wire.head() == 504
        await until(near.idle, AT_ONCE_S)
        await soon(near.application.close())
        over.set()


# ---- limits -------------------------------------------------------------------------------------------


async def test_an_immense_answer_is_refused() -> None:
    """A whole answer has a largest size, and more of it is not even taken."""
    async with asking(endless) as (one, near):
        told, _ = await outcome(near, stream=False)
        assert (told.status, told.code) == (502, "upstream_failed")
        assert f"longer than {MAX_ANSWER} bytes" in told.says
        await until(lambda: not one.lines, AT_ONCE_S)


async def test_an_endless_stream_is_ended_after_total_s() -> None:
    """However steadily it comes, an answer has an end."""
    timeouts = ModelTimeouts(total_s=1.0)
    async with asking(babbles, timeouts=timeouts) as (one, near):
        told, _ = await outcome(near, stream=True)
        assert told[:3] == (200, "total_timeout", "the answer was not complete within 1 s")
        await until(lambda: not one.lines, AT_ONCE_S)


async def endless(line: Line) -> None:
    """Answers with spaces, for ever."""
    await line.asked()
    await line.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await line.send(b" " * 2**20)


async def babbles(line: Line) -> None:
    """Streams one word, for ever."""
    await line.asked()
    await line.stream()
    while True:
        await line.send(chunked(chunk("and ")))
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "relayed"),
    [
        ({"retry_after": "7"}, {"retry-after": "7"}),
        ({"retry_after": "1.5", "retry_after_ms": "1500"}, {"retry-after": "1.5", "retry-after-ms": "1500"}),
        (
            {"retry_after": "Fri, 31 Dec 1999 23:59:59 GMT"},
            {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"},
        ),
        ({"retry_after": "in a while"}, {}),
        ({"set_cookie": "id=7", "x_ratelimit_remaining": "0"}, {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_when_to_try_again_is_the_providers_word(
    stream: bool, sent: dict[str, str], relayed: dict[str, str]
) -> None:
    """Of a refusal's headers those that say when to try again come through, as they were, and no other."""
    refusal = refuses(429, json.dumps({"error": ERROR}).encode(), **sent)
    async with asking(refusal) as (_, near):
        response = await near.post(request("hi", model="near", stream=stream))
        assert (response.status_code, response.json()["error"]) == (429, ERROR)
        ours = {"content-length", "content-type", "x-request-id", "date"}
        assert {name: value for name, value in response.headers.items() if name not in ours} == relayed


# ---- leaving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        hangs_at_once,
        says_and_hangs(),
        says_and_hangs(HEAD),
        says_and_hangs(HEAD, ONE),
        says_and_hangs(b"HTTP/1.1 500 No\r\ncontent-length: 99\r\n\r\nhalf"),
    ],
)
async def test_a_client_that_leaves_a_provider_that_hangs_ends_the_call(
    stream: bool, behaviour: Behaviour
) -> None:
    """Wherever the provider hangs, its connection is closed as soon as the client is gone."""
    async with asking(behaviour, timeouts=ModelTimeouts()) as (one, near):
        wire = await near.open("hi", model="near", stream=stream)
        await until(lambda: one.lines)
        if behaviour is not hangs_at_once:
            await until(lambda: one.asked)
        wire.leave()
        await until(lambda: not one.lines and near.idle(), AT_ONCE_S)
        assert near.metric("trunkline_requests_total", outcome="cancelled", status="499") == 1


async def test_a_client_that_leaves_during_a_handshake_ends_it() -> None:
    """So it is where there is no connection yet."""
    async with provider(hangs_at_once) as one:
        url = one.url.replace("http:", "https:")
        async with deployed(near_at(url, ModelTimeouts())) as near:
            wire = await near.open("hi", model="near")
            await until(lambda: one.lines)
            wire.leave()
            await until(lambda: not one.lines and near.idle(), AT_ONCE_S)


# ---- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_no_exception_tells_a_key(stream: bool) -> None:
    """Whatever a provider does, no error that comes of it, nor one behind it, has the key in its text."""
    behaviours = [behaviour for behaviour, told in ALIKE.values() if told is not SLOW_START]
    async with provider(*behaviours) as one, deployed(near_at(one.url)) as near:
        model = near.model("near")
        data = request("hi", model="near", stream=stream)
        for _ in behaviours:
            job = Job("id", read_chat(data, model.settings, "chatcmpl-id", "near", 0), data)
            backend = Upstream(near_at(one.url))
            with pytest.raises(ApiError) as caught:
                await read(backend, job)
            await backend.close()
            assert caught.value.__context__ is None
            told = "".join(traceback.format_exception(caught.value, chain=True))
            assert KEY not in f"{told}{caught.value!r}{vars(caught.value)}{job!r}{model!r}"


async def read(backend: Upstream, job: Job) -> None:
    """Ask, and read what comes first."""
    with closing(await backend.generate(job, 1.0, lambda _: None)) as stream:
        await stream.read()
