from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from router.conversation import MAX_SCHEMA_BYTES
from router.protocol import MAX_TOOLS_BYTES
from serving.messages import Chat, Message, NamedTool, Tool, ToolCall
from tests.router.asking import HELLO, chat, refusal, refused

A_NAME = "a name of 1 to 64 ASCII letters, digits, underscores or dashes"
FUNCTION = {"type": "function", "function": {"name": "f"}}

# ---- messages -----------------------------------------------------------------------------------------


def test_messages_cross_in_order_with_their_roles_and_names() -> None:
    """All five roles are taken, and what was said reaches the replica as it was said."""
    said: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "developer", "content": " a\u0000b\n"},
        {"role": "user", "content": "é 😀 \u2028", "name": "ada"},
        {"role": "assistant", "content": "fine", "name": None},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    heard = chat(messages=said).messages
    assert [(m.role, m.content, m.name) for m in heard] == [
        (m["role"], m["content"], m.get("name")) for m in said
    ]


def test_text_parts_are_one_text() -> None:
    """A list of text parts is joined by line breaks, as vLLM joins it."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache": True}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == (Message("user", "one\ntwo"),)


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}


def called(**fields: Any) -> dict[str, Any]:
    """An assistant's message of one call with these fields."""
    return {"role": "assistant", "content": None, "tool_calls": [CALL | fields]}


def test_what_an_assistant_did_crosses() -> None:
    """Calls, with or without words, what was thought before and what the calls gave back: all that a client
    got in an answer may be sent back, and reaches the replica."""
    said = [
        {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "call_2", "index": 1}]},
        called() | {"content": "wait", "reasoning_content": "hm", "reasoning": "other", "refusal": None},
        {"role": "assistant", "content": "so", "reasoning": "hm", "tool_calls": None, "audio": None},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    call = ToolCall("call_1", "f", '{"a":')
    assert chat(messages=said).messages == (
        Message("assistant", None, tool_calls=(call, ToolCall("call_2", "f", '{"a":'))),
        Message("assistant", "wait", tool_calls=(call,), reasoning="hm"),
        Message("assistant", "so", reasoning="hm"),
        Message("tool", "42", tool_call_id="call_1"),
    )


def text_part(**fields: Any) -> dict[str, Any]:
    """A user's message of one good part and one with these fields."""
    return {"role": "user", "content": [{"type": "text", "text": "look"}, fields]}


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("hello", "messages[1]", 'must be an object, not "hello"'),
        ({}, "messages[1].role", "is missing: it must be one of"),
        ({"role": "robot", "content": "x"}, "messages[1].role", '"user", not "robot"'),
        ({"role": "function", "content": "x"}, "messages[1].role", 'not "function"'),
        ({"role": "User", "content": "x"}, "messages[1].role", 'not "User"'),
        ({"role": None, "content": "x"}, "messages[1].role", "not null"),
        ({"role": "user"}, "messages[1].content", "is missing"),
        ({"role": "user", "content": None}, "messages[1].content", "a string or a non-empty array"),
        ({"role": "user", "content": 5}, "messages[1].content", "not 5"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content", 'not {"type": "text"}'),
        ({"role": "user", "content": []}, "messages[1].content", "not []"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]", 'must be an object, not "x"'),
        ({"role": "assistant"}, "messages[1].content", "is missing: it must be a string or an array"),
        ({"role": "assistant", "content": None}, "messages[1].content", "as there are no tool_calls"),
        ({"role": "assistant", "tool_calls": []}, "messages[1].content", "as there are no tool_calls"),
        ({"role": "assistant", "content": 5}, "messages[1].content", "must be a string or a non-empty array"),
        (
            {"role": "assistant", "content": "x", "tool_calls": 5},
            "messages[1].tool_calls",
            "must be an array",
        ),
        (called(id=None), "messages[1].tool_calls[0].id", "must be a string, not null"),
        (called(type="custom"), "messages[1].tool_calls[0].type", 'must be "function", not "custom"'),
        (called(function=None), "messages[1].tool_calls[0].function", "must be an object, not null"),
        (
            called(function={"name": "f"}),
            "messages[1].tool_calls[0].function.arguments",
            "is missing: it must be a string",
        ),
        (
            called(function={"name": "f", "arguments": {"a": 1}}),
            "messages[1].tool_calls[0].function.arguments",
            'must be a string, not {"a": 1}',
        ),
        ({"role": "assistant", "content": "x", "reasoning": 5}, "messages[1].reasoning", "must be a string"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name", "must be a string, not 5"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id", "is missing"),
        ({"role": "tool", "content": "x", "tool_call_id": None}, "messages[1].tool_call_id", "not null"),
        ({"role": "tool", "content": None, "tool_call_id": "c"}, "messages[1].content", "not null"),
        (text_part(text="x"), "messages[1].content[1].type", 'is missing: it must be "text"'),
        (text_part(type="text"), "messages[1].content[1].text", "is missing"),
        (text_part(type="text", text=5), "messages[1].content[1].text", "must be a string, not 5"),
        (
            text_part(type="image_url", image_url={"url": "data:"}),
            "messages[1].content[1].type",
            'must be "text", not "image_url". Only text is served.',
        ),
        (text_part(type="input_audio", input_audio={}), "messages[1].content[1].type", 'not "input_audio"'),
        (text_part(type="file", file={}), "messages[1].content[1].type", 'not "file"'),
        (text_part(type="refusal", refusal="no"), "messages[1].content[1].type", 'not "refusal"'),
    ],
)
def test_a_wrong_message_is_named_by_its_place(message: Any, param: str, words: str) -> None:
    """Whatever is wrong in a message, the refusal says where it stands and what was expected there."""
    error = refused(messages=[*HELLO, message])
    assert error.param == param
    assert error.message.startswith(f"{param} ")
    assert words in error.message


