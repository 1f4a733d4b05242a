"""What a client was told of one request: all that the ledger can be held to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from router.accounts.row import Row
from tests.end_to_end.accounts.office import price
from tests.end_to_end.client import Exchange, asking
from tests.end_to_end.server import Server

STREAM = {"stream": True, "stream_options": {"include_usage": True}}

Body = dict[str, Any]


class Told(NamedTuple):
    """One request, and what came back."""

    name: str
    """Its x-request-id."""
    body: Body | str
    status: int
    """0 where nothing came."""
    code: str
    """Of the error, if there was one."""
    complete: bool
    """Whether all of the answer came: the whole of it, or [DONE]."""
    left: bool
    """Whether the client has left before."""
    completion_tokens: int
    """As the answer says; of one that does not, its words, of which each is a token."""

    @property
    def begun(self) -> bool:
        """Whether any of an answer came."""
        return self.status == 200

    @property
    def most(self) -> int:
        """Tokens that may have been generated at most."""
        assert isinstance(self.body, dict)
        prompts = self.body.get("prompt")
        texts = len(prompts) if isinstance(prompts, list) else 1
        return int(self.body["max_tokens"]) * int(self.body.get("n", 1)) * texts

    @property
    def prompt_tokens(self) -> int:
        """What the echo engine counts: words."""
        assert isinstance(self.body, dict)
        if "prompt" in self.body:
            prompts = self.body["prompt"]
            return sum(len(text.split()) for text in ([prompts] if isinstance(prompts, str) else prompts))
        return sum(len(message["content"].split()) for message in self.body["messages"])


async def hear(
    server: Server,
    body: Body | str,
    headers: dict[str, str],
    until: Callable[[Exchange], bool] | None = None,
) -> Told:
    """Ask, and hear what comes, to its end or `until` it is enough. Wherever the connection breaks, what came
    before counts."""
    exchange: Exchange | None = None
    left = False
    with suppress(OSError):
        async with asking(server, body, headers) as exchange:
            await exchange.first()
            while not (left := until is not None and until(exchange)) and not exchange.ended.done():
                await exchange.more()
            if not left:
                await exchange.end()
    return _told(headers["x-request-id"], body, exchange, left=left)


def words(exchange: Exchange) -> int:
    """Tokens of the echo engine in what has come of a stream."""
    parts = [part for chunk in exchange.chunks for part in chunk.get("choices", ())]
    said = [part["text"] if "text" in part else part["delta"].get("content") or "" for part in parts]
    return sum(len(text.split()) for text in said)


def _told(name: str, body: Body | str, exchange: Exchange | None, *, left: bool) -> Told:
    if exchange is None or not exchange.status:
        return Told(name, body, 0, "", complete=False, left=left, completion_tokens=0)
    cut_off = left or not exchange.ended.done() or exchange.ended.exception() is not None
    if not exchange.headers["content-type"].startswith("text/event-stream"):
        return _told_at_once(name, body, exchange, cut_off=cut_off, left=left)
    last = exchange.chunks[-1] if exchange.chunks else {}
    code = last["error"]["code"] if "error" in last else ""
    usage = last.get("usage")
    tokens = usage["completion_tokens"] if usage else words(exchange)
    return Told(name, body, 200, code, exchange.done and not left, left, tokens)


def _told_at_once(name: str, body: Body | str, exchange: Exchange, *, cut_off: bool, left: bool) -> Told:
    if cut_off:
        return Told(name, body, exchange.status, "", complete=False, left=left, completion_tokens=0)
    if exchange.status != 200:
        error = exchange.error
        code = error["code"] or error["type"]
        return Told(name, body, exchange.status, code, complete=True, left=False, completion_tokens=0)
    tokens = exchange.usage["completion_tokens"]
    told = Told(name, body, 200, "", complete=True, left=False, completion_tokens=tokens)
    assert exchange.usage["prompt_tokens"] == told.prompt_tokens
    return told


def assert_kept(row: Row, told: Told) -> None:
    """The ledger says of a request that was answered to its end what its client was told."""
    assert told.complete
    if not told.begun:
        assert (row.outcome, row.status, row.error) == ("refused", told.status, told.code)
        assert (row.prompt_tokens, row.completion_tokens, row.price_nano) == (0, 0, 0)
        return
    assert isinstance(told.body, dict)
    assert (row.outcome, row.status, row.error) == ("completed", 200, ""), told
    assert (row.prompt_tokens, row.completion_tokens) == (told.prompt_tokens, told.completion_tokens), told
    assert row.price_nano == price(row.model, row.prompt_tokens, row.completion_tokens)
    assert (row.model, row.stream) == (told.body["model"], told.body.get("stream", False))
    assert row.path == ("/v1/completions" if "prompt" in told.body else "/v1/chat/completions")
    assert row.first_us is not None
    assert row.duration_us is not None
    assert 0 < row.first_us <= row.duration_us
