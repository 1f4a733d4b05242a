"""All requests of a filter as one document, piece by piece: a reader may take as long as it likes."""

from __future__ import annotations

import csv
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from io import StringIO
from typing import Any, NamedTuple

from router.accounts.answers import REQUEST_FIELDS, request
from router.accounts.usage import Record

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell must not begin with: a spreadsheet would run what a client has called itself."""

Records = AsyncIterator[Sequence[Record]]


class Format(NamedTuple):
    """A form of the document."""

    write: Callable[[Records], AsyncIterator[bytes]]
    media_type: str
    name: str
    """What a browser calls the file."""


async def as_csv(chunks: Records) -> AsyncIterator[bytes]:
    """A line of titles, and one for each request."""
    yield _lines([REQUEST_FIELDS])
    async for records in chunks:
        yield _lines([_cell(value) for value in request(record).values()] for record in records)


async def as_json(chunks: Records) -> AsyncIterator[bytes]:
    """What GET /api/requests answers, as if it were one page."""
    before = '{"data":[\n'
    async for records in chunks:
        rows = [json.dumps(request(record), separators=(",", ":")) for record in records]
        yield (before + ",\n".join(rows)).encode()
        before = ",\n"
    yield (before if before != ",\n" else "").encode() + b'\n],"next":null}\n'


FORMATS = {
    "csv": Format(as_csv, "text/csv; charset=utf-8", "requests.csv"),
    "json": Format(as_json, "application/json", "requests.json"),
}


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """The value; of a text, nothing that a spreadsheet takes for more than a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
