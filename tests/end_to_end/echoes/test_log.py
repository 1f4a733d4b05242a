from __future__ import annotations

import re
from typing import Any

import pytest

from tests.end_to_end.client import chat
from tests.end_to_end.echoes import ALIAS, ECHO
from tests.end_to_end.server import Server, http

CHAT = "/v1/chat/completions"
PRIVATE = "xyzzy-7291"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, chat(ECHO, "hi")),
        ("POST", CHAT, chat(ECHO, "hi", stream=True)),
        ("POST", CHAT, chat("nobody", "hi")),
        ("POST", CHAT, chat(ECHO, "hi", n=0)),
        ("POST", CHAT, {}),
        ("GET", CHAT, None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/nobody", None),
        ("GET", "/metrics", None),
        ("GET", "/health", None),
        ("GET", "/-/healthz", None),
        ("GET", "/-/routes", None),
        ("GET", "/nothing", None),
    ],
)
def test_every_answer_has_a_request_id(server: Server, method: str, path: str, body: Any) -> None:
    """Every answer, also of an error, has an x-request-id: the caller's own where it is fit to be one,
    otherwise a new one each time."""
    with http(server) as client:
        ids = [
            client.request(method, path, json=body, headers=headers).headers.get_list("x-request-id")
            for headers in ({"x-request-id": "caller.s_Own-1"}, {"x-request-id": "no spaces"}, {}, {})
        ]
    assert ids[0] == ["caller.s_Own-1"]
    assert all(len(given) == 1 and re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given[0]) for given in ids)
    assert len({given[0] for given in ids}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_line_in_the_log(server: Server, stream: bool) -> None:
    """A request leaves one line in the log, with what it was and what became of it."""
    name = f"logged-{stream}"
    with http(server) as client:
        client.post(CHAT, json=chat(ALIAS, "a b c", stream=stream), headers={"x-request-id": name})
    line = server.request(name)
    (replica,) = server.replicas(ECHO)
    expected = {
        "level": "info",
        "path": CHAT,
        "model": ALIAS,
        "stream": stream,
        "status": 200,
        "outcome": "completed",
        "error": None,
        "replica": replica,
        "prompt_tokens": 3,
        "completion_tokens": 24,
    }
    assert expected.items() <= line.items()
    assert 0 < line["ttfb_ms"] <= line["duration_ms"]
    assert line["timestamp"].endswith("Z")


def test_a_refused_request_is_a_line_too(server: Server) -> None:
    """A request that was turned away is in the log with its status and the error's code."""
    with http(server) as client:
        client.post(CHAT, json=chat("nobody", "hi"), headers={"x-request-id": "logged-refused"})
    line = server.request("logged-refused")
    assert (line["status"], line["outcome"], line["error"]) == (404, "refused", "model_not_found")


def test_no_log_has_what_a_client_said(server: Server) -> None:
    """Neither a prompt nor its answer is in any log: not in ours, not in Ray's, whether the request was good
    or bad."""
    with http(server) as client:
        bodies = [chat(ECHO, PRIVATE), chat(ECHO, PRIVATE, n=0), chat(PRIVATE, PRIVATE, stream=True)]
        for number, body in enumerate(bodies):
            headers = {"x-request-id": f"private-{number}", "authorization": f"Bearer {PRIVATE}"}
            client.post(CHAT, json=body, headers=headers)
        client.post(CHAT, content=b'{"messages": "' + PRIVATE.encode())
    assert [server.request(f"private-{number}")["status"] for number in range(3)] == [200, 400, 404]
    files = server.log_files()
    assert len(files) > 10
    assert [path for path in files if PRIVATE.encode() in path.read_bytes()] == []
    assert PRIVATE not in server.said
