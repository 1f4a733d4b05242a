"""Server-sent events, however their bytes come."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sse import EventReader

LIMIT = 1000


def read(*pieces: bytes, ended: bool = True) -> list[bytes]:
    """The events in these pieces of a stream."""
    reader = EventReader(LIMIT)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return events + (reader.end() if ended else [])


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: one\n\ndata: two\n\n", [b"one", b"two"]),
        (b"data:one\r\n\r\ndata:  two\r\r", [b"one", b" two"]),
        (b"\xef\xbb\xbfdata: after a mark\n\n", [b"after a mark"]),
        (b": a comment\n\n:\n\ndata: one\n\n", [b"one"]),
        (b"data: a\n: in between\ndata: b\ndata\ndata: c\n\n", [b"a\nb\n\nc"]),
        (b"event: x\nid: 7\nretry: 9\ndata: one\n\n", [b"one"]),
        (b"event: x\n\ndata:\n\ndata: \n\n", []),
        (b"dataa: no\n data: no\nDATA: no\n\n", []),
        (b"data: without its end", [b"without its end"]),
        (b"data: without its blank line\r", [b"without its blank line"]),
        (b"data: two\n\xef\xbb\xbfdata: marks\n\n", [b"two"]),
        (b"", []),
    ],
)
def test_an_event_is_its_data(stream: bytes, events: list[bytes]) -> None:
    """Lines end as they like, comments and other fields are left out, and the last event counts where its end
    is missing."""
    assert read(stream) == events


def test_an_event_is_told_when_it_is_complete() -> None:
    """An event waits for nothing that comes after it, not even for the second half of a line's end."""
    assert read(b"data: one\r\n\r", ended=False) == [b"one"]
    assert read(b"data: one\n", ended=False) == []


PIECES = [
    b"data: ",
    b"data:",
    b"data",
    b"x",
    b"\n",
    b"\r",
    b"\r\n",
    b":",
    b"\xef\xbb\xbf",
    b"event: y",
    b"\n\n",
    b" ",
]
streams = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)


@given(streams, st.lists(st.integers(0, 80), max_size=8))
def test_where_it_is_cut_makes_no_difference(stream: bytes, cuts: list[int]) -> None:
    """A stream has the same events whether it comes at once or cut up anywhere."""
    ends = [0, *sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(ends)]
    assert read(*pieces) == read(stream)


@given(streams)
def test_the_events_are_those_of_the_standard(stream: bytes) -> None:
    """They are what the standard's own words make of the stream."""
    lines = re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf") + b"\n\n")
    expected: list[bytes] = []
    data: list[bytes] = []
    for line in lines:
        field, _, value = line.partition(b":")
        if not line:
            expected += [b"\n".join(data)] if b"".join(data) or len(data) > 1 else []
            data = []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
    assert read(stream) == expected


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: x\n" * 20, b": x" * 50])
def test_an_endless_event_is_refused(piece: bytes) -> None:
    """What never ends does not gather for ever, be it one line or many."""
    reader = EventReader(LIMIT)
    with pytest.raises(ValueError, match="1000 bytes"):
        list(map(reader.feed, [piece] * 20))
