from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import messages
from serving.messages import FrameReader, FrameTooLong, Sampling, decode_to_replica, decode_to_router, encode

integers = st.integers(-(2**63), 2**63 - 1)  # those that MessagePack has
numbers = st.floats(allow_nan=False)
streams = st.integers(0, 2**63 - 1)
data = st.binary(max_size=300)

texts = st.none() | st.text()


def several(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """A few of them, as messages hold them."""
    return st.lists(of, max_size=3).map(tuple)


samplings = st.builds(
    Sampling,
    max_tokens=integers,
    temperature=numbers,
    logit_bias=st.dictionaries(integers, numbers, max_size=3),
    n=integers,
    seed=st.none() | integers,
    stop=several(st.text()),
    ignore_eos=st.booleans(),
    stop_token_ids=several(integers),
)
chats = st.builds(
    messages.Chat,
    id=st.text(),
    model=st.text(),
    created=integers,
    messages=several(
        st.builds(
            messages.Message,
            st.sampled_from(["system", "user", "tool"]),
            texts,
            texts,
            several(st.builds(messages.ToolCall, st.text(), st.text(), st.text())),
            texts,
        )
    ),
    sampling=samplings,
    stream=st.booleans(),
    include_usage=st.booleans(),
    logprobs=st.none() | integers,
    response_format=st.none() | st.builds(messages.ResponseFormat, texts),
    tools=several(st.builds(messages.Tool, st.text(), texts, texts, st.none() | st.booleans())),
    tool_choice=st.sampled_from(["none", "auto", "required"]) | st.builds(messages.NamedTool, st.text()),
)
text_completions = st.builds(
    messages.Text,
    id=st.text(),
    model=st.text(),
    created=integers,
    prompts=several(st.text() | several(integers)),
    sampling=samplings,
    echo=st.booleans(),
    logprobs=st.none() | integers,
)
to_replica = st.one_of(
    st.builds(messages.Submit, streams, chats | text_completions),
    st.builds(messages.Cancel, streams),
    st.builds(messages.Hello, st.text(), data, data),
    st.just(messages.Ping()),
)

usages = st.builds(messages.Usage, integers, integers, integers, integers)
events = st.one_of(
    st.builds(messages.Accepted, streams, integers),
    st.builds(messages.Refused, streams, integers, st.text(), st.none() | st.text(), st.none() | st.text()),
    st.builds(messages.Chunk, streams, data, integers),
    st.builds(messages.Ended, streams, data, integers, usages, st.booleans()),
)
loads = st.none() | st.builds(messages.Load, integers, integers, numbers)
to_router = st.one_of(
    st.builds(messages.Frame, st.lists(events, max_size=5), loads),
    st.just(messages.Draining()),
    st.just(messages.Ping()),
    st.builds(messages.Challenge, integers, data),
    st.builds(messages.Welcome, data, st.text(), integers),
)


def torn(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[begin:end] for begin, end in pairwise(places)]


@given(st.lists(to_router, max_size=6), st.lists(st.integers(0, 10**6), max_size=20))
def test_messages_to_a_router_arrive_whole_and_in_order_wherever_the_stream_is_torn(
    sent: list[messages.ToRouter], cuts: list[int]
) -> None:
    """Any sequence of messages to a router, cut at any places, arrives whole and in order."""
    reader = FrameReader(messages.MAX_FRAME)
    pieces = torn(b"".join(map(encode, sent)), cuts)
    received = [decode_to_router(frame) for piece in pieces for frame in reader.feed(piece)]
    assert received == sent


@given(st.lists(to_replica, max_size=6), st.lists(st.integers(0, 10**6), max_size=20))
def test_messages_to_a_replica_arrive_whole_and_in_order_wherever_the_stream_is_torn(
    sent: list[messages.ToReplica], cuts: list[int]
) -> None:
    """Any sequence of messages to a replica, cut at any places, arrives whole and in order."""
    reader = FrameReader(messages.MAX_FRAME)
    pieces = torn(b"".join(map(encode, sent)), cuts)
    received = [decode_to_replica(frame) for piece in pieces for frame in reader.feed(piece)]
    assert received == sent


@given(st.lists(st.binary(max_size=40), max_size=6), st.binary(max_size=3))
def test_a_stream_torn_at_every_byte_holds_back_only_the_unfinished_frame(
    payloads: list[bytes], rest: bytes
) -> None:
    """Bytes that come one at a time give every frame with its last byte, and none for a part of a frame."""
    reader = FrameReader(limit=40)
    sent = b"".join(struct.pack(">I", len(payload)) + payload for payload in payloads) + rest
    received = [frame for at in range(len(sent)) for frame in reader.feed(sent[at : at + 1])]
    assert received == payloads


@given(st.integers(0, 50), st.integers(1, 2**32 - 51), st.integers(1, 4))
def test_a_frame_over_the_limit_is_refused_with_its_length(limit: int, excess: int, cut: int) -> None:
    """A frame that is too long is refused as soon as its four bytes of length are there, not a byte earlier,
    and those before it are delivered."""
    reader = FrameReader(limit)
    fitting = struct.pack(">I", limit) + bytes(limit)
    length = struct.pack(">I", limit + excess)
    assert list(reader.feed(fitting + length[: cut - 1])) == [bytes(limit)]
    assert list(reader.feed(length[cut - 1 : 3])) == []
    with pytest.raises(FrameTooLong, match=f"a frame of {limit + excess} bytes, the limit is {limit}"):
        list(reader.feed(length[max(cut - 1, 3) :]))


def test_a_raised_limit_holds_from_the_next_frame_on() -> None:
    """The limit may be raised between two frames of one read, which is when the peer becomes known."""
    reader = FrameReader(limit=2)
    frames = reader.feed(struct.pack(">I", 2) + b"ab" + struct.pack(">I", 5) + b"cdefg")
    assert next(frames) == b"ab"
    reader.limit = 5
    assert list(frames) == [b"cdefg"]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127))
def test_every_choice_has_a_seed_in_int64(seed: int, choice: int) -> None:
    """Choice i takes seed + i, wrapped to int64, and no seed gives none."""
    drawn = Sampling(max_tokens=1, seed=seed).choice_seed(choice)
    assert drawn is not None
    assert -(2**63) <= drawn < 2**63
    assert (drawn - seed - choice) % 2**64 == 0
    assert Sampling(max_tokens=1).choice_seed(choice) is None


@given(prompts=st.integers(1, 5), n=st.integers(1, 5))
def test_a_request_takes_a_sequence_for_each_choice(prompts: int, n: int) -> None:
    """A chat is one prompt; of a text completion every prompt has its n choices."""
    sampling = Sampling(max_tokens=1, n=n)
    assert messages.Chat("id", "m", 1, (messages.Message("user", "hi"),), sampling).sequences == n
    assert messages.Text("id", "m", 1, ("hi",) * prompts, sampling).sequences == prompts * n
