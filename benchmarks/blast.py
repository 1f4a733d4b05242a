"""A server that does nothing but send prepared bytes, to measure what the load generator itself costs.

`python -m benchmarks.blast --port 8099 --chunks 128`, then the generator with `--max-tokens 128` against it.
Any request gets the same stream, each chunk in a write of its own; all streams take turns, as an engine's do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from functools import partial

import uvloop

_BACKLOG = 4096
"""Connections that may wait to be accepted; where more begin at once, the rest try again after a second."""


def _event(payload: object) -> bytes:
    data = b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    head = {"id": f"chatcmpl-{'0' * 32}", "object": "chat.completion.chunk", "created": 0, "model": "blast"}
    return _event({**head, "choices": [choice]})


def answer(chunks: int) -> list[bytes]:
    """The writes that make one answer of so many chunks, HTTP head and all."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    usage = {"prompt_tokens": 1, "completion_tokens": chunks, "total_tokens": chunks + 1}
    done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    return [
        head + _chunk({"role": "assistant", "content": ""}),
        *(_chunk({"content": " word"}) for _ in range(chunks)),
        _chunk({}, "length") + _event({"choices": [], "usage": usage}) + done,
    ]


async def _serve(
    writes: list[bytes], interval: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while True:
            await _read_request(reader)
            writer.write(writes[0])
            for write in writes[1:]:
                await asyncio.sleep(interval)
                writer.write(write)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has left
    finally:
        writer.close()


async def _read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head.lower())
    await reader.readexactly(int(length[1]) if length else 0)


async def _main(port: int, chunks: int, interval: float) -> None:
    serve = partial(_serve, answer(chunks), interval)
    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=_BACKLOG)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blast", description=__doc__)
    parser.add_argument("--port", type=int, default=8099, help="on 127.0.0.1 (%(default)s)")
    parser.add_argument("--chunks", type=int, default=128, help="with text in each stream (%(default)s)")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between two (%(default)s)")
    options = parser.parse_args()
    uvloop.run(_main(options.port, options.chunks, options.interval))
