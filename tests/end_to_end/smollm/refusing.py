"""A provider that answers as it is asked to: with a status, in its own time, or not to the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

LATE_S = 3.0
"""Seconds until it answers those that ask for that."""

BEGUN = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Par"}}]}\n\n'


class Handler(BaseHTTPRequestHandler):
    """One request: the `user` in its body is the status that it is answered with, `late` or `begun`."""

    def do_POST(self) -> None:
        """Answer as asked."""
        wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))["user"]
        if wanted == "late":
            time.sleep(LATE_S)
        if wanted == "begun":
            self._answer(200, "text/event-stream", BEGUN)
        elif wanted.isdigit():
            error = {"message": f"{wanted} it is", "type": "of_theirs", "param": "user", "code": "asked_for"}
            self._answer(int(wanted), "application/json", json.dumps({"error": error}).encode())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def refusing() -> Iterator[str]:
    """Its address, while it listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