@pytest.mark.parametrize("wrong", ["hello", {}, 5, []])
def test_messages_are_a_non_empty_array(wrong: Any) -> None:
    """At least one message is needed."""
    error = refused(messages=wrong)
    assert (
        error.message == f"messages must be a non-empty array, each item an object, not {json.dumps(wrong)}"
    )


def test_the_number_of_messages_is_bounded() -> None:
    """As many messages as configured are taken, one more is refused with the limit."""
    assert len(chat(messages=HELLO * 16).messages) == 16
    error = refused(messages=HELLO * 17)
    assert error.param == "messages"
    assert error.message == "messages must have at most 16 entries, not 17"


# ---- the form of an answer, and tools -----------------------------------------------------------------


def json_schema(schema: Any) -> dict[str, Any]:
    """A response_format of that schema."""
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tool(parameters: Any) -> dict[str, Any]:
    """A function with these parameters."""
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


SCHEMAS: list[tuple[str, Callable[[Any], dict[str, Any]], Callable[[Chat], str | None]]] = [
    (
        "response_format.json_schema.schema",
        lambda schema: {"response_format": json_schema(schema)},
        lambda asked: asked.response_format.schema if asked.response_format else None,
    ),
    (
        "tools[0].function.parameters",
        lambda schema: {"tools": [tool(schema)]},
        lambda asked: asked.tools[0].parameters,
    ),
    (
        "chat_template_kwargs",
        lambda schema: {"chat_template_kwargs": schema},
        lambda asked: asked.chat_template_kwargs,
    ),
]
"""Everything that crosses the trunk as JSON: where it is, how it is sent, and what arrives."""


@pytest.mark.parametrize(("path", "send", "arrived"), SCHEMAS)
def test_json_crosses_as_it_was_sent(path: str, send: Any, arrived: Any) -> None:
    """Keys keep their order, integers of any size their digits, and text its characters."""
    sent = {"b": [10**50, -(2**64), 0.1, 1e300], "a": {"é😀\u2028": None, "": True}}
    assert json.loads(arrived(chat(**send(sent)))) == sent
    assert list(json.loads(arrived(chat(**send(sent))))) == ["b", "a"]
    assert arrived(chat(**send(None))) is None


