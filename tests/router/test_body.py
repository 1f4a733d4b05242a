"""How a request for tokens is read, and what becomes of the connection when it cannot be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from router.settings import Limits, Timeouts
from tests.harness import Deployment, deployed, echo_engine, request, served
from tests.waiting import soon
from tests.wire import Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 100_000
PATH = "/v1/chat/completions"
PATHS = [PATH, "/v1/completions"]
JSON = {"content-type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    """One echo model behind a small body limit and a short body time-out."""
    limits, timeouts = Limits(body_bytes=LIMIT), Timeouts(body_s=0.5)
    async with deployed(served(echo_engine()), limits=limits, timeouts=timeouts) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def undisturbed(deployment: Deployment) -> AsyncIterator[None]:
    """Whatever a request was, the next client is answered."""
    yield
    assert (await deployment.ask("still here", max_tokens=2))["choices"][0]["message"][
        "content"
    ] == "still here"


def refused(response: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal."""
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    return str(error["message"])


def sized(size: int, path: str = PATH) -> bytes:
    """A good request of that many bytes."""

    def body(text: str) -> bytes:
        chat = request(text, max_tokens=1)
        return json.dumps(chat if path == PATH else {"model": "echo", "prompt": text}).encode()

    return body("x" * (size - len(body(""))))


async def in_chunks(content: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    """A body whose length is not told beforehand."""
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


# ---- its type and its form ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON ;x", "application/json;"],
)
async def test_a_body_says_that_it_is_json(deployment: Deployment, content_type: str, path: str) -> None:
    """Any way of writing the media type of JSON is taken, with parameters or without."""
    headers = {"content-type": content_type}
    response = await deployment.http.post(path, content=sized(500, path), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonl", "", "json"]
)
async def test_a_body_of_another_type_is_refused(
    deployment: Deployment, content_type: str | None, path: str
) -> None:
    """Anything else is a 415 that says what was sent and what is expected."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = await deployment.http.post(path, content=sized(500, path), headers=headers)
    message = refused(response, 415, "unsupported_media_type")
    assert message.startswith("content-type must be application/json")
    assert not content_type or f'"{content_type}"' in message


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b'{"model": "echo"', b"\xff\xfe", b'{"a": NaN}', b"[" * 50_000]
)
async def test_a_body_that_is_not_json_is_refused(deployment: Deployment, body: bytes, path: str) -> None:
    """Whatever its bytes, it is a 400 in the envelope."""
    refused(await deployment.http.post(path, content=body, headers=JSON), 400, "invalid_json")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ["null", "[]", '"text"', "1"])
async def test_a_body_that_is_no_object_is_refused(deployment: Deployment, body: str, path: str) -> None:
    """JSON that is not an object is a 400 that says so."""
    message = refused(await deployment.http.post(path, content=body, headers=JSON), 400, "invalid_value")
    assert "must be a JSON object" in message


# ---- its size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_may_be_as_long_as_the_limit(deployment: Deployment, path: str) -> None:
    """Exactly body_bytes are taken, one more is not, whether the length is told or not."""
    for excess, status in ((0, 200), (1, 413)):
        body = sized(LIMIT + excess, path)
        content: Iterable[Any] | Any
        for content in (body, in_chunks(body)):
            response = await deployment.http.post(path, content=content, headers=JSON)
            assert response.status_code == status


@pytest.mark.parametrize("megabytes", [1, 20])
@pytest.mark.parametrize("told", [True, False])
async def test_a_client_that_sends_too_much_is_told_so(
    deployment: Deployment, megabytes: int, told: bool
) -> None:
    """A client that reads only after it has sent everything gets its 413, however much that was, and may use
    its connection again."""
    body = b"x" * (megabytes * 2**20)
    for _ in range(2):
        response = await deployment.http.post(
            PATH, content=body if told else in_chunks(body, 2**16), headers=JSON
        )
        assert f"longer than {LIMIT} bytes" in refused(response, 413, "body_too_large")


async def test_a_length_that_is_too_long_is_refused_before_the_body(deployment: Deployment) -> None:
    """A client that asks first whether to send is told no without sending."""
    wire = await deployment.dial()
    wire.send(
        f"POST {PATH} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {LIMIT + 1}\r\nexpect: 100-continue\r\n\r\n".encode()
    )
    assert json.loads(await wire.body())["error"]["code"] == "body_too_large"
    assert wire.status == 413


async def test_a_client_that_asks_first_is_told_to_go_on(deployment: Deployment) -> None:
    """A body of good length is asked for."""
    body = sized(500)
    wire = await deployment.dial()
    wire.send(
        f"POST {PATH} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n".encode()
    )
    assert await wire.head() == 100
    wire.status = 0
    wire.send(body)
    await wire.body()
    assert wire.status == 200


# ---- its time -----------------------------------------------------------------------------------------


async def test_a_body_that_does_not_come_is_given_up(deployment: Deployment) -> None:
    """After body_s the client is told, and its connection is closed: what it sends next is no request."""
    body = sized(500)
    wire = await deployment.dial()
    wire.post_head(len(body))
    wire.send(body[:-1])
    assert "0.5 s" in json.loads(await wire.body())["error"]["message"]
    assert (wire.status, wire.headers["connection"]) == (408, "close")
    assert await wire.closed()


async def test_a_body_may_come_in_many_pieces(deployment: Deployment) -> None:
    """A body that trickles in byte by byte, but in time, is the request that it spells."""
    body = sized(200)
    wire = await deployment.dial()
    wire.post_head(len(body))
    for at in range(len(body)):
        wire.send(body[at : at + 1])
        await asyncio.sleep(0)
    await wire.body()
    assert wire.status == 200


# ---- the connection -----------------------------------------------------------------------------------


async def answers(wire: Wire, count: int) -> list[int]:
    """The statuses of the next answers on one connection."""
    statuses = []
    for _ in range(count):
        await wire.body()
        statuses.append(wire.status)
        wire.status = 0
    return statuses


async def test_a_refusal_does_not_cost_the_connection(deployment: Deployment) -> None:
    """After a refused request the next one on the same connection is answered, also where the refused body
    was not read."""
    wire = await deployment.dial()
    good = sized(300)
    for bad, head in ((b"{", JSON["content-type"]), (b"x" * 50_000, "text/plain"), (b"x" * 2 * LIMIT, "a/b")):
        wire.post_head(len(bad), head)
        wire.send(bad)
        wire.post_head(len(good))
        wire.send(good)
    assert await answers(wire, 6) == [400, 200, 415, 200, 415, 200]


async def test_requests_in_one_packet_are_answered_one_by_one(deployment: Deployment) -> None:
    """A client may send its next request before it has the answer to the one before."""
    wire = await deployment.dial()
    for words in range(1, 6):
        wire.post(request("one two three four five", max_tokens=words))
    bodies = [await next_body(wire) for _ in range(5)]
    contents = [body["choices"][0]["message"]["content"] for body in bodies]
    assert contents == ["one", "one two", "one two three", "one two three four", "one two three four five"]


async def next_body(wire: Wire) -> dict[str, Any]:
    """The next answer on a connection."""
    body: dict[str, Any] = json.loads(await soon(wire.body()))
    wire.status = 0
    return body
