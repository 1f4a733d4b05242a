"""How likely one choice's tokens were, as JSON that gathers until it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from serving.answers import to_json
from serving.engine import Logprob, TokenLogprobs

LEAST = -9999.0
"""Stands for the logprob of what cannot be, as JSON has no infinity."""


class ChatLogprobs:
    """The logprobs of a chat completion: an entry for each token."""

    def __init__(self) -> None:
        self._entries: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, logprobs: Sequence[TokenLogprobs]) -> int:
        """Returns how many bytes they are."""
        if not logprobs:
            return 0
        entries = to_json([_entry(each) for each in logprobs])[1:-1]
        self._entries.append(entries)
        return len(entries)

    def take(self) -> msgspec.Raw:
        """All that were added since they were last taken."""
        entries, self._entries = self._entries, []
        return msgspec.Raw(b'{"content":[%b],"refusal":null}' % b",".join(entries))


class TextLogprobs:
    """The logprobs of a text completion: a column for each kind of thing that is told of a token."""

    def __init__(self) -> None:
        self._columns: dict[str, list[bytes]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        self._offset = 0

    def __bool__(self) -> bool:
        return bool(self._columns["tokens"])

    def copy(self) -> TextLogprobs:
        """The same so far; what is added to one of the two is not to the other."""
        other = TextLogprobs()
        other._columns = {name: list(pieces) for name, pieces in self._columns.items()}
        other._offset = self._offset
        return other

    def begin(self, token: str) -> int:
        """Add a token that nothing precedes, so that nobody can tell how likely it was. Returns how many
        bytes it is."""
        return self._extend([token], [None], [None])

    def add(self, logprobs: Sequence[TokenLogprobs]) -> int:
        """Returns how many bytes they are."""
        if not logprobs:
            return 0
        return self._extend(
            [each.chosen.token for each in logprobs],
            [_finite(each.chosen) for each in logprobs],
            [{token.token: _finite(token) for token in (*each.likeliest, each.chosen)} for each in logprobs],
        )

    def take(self) -> msgspec.Raw:
        """All that were added since they were last taken."""
        columns = b",".join(self._take_columns())
        return msgspec.Raw(b"{%b}" % columns)

    def _take_columns(self) -> Iterator[bytes]:
        for name, pieces in self._columns.items():
            yield b'"%b":[%b]' % (name.encode(), b",".join(pieces))
            pieces.clear()

    def _extend(self, tokens: list[str], logprobs: list[Any], likeliest: list[Any]) -> int:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        pieces = [to_json(values)[1:-1] for values in (tokens, logprobs, likeliest, offsets)]
        for column, piece in zip(self._columns.values(), pieces, strict=True):
            column.append(piece)
        return sum(map(len, pieces))


def _entry(logprobs: TokenLogprobs) -> dict[str, Any]:
    return {
        **_told(logprobs.chosen),
        "top_logprobs": [_told(token) for token in logprobs.likeliest],
    }


def _told(token: Logprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _finite(token), "bytes": list(token.token.encode())}


def _finite(token: Logprob) -> float:
    return max(LEAST, token.logprob)
