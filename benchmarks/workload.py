"""What is asked: one chat completion request, in bytes, over and over."""

from __future__ import annotations

import json
from dataclasses import dataclass

from benchmarks.client import Target

KEY = "tk-" + "benchmark0" * 4
"""What every request is sent with. Trunkline is started with this key; others do not look at it."""

# So many digits that the request's length does not depend on its number.
_NUMBER = "00000000"


@dataclass(frozen=True, slots=True)
class Workload:
    """The request that every stream sends, at temperature 0.

    The prompt begins with the request's own number: no two requests share a prefix that a cache could keep.
    """

    model: str
    prompt: str
    max_tokens: int
    whole: bool = False
    """Ask for one JSON body in place of a stream."""
    ignore_eos: bool = False
    """Generate until max_tokens, whatever the model says."""

    def requests(self, target: Target) -> Requests:
        """The requests of this workload to that server."""
        body = json.dumps(self._body()).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target.authority}\r\n"
            f"authorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        before, after = (head.encode() + body).split(_NUMBER.encode(), 1)
        return Requests(before, after)

    def _body(self) -> dict[str, object]:
        body: dict[str, object] = {  # the messages come first: the first number in the bytes is theirs
            "messages": [{"role": "user", "content": f"{_NUMBER} {self.prompt}"}],
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        if not self.whole:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


@dataclass(frozen=True, slots=True)
class Requests:
    """Serialised requests that differ in their number only."""

    before: bytes
    after: bytes

    def __getitem__(self, number: int) -> bytes:
        """The whole HTTP request `number`, 0..99,999,999."""
        return b"%b%08d%b" % (self.before, number, self.after)