@pytest.mark.parametrize(("path", "send", "arrived"), SCHEMAS)
def test_json_is_bounded(path: str, send: Any, arrived: Any) -> None:
    """As many bytes as the limit are taken, one more is refused with both numbers; so is a number that JSON
    has and no engine can hold. What is nested without end is no request at all."""
    empty = len('{"a":""}')
    assert len(arrived(chat(**send({"a": "x" * (MAX_SCHEMA_BYTES - empty)})))) == MAX_SCHEMA_BYTES
    error = refused(**send({"a": "é" + "x" * (MAX_SCHEMA_BYTES - empty - 1)}))
    assert error.param == path
    assert error.message == f"{path} must have at most 65536 bytes as JSON, not 65537"
    body = json.dumps({"model": "m", "messages": HELLO, **send({"maximum": "INFINITE"})})
    error = refusal(body.replace('"INFINITE"', "1e999").encode())
    assert error.param == path
    assert error.message.startswith(f"{path} must have no number beyond")
    body = json.dumps({"model": "m", "messages": HELLO, **send({"items": "DEEP"})})
    error = refusal(body.replace('"DEEP"', '{"items":' * 1000 + "{}" + "}" * 1000).encode())
    assert error.code == "invalid_json"


def test_all_tools_together_are_bounded() -> None:
    """The parameters of all tools have as many bytes as the limit, or are refused as too many."""
    fitting = tool({"a": "x" * (MAX_SCHEMA_BYTES - len('{"a":""}'))})
    count = MAX_TOOLS_BYTES // MAX_SCHEMA_BYTES
    assert len(chat(tools=[fitting] * count).tools) == count
    error = refused(tools=[fitting] * count + [tool({})])
    assert (error.param, error.message) == (
        "tools",
        "tools must have at most 262144 bytes of parameters as JSON, not 262146",
    )


def test_tools_of_one_name_are_taken() -> None:
    """As OpenAI takes them."""
    assert chat(tools=[FUNCTION, FUNCTION]).tools == (Tool("f"), Tool("f"))


@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": []}])
def test_a_call_can_only_be_demanded_where_there_are_tools(tools: dict[str, Any]) -> None:
    """Without tools "none" and "auto" ask for nothing; a call of one, or of any, cannot be had."""
    assert chat(tool_choice="none", **tools).tool_choice == "none"
    assert chat(tool_choice="auto", parallel_tool_calls=True, **tools) == chat()
    for choice in ("required", FUNCTION):
        assert (refused(tool_choice=choice, **tools).param or "").startswith("tool_choice")


def test_the_named_tool_is_one_of_the_tools() -> None:
    """A function that was not given cannot be chosen; the refusal shows its name."""
    assert chat(tools=[FUNCTION], tool_choice=FUNCTION).tool_choice == NamedTool("f")
    other = {"type": "function", "function": {"name": "g"}}
    assert refused(tools=[FUNCTION], tool_choice=other).message == (
        'tool_choice.function.name must be the name of one of the tools, not "g"'
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"response_format": {"type": "xml"}},
            'response_format.type must be one of "json_object", "json_schema", "text", not "xml"',
        ),
        (
            {"response_format": {}},
            'response_format.type is missing: it must be one of "json_object", "json_schema", "text"',
        ),
        ({"response_format": "text"}, 'response_format must be an object, not "text"'),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema is missing: it must be an object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            f'tools[0].function.name must be {A_NAME}, not "a b"',
        ),
        (
            {"response_format": json_schema([])},
            "response_format.json_schema.schema must be an object, not []",
        ),
        (
            {"tools": [FUNCTION, {"type": "custom"}]},
            'tools[1].type must be "function", not "custom". Only functions can be tools.',
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function is missing: it must be an object"),
        ({"tools": {}}, "tools must be an array of up to 128 items, each an object, not {}"),
        (
            {"tool_choice": "any"},
            'tool_choice must be one of "none", "auto", "required" or an object, not "any"',
        ),
        (
            {"tool_choice": {"type": "function"}},
            "tool_choice.function is missing: it must be an object",
        ),
        (
            {"tool_choice": {"type": "allowed_tools"}},
            'tool_choice.type must be "function", not "allowed_tools". Only functions can be chosen.',
        ),
        (
            {"tool_choice": "required"},
            'tool_choice must be left out or "none" or "auto" where there are no tools, not "required"',
        ),
    ],
)
def test_what_is_nested_is_refused_by_its_whole_path(parameters: dict[str, Any], message: str) -> None:
    """Of several forms that a value may have, the one that was meant is held against it."""
    assert refused(**parameters).message == message
