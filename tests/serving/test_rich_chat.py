"""Chat completions with reasoning, tool calls and logprobs, from an engine's tokens to a client's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from serving.answers import LONGEST_ANSWER
from serving.engine import Delta, FinishReason, Logprob, Parsed, TokenLogprobs, ToolCallDelta
from serving.messages import NamedTool, Tool, ToolCall
from tests.harness import HandEngine
from tests.serving.recorder import Part, Put, Recorder, chat, joined, perform


class Marks:
    """The parser of a model that says `<what it thinks>`, `[name|arguments]` for a call, and content. It
    knows a call only by its whole name, and it cannot read an exclamation mark."""

    def __init__(self) -> None:
        self._place = "content"
        self._calls = 0
        self._name = ""

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        said = {"content": "", "reasoning": ""}
        calls: list[ToolCallDelta] = []
        for character in text:
            call = self._read(character, said)
            if call is not None and calls and calls[-1].call == call.call:
                calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + call.arguments)
            elif call is not None:
                calls.append(call)
        if not (calls or any(said.values())):
            return None
        return Delta(said["content"] or None, said["reasoning"] or None, calls)

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        delta = self.delta(text, token_ids, finished=True) or Delta()
        calls = [ToolCall(str(call.id), str(call.name), call.arguments) for call in delta.tool_calls]
        return Parsed(delta.content, delta.reasoning, calls)

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return sum(token_ids)

    def _read(self, character: str, said: dict[str, str]) -> ToolCallDelta | None:
        assert character != "!", "a mark that nobody knows"
        match self._place, character:
            case "content", "<":
                self._place = "reasoning"
            case "content", "[":
                self._place, self._name = "name", ""
            case ("reasoning", ">") | ("arguments", "]"):
                self._place = "content"
            case "name", "|":
                self._place = "arguments"
                self._calls += 1
                return ToolCallDelta(self._calls - 1, f"call-{self._calls}", self._name, "")
            case "name", _:
                self._name += character
            case "arguments", _:
                return ToolCallDelta(self._calls - 1, None, None, character)
            case place, _:
                said[place] += character
        return None


class Thrice(Marks):
    """It finds three times in a text what the model said once."""

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        return Delta(text, text, [ToolCallDelta(0, "id", "f", text)])


class Hesitant(Marks):
    """It holds a call back until it knows its name. What never has one was text, it finds in the whole."""

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        if "[" in text and "|" not in text:
            return Parsed(text, None, ())
        return super().whole(text, token_ids)


class Late(Marks):
    """It finds calls, and what follows them, in a whole text only."""

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        return None if self._place == "[" else super().delta(text, token_ids, finished=finished)

    def _read(self, character: str, said: dict[str, str]) -> ToolCallDelta | None:
        if character == "[":
            self._place = "["
        return None if self._place == "[" else super()._read(character, said)

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        return Marks().whole(text, token_ids)


def marked(parser: type[Marks] = Marks) -> HandEngine:
    """An engine whose model marks what it says."""
    engine = HandEngine()
    engine.parser = parser
    return engine


def spoken(text: str, finish_reason: FinishReason = "stop", size: int = 3) -> Part:
    """A choice that says this in pieces of so many characters."""
    return Part([Put(text[at : at + size]) for at in range(0, len(text), size)], finish_reason)


# ---- streams and whole answers ------------------------------------------------------------------------

tokens = st.builds(Logprob, st.text(max_size=3), st.floats(max_value=0))
logprobs = st.builds(TokenLogprobs, tokens, st.lists(tokens, max_size=2))
steps = st.builds(
    lambda text, told: Put(text, [len(each.likeliest) % 2 for each in told], told),
    st.text("ab<>[|]\x01é\U0001f686", max_size=5),
    st.lists(logprobs, max_size=2),
)
parts = st.lists(
    st.builds(Part, st.lists(steps, min_size=1, max_size=8), st.sampled_from(["stop", "length"])),
    min_size=1,
    max_size=3,
)


@given(
    parts=parts, k=st.none() | st.just(2), parallel=st.booleans(), every=st.booleans(), named=st.booleans()
)
async def test_a_stream_adds_up_to_the_whole_answer(
    parts: list[Part], k: int | None, *, parallel: bool, every: bool, named: bool
) -> None:
    """However a model's words are torn into tokens, its stream's deltas add up to the message of the whole
    answer: content, reasoning, calls, the logprobs of every token in order; finish reasons, usage and the
    tokens that were counted are the same."""
    fields: dict[str, Any] = {"n": len(parts), "logprobs": k, "parallel_tool_calls": parallel}
    if named:
        fields |= {"tools": (Tool("f"),), "tool_choice": NamedTool("f")}
    whole = await perform(marked(), chat(**fields), *parts)
    stream = await perform(
        marked(), chat(stream=True, include_usage=True, role_in_every_chunk=every, **fields), *parts
    )
    for choice in whole.body["choices"]:
        told = choice["logprobs"]["content"] if k is not None else []
        assert (k is None) == (choice["logprobs"] is None)
        assert joined(stream.choices(choice["index"])) == {
            "message": choice["message"],
            "finish_reason": choice["finish_reason"],
            "logprobs": told,
        }
    usage = whole.body["usage"]
    ids = [each for part in parts for put in part.puts for each in put.token_ids]
    assert stream.events[-1]["usage"] == usage
    assert usage["completion_tokens"] == len(ids) == whole.tokens == stream.tokens
    assert usage["completion_tokens_details"] == {"reasoning_tokens": sum(ids)}
    assert stream.usage == whole.usage
    assert stream.usage is not None
    assert stream.usage.reasoning_tokens == sum(ids)


@given(parts=parts, every=st.booleans())
async def test_the_role_is_said_once_or_always(parts: list[Part], *, every: bool) -> None:
    """The first delta of a choice has the role, and the others have it where clients need that, then always
    with a content that is not null."""
    request = chat(n=len(parts), stream=True, role_in_every_chunk=every)
    stream = await perform(marked(), request, *parts)
    for choice in range(len(parts)):
        deltas = [entry["delta"] for entry in stream.choices(choice)]
        assert [delta.get("role") for delta in deltas] == ["assistant"] + ["assistant" if every else None] * (
            len(deltas) - 1
        )
        if every:
            assert all(isinstance(delta["content"], str) for delta in deltas)
        else:
            assert deltas[-1] == {}


# ---- what a client reads ------------------------------------------------------------------------------


async def test_a_message_of_every_kind() -> None:
    """Reasoning, content and calls stand where clients look for them."""
    part = spoken('<I think.>Wait. [look|{"a": 1}][go|{}]')
    (choice,) = (await perform(marked(), chat(), part)).body["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Wait. ",
            "reasoning_content": "I think.",
            "tool_calls": [
                {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
                {"id": "call-2", "type": "function", "function": {"name": "go", "arguments": "{}"}},
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


async def test_the_deltas_of_a_call() -> None:
    """A call's id, type and name come first and with no more than what is known of its arguments; then its
    arguments, piece by piece, by its index."""
    stream = await perform(marked(), chat(stream=True), spoken('[go|{"far": true}]', size=4))
    assert [entry["delta"] for entry in stream.choices(0)] == [
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "go", "arguments": ""},
                }
            ],
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"fa'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'r": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "true"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {},
    ]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("text", "ended", "fields", "told"),
    [
        ("[go|{}]", "stop", {}, "tool_calls"),
        ("[go|{}", "length", {}, "length"),
        ("no call", "stop", {}, "stop"),
        ("[go|{}]", "stop", {"tools": (Tool("go"),), "tool_choice": NamedTool("go")}, "stop"),
        ("[go|{}]", "stop", {"tools": (Tool("go"),), "tool_choice": "required"}, "tool_calls"),
    ],
    ids=["called", "cut off", "not called", "asked for by name", "required"],
)
async def test_a_choice_that_ends_with_calls_says_so(
    text: str, ended: FinishReason, fields: dict[str, Any], told: str, stream: bool
) -> None:
    """A choice that stops and has calls ends with "tool_calls", unless the client has named the function."""
    outlet = await perform(marked(), chat(stream=stream, **fields), spoken(text, ended))
    last = outlet.choices(0)[-1] if stream else outlet.body["choices"][0]
    assert last["finish_reason"] == told


@pytest.mark.parametrize("stream", [True, False])
async def test_only_the_first_of_several_calls_is_told_where_one_is_wanted(stream: bool) -> None:
    """Without parallel_tool_calls a client reads of one call, whatever the model says."""
    request = chat(stream=stream, parallel_tool_calls=False)
    outlet = await perform(marked(), request, spoken("[a|1][b|2][c|3]", size=2))
    choice = joined(outlet.choices(0)) if stream else outlet.body["choices"][0]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "a", "arguments": "1"}]
    assert choice["finish_reason"] == "tool_calls"


async def test_content_is_null_only_beside_calls() -> None:
    """A message without text has a null content where it has calls, and an empty one otherwise."""
    parts = [spoken("[go|{}]"), spoken("<hm>"), Part([Put("")])]
    choices = (await perform(marked(), chat(n=3), *parts)).body["choices"]
    assert [choice["message"]["content"] for choice in choices] == [None, "", ""]


# ---- logprobs -----------------------------------------------------------------------------------------


async def test_an_entry_of_logprobs() -> None:
    """Each token with the bytes of its text and the likeliest ones there; what cannot be has -9999."""
    chosen = Logprob("é", -0.5)
    told = [
        TokenLogprobs(chosen, [chosen, Logprob("\U0001f686", -math.inf)]),
        TokenLogprobs(Logprob("", math.nan), []),
    ]
    outlet = await perform(HandEngine(), chat(logprobs=2), Part([Put("é", (1, 2), told)]))
    expected = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    train = {"token": "\U0001f686", "logprob": -9999.0, "bytes": [240, 159, 154, 134]}
    assert outlet.body["choices"][0]["logprobs"] == {
        "content": [
            {**expected, "top_logprobs": [expected, train]},
            {"token": "", "logprob": -9999.0, "bytes": [], "top_logprobs": []},
        ],
        "refusal": None,
    }


async def test_logprobs_of_text_that_is_held_back_ride_with_the_next_event() -> None:
    """No event goes out for logprobs alone, and none of them is lost: the last go out with the finish
    reason."""

    def put(text: str, token: str) -> Put:
        return Put(text, (0,), [TokenLogprobs(Logprob(token, -1.0), [])])

    part = Part([put("", "a"), put("ab", "b"), put("", "c"), put("", "d")])
    stream = await perform(HandEngine(), chat(stream=True, logprobs=0), part)
    assert [[each["token"] for each in entry["logprobs"]["content"]] for entry in stream.choices(0)] == [
        ["a", "b"],
        ["c", "d"],
    ]
    assert stream.choices(0)[1] | {"logprobs": None} == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }


# ---- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("!plain [x|y]", "!plain [x|y]", 0),
        ("ab [na!me|x]", "ab [na!me|x]", 0),
        ("[f|x] then!", " then!", 1),
    ],
)
async def test_a_parser_that_fails_does_not_fail_the_answer(text: str, content: str, calls: int) -> None:
    """What the parser had not shown yet, and all that follows, goes out as the model wrote it, whole as
    streamed. The failure is logged, once for a choice."""
    with capture_logs() as logged:
        whole = await perform(marked(), chat(), spoken(text, size=1))
        stream = await perform(marked(), chat(stream=True), spoken(text, size=1))
    (choice,) = whole.body["choices"]
    streamed = joined(stream.choices(0))
    assert streamed["message"] == choice["message"]
    assert streamed["finish_reason"] == choice["finish_reason"]
    assert choice["message"]["content"] == content
    assert len(choice["message"].get("tool_calls", ())) == calls
    assert [entry["log_level"] for entry in logged] == ["error", "error"]
    assert whole.usage == stream.usage


@pytest.mark.parametrize("text", ["[na", "so: [na", "so", "[f|{}]", "<hm>"])
async def test_a_call_cut_off_before_its_name_is_text(text: str) -> None:
    """A call that is cut off before its name is in the content of a stream as it is in the whole answer's."""
    part = spoken(text, "length", size=1)
    whole = await perform(marked(Hesitant), chat(), part)
    stream = await perform(marked(Hesitant), chat(stream=True), part)
    (choice,) = whole.body["choices"]
    told = joined(stream.choices(0))["message"]
    assert told["content"] == choice["message"]["content"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_is_found_in_the_whole_only_is_told(stream: bool) -> None:
    """Where a parser makes nothing of a call until there is nothing more, the call is told at the end."""
    text = "<hm>Look. [go|{}][on|1] So."
    outlet = await perform(marked(Late), chat(stream=stream), spoken(text))
    choice = joined(outlet.choices(0)) if stream else outlet.body["choices"][0]
    message = choice["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["go", "on"]
    assert (message["content"], message["reasoning_content"]) == ("Look.  So.", "hm")
    assert choice["finish_reason"] == "tool_calls"


@given(text=st.text("ab<>[|]", max_size=20), size=st.integers(1, 4), lag=st.integers(0, 6))
async def test_text_that_comes_later_than_its_tokens(text: str, size: int, lag: int) -> None:
    """Where text is held back, as it may be part of a stop string, and where several tokens come at once, a
    parser makes the same of an answer as where each token comes with its text."""

    class OneByOne(Marks):
        def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
            assert [text] == [chr(token) for token in token_ids] or not text
            return super().delta(text, token_ids, finished=finished)

        def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
            return Marks().whole(text, token_ids)

    engine = marked(OneByOne)
    engine.decoder = lambda: chr
    ids = list(map(ord, text))
    cuts = [max(0, at - lag) for at in range(size, len(text), size)]
    starts = [0, *cuts]
    texts = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
    puts = [Put(piece, ids[number * size :][:size]) for number, piece in enumerate(texts)]
    late = await perform(engine, chat(stream=True), Part(puts))
    alone = await perform(marked(), chat(), spoken(text, size=1) if text else Part([Put("", ())]))
    told, (choice,) = joined(late.choices(0)), alone.body["choices"]
    assert told["message"] == choice["message"]
    assert told["finish_reason"] == choice["finish_reason"]


def too_long(outlet: Recorder) -> bool:
    """Whether the answer was refused for its length."""
    return outlet.refusal is not None and outlet.refusal.code == "answer_too_long"


async def test_what_a_parser_writes_counts_for_the_longest_answer() -> None:
    """An answer is as long as its messages, arguments, names and ids included, not as what the model said."""
    text = "x" * ((LONGEST_ANSWER - len("idf")) // 3)
    longest, longer = Part([Put(text)]), Part([Put(f"{text}x")])
    outlet = await perform(marked(Thrice), chat(), longest)
    assert len(outlet.body["choices"][0]["message"]["content"]) == len(text)
    assert too_long(await perform(marked(Thrice), chat(), longer))
    assert too_long(await perform(marked(Thrice), chat(n=2), longest, Part([Put("x")])))


async def test_logprobs_count_for_the_longest_answer() -> None:
    """A few tokens with the logprobs of many more than fit are refused."""
    token = Logprob("x" * 200, -1.0)
    put = Put("x", (0,) * 1000, [TokenLogprobs(token, [token] * 4)] * 1000)
    assert too_long(await perform(HandEngine(), chat(logprobs=4), Part([put] * 10)))
    outlet = await perform(HandEngine(), chat(logprobs=4), Part([put] * 2))
    assert len(outlet.body["choices"][0]["logprobs"]["content"]) == 2000
