"""What crosses the trunk: small frozen structs, and how they are framed.

A frame is a 4-byte big-endian length followed by that many bytes of MessagePack. The router sends one
`Submit` or `Cancel` per frame; the replica gathers everything an engine step produced into one `Frame`.
Both directions carry `Ping` while there is nothing else to say.

This module imports nothing of either end, and neither vllm nor torch: the router loads it too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

PROTOCOL = 3
"""Version of everything in this file; two ends of different versions refuse each other."""

MAX_FRAME = 64 * 1024 * 1024
"""Bytes. A longer frame is a broken peer: the largest request body is far below it."""

HANDSHAKE_LIMIT = 4096
"""Bytes that a frame may have before its sender has proven itself."""

_LENGTH = struct.Struct(">I")


DRAINING = "draining"
"""The code of a refusal by a replica that is shutting down: the router asks another one."""


class FrameTooLong(ValueError):
    """The peer announced a frame longer than its end may send."""


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """A call of a function that a model has asked for."""

    id: str
    name: str
    arguments: str
    """JSON as the model wrote it: it may be broken."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """One chat message, its content parts already joined into one text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None
    """None only beside tool calls."""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a message of role tool: the call that it answers."""
    reasoning: str | None = None
    """What an assistant thought before it spoke, for chat templates that show it again."""


class Tool(msgspec.Struct, frozen=True, array_like=True):
    """A function that a model may ask to have called."""

    name: str
    description: str | None = None
    parameters: str | None = None
    """JSON Schema of its arguments, as JSON."""
    strict: bool | None = None


class NamedTool(msgspec.Struct, frozen=True, array_like=True):
    """The choice of one function, which must be called."""

    name: str


class ResponseFormat(msgspec.Struct, frozen=True, array_like=True):
    """What every answer must be: JSON, of a schema where there is one."""

    schema: str | None = None
    """JSON Schema, as JSON; None: any object."""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen. Every value is in the range that `api.md` states and none means "default"
    any more, except where noted: the router has put the defaults in."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 0.0
    """Additive: every logit falls by this times the token's count in prompt and output."""
    repetition_factor: float = 1.0
    """Multiplicative, vLLM's own: logits of tokens in prompt or output are divided (below zero: multiplied)
    by it. At most one of the two is not neutral."""
    logit_bias: dict[int, float] = {}
    n: int = 1
    """Choices for each prompt."""
    seed: int | None = None
    """None: not reproducible. Choice i takes seed + i, wrapped to int64."""
    stop: tuple[str, ...] = ()
    top_k: int = 0
    """0 considers every token."""
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def choice_seed(self, choice: int) -> int | None:
        """The seed of one choice, in int64; None where the request gave none."""
        if self.seed is None:
            return None
        return (self.seed + choice + 2**63) % 2**64 - 2**63


class Chat(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A validated chat completion request."""

    id: str
    """The completion's id as the client will read it."""
    model: str
    """The name that was asked for, in the catalog's case; an alias stays the alias."""
    created: int
    """Unix seconds."""
    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    role_in_every_chunk: bool = False
    """Whether each chunk of a stream has a role and a content, as some clients need."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell beside each generated one; None tells nothing."""
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    """Without tools it says nothing."""
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    """For the chat template, in its own words."""
    chat_template_kwargs: str | None = None
    """A JSON object, as JSON, whose values the chat template sees under their names."""

    @property
    def sequences(self) -> int:
        """Choices over all prompts: what the request takes of an engine's batch."""
        return self.sampling.n


class Text(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A validated text completion request. Choice i belongs to prompt i // n."""

    id: str
    model: str
    created: int
    prompts: tuple[str | tuple[int, ...], ...]
    """Each a text or token ids."""
    sampling: Sampling
    """Its max_tokens may be 0: the answer is empty, or the prompt where that is echoed."""
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    """Whether each choice's text begins with its prompt."""
    logprobs: int | None = None

    @property
    def sequences(self) -> int:
        """Choices over all prompts: what the request takes of an engine's batch."""
        return len(self.prompts) * self.sampling.n


Request = Chat | Text
"""What a replica generates for."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Router to replica: generate this; `stream` names it on this trunk from now on."""

    stream: int
    request: Request


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Router to replica: nobody waits for this stream any more."""

    stream: int


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The engine has the request."""

    stream: int
    prompt_tokens: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The replica will not generate, or not to the end, and why, in words for the client. Ends the stream."""

    stream: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds after which the same request may be taken, where that is known."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Bytes for the client, passed on unread, and how many tokens they carry. Without bytes it only says that
    there are more tokens."""

    stream: int
    data: bytes
    tokens: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The last bytes of a stream and what was used. `failed`: the engine has died under it, there are no
    bytes, and another replica may do better."""

    stream: int
    data: bytes
    tokens: int
    usage: Usage
    failed: bool = False


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What a replica has to do, as its scheduler saw it after the last step."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences that wait for a place in it."""
    kv_used: float = 0.0
    """Share of the KV cache's blocks in use, 0..1."""


Event = Accepted | Refused | Chunk | Ended


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Everything one engine step produced for one router. `load` only where it changed."""

    events: list[Event]
    load: Load | None = None


class Draining(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """The replica takes no new stream and leaves when those it has have ended."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Sent when nothing else was for a heartbeat. Silence means that the peer is gone."""


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Replica to router, first: prove that you know the secret by answering for this nonce."""

    protocol: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """Router to replica: the proof, and a nonce for the replica to answer in turn."""

    router: str
    proof: bytes
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """Replica to router: its own proof, and who it is."""

    proof: bytes
    replica: str
    context_length: int
    """Tokens that prompt and answer may have together."""


ToReplica = Hello | Submit | Cancel | Ping
ToRouter = Challenge | Welcome | Frame | Draining | Ping

_encoder = msgspec.msgpack.Encoder()
decode_to_replica = msgspec.msgpack.Decoder(ToReplica).decode
decode_to_router = msgspec.msgpack.Decoder(ToRouter).decode


def encode(message: ToReplica | ToRouter) -> bytearray:
    """One message as a whole frame, its length in front."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame


class FrameReader:
    """Cuts a byte stream into frames, however it was torn on the way."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Bytes a frame may have; raise it once the peer is known."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes, lengths cut off.

        Raises FrameTooLong as soon as a length is read that is over the limit.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > self.limit:
                    raise FrameTooLong(f"a frame of {length} bytes, the limit is {self.limit}")
                end = start + _LENGTH.size + length
                if len(buffer) < end:
                    break
                frame = bytes(memoryview(buffer)[start + _LENGTH.size : end])
                start = end
                yield frame
        finally:
            del buffer[:start]
