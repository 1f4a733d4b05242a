from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest
from router.protocol import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    UNSERVED,
    ChatRequest,
    Model,
    model_name,
    parse_chat,
    read_json,
)
from serving.messages import Chat, Message, Sampling, Submit, decode_to_replica, encode

HELLO = [{"role": "user", "content": "hello"}]
INT64 = 2**63


def parse(body: bytes | dict[str, Any], *, max_messages: int = 16, default_max_tokens: int = 24) -> Chat:
    """A body's way through the router, up to what crosses the trunk."""
    data = read_json(body if isinstance(body, bytes) else json.dumps(body).encode())
    request = parse_chat(data, max_messages=max_messages, default_max_tokens=default_max_tokens)
    return request.to_message("chat-1", model_name(data), 1_700_000_000)


def chat(**parameters: Any) -> Chat:
    """A small conversation with these parameters."""
    return parse({"model": "m", "messages": HELLO, **parameters})


def refusal(body: bytes | dict[str, Any]) -> InvalidRequest:
    """How a body is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


def refused(**parameters: Any) -> InvalidRequest:
    """How these parameters of a small conversation are refused."""
    return refusal({"model": "m", "messages": HELLO, **parameters})


class Parameter(NamedTuple):
    """One optional parameter: what it is by default, what it may be, and what it may not."""

    default: Any
    good: dict[Any, Any] | list[tuple[Any, Any]]
    """What is sent, and what the replica gets for it."""
    bad: list[Any]
    expected: str


NOT_NUMBERS = ["1", True, [1], {}]
NOT_INTEGERS = ["1", True, [1], {}, 1.0, 1.5]
NOT_BOOLEANS = ["true", 0, 1, 1.0, [], {}]

A_PENALTY = Parameter(
    0.0, {-2: -2.0, 2: 2.0, 0: 0.0, 1.5: 1.5}, [-2.01, 2.01, *NOT_NUMBERS], "a number from -2 to 2"
)
A_SHARE = {0: 0.0, 1: 1.0, 0.5: 0.5}
TOKENS = {1: 1, 4096: 4096, 2**31 - 1: 2**31 - 1, 2**31: 2**31 - 1, 10**30: 2**31 - 1}

SAMPLING = {
    "max_tokens": Parameter(24, TOKENS, [0, -1, *NOT_INTEGERS], "an integer of at least 1"),
    "temperature": Parameter(
        1.0, {0: 0.0, 2: 2.0, 0.7: 0.7}, [-0.01, 2.01, 10**400, *NOT_NUMBERS], "a number from 0 to 2"
    ),
    "top_p": Parameter(1.0, A_SHARE, [-0.01, 1.01, *NOT_NUMBERS], "a number from 0 to 1"),
    "frequency_penalty": A_PENALTY,
    "presence_penalty": A_PENALTY,
    "repetition_penalty": A_PENALTY,
    "logit_bias": Parameter(
        {},
        [
            ({}, {}),
            ({"0": -100, "50256": 100, "7": 0.5}, {0: -100.0, 50256: 100.0, 7: 0.5}),
            ({str(i): 1 for i in range(MAX_LOGIT_BIAS)}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)),
        ],
        [
            {"1": -100.1},
            {"1": 100.1},
            {"1": "5"},
            {"1": True},
            {"1": None},
            {"a": 1},
            {"-1": 1},
            {" 1": 1},
            {"1.0": 1},
            {"٣": 1},
            {"": 1},
            {"1" * 11: 1},
            {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)},
            {str(i): "x" for i in range(MAX_LOGIT_BIAS + 1)},
            [],
            "1",
            5,
        ],
        "",
    ),
    "n": Parameter(1, {1: 1, 128: 128}, [0, 129, -1, *NOT_INTEGERS], "an integer from 1 to 128"),
    "seed": Parameter(
        None,
        {-INT64: -INT64, INT64 - 1: INT64 - 1, -1: -1, 0: 0},
        [-INT64 - 1, INT64, *NOT_INTEGERS],
        "an integer from -9223372036854775808 to 9223372036854775807",
    ),
    "stop": Parameter(
        (),
        [("x", ("x",)), ([], ()), (["a", "b", "c", "d"], ("a", "b", "c", "d")), (["a", "a"], ("a", "a"))],
        ["", 5, True, {}, ["a", "b", "c", "d", "e"]],
        "a non-empty string or an array of up to 4 items, each a non-empty string",
    ),
    "top_k": Parameter(
        0, {-1: 0, 0: 0, 1: 1, 10**30: 2**31 - 1}, [-2, *NOT_INTEGERS], "an integer of at least -1"
    ),
    "min_p": Parameter(0.0, A_SHARE, [-0.01, 1.01, *NOT_NUMBERS], "a number from 0 to 1"),
    "min_tokens": Parameter(0, {0: 0, 24: 24}, [-1, *NOT_INTEGERS], "an integer of at least 0"),
    "ignore_eos": Parameter(
        default=False, good=[(True, True), (False, False)], bad=NOT_BOOLEANS, expected="true or false"
    ),
    "stop_token_ids": Parameter(
        (),
        [
            ([], ()),
            ([0, MAX_TOKEN_ID], (0, MAX_TOKEN_ID)),
            ([5] * MAX_STOP_TOKEN_IDS, (5,) * MAX_STOP_TOKEN_IDS),
        ],
        [5, "5", {}, [5] * (MAX_STOP_TOKEN_IDS + 1)],
        "an array of up to 64 items, each an integer from 0 to 2147483647",
    ),
}

# Parameters that are no part of the sampling; each has tests of its own below.
ELSEWHERE = {
    "model",
    "messages",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "user",
    "metadata",
}


def cases(field: str) -> list[tuple[str, Any, Any]]:
    """Every value of a column of the table beside its parameter."""
    found = []
    for name, parameter in SAMPLING.items():
        if field == "good":
            pairs = parameter.good.items() if isinstance(parameter.good, dict) else parameter.good
            found += [(name, sent, got) for sent, got in pairs]
        else:
            found += [(name, sent, parameter.expected) for sent in parameter.bad]
    return found


# ---- every parameter ----------------------------------------------------------------------------------


def test_the_table_has_every_parameter() -> None:
    """No parameter of the API and nothing that a replica is told goes untested."""
    assert SAMPLING.keys() | ELSEWHERE == ChatRequest.model_fields.keys()
    assert SAMPLING.keys() == set(Sampling.__struct_fields__)


@pytest.mark.parametrize("name", SAMPLING)
def test_left_out_and_null_mean_the_default(name: str) -> None:
    """Every optional parameter may be left out or null, and both mean its default."""
    assert getattr(chat().sampling, name) == SAMPLING[name].default
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(("name", "sent", "got"), cases("good"))
def test_values_up_to_both_ends_are_taken(name: str, sent: Any, got: Any) -> None:
    """The ends of each range belong to it, and the replica is told the value in its own type."""
    value = getattr(chat(**{name: sent}).sampling, name)
    assert value == got
    assert type(value) is type(got)


@pytest.mark.parametrize(("name", "sent", "expected"), cases("bad"))
def test_values_past_an_end_or_of_another_type_are_refused(name: str, sent: Any, expected: str) -> None:
    """One past each end, and each wrong type, is a 400 that names the parameter, the value and what was
    expected. A string is no number, a boolean no integer, and 1.0 no integer either."""
    error = refused(**{name: sent})
    assert (error.param or "").split(".")[0].split("[")[0] == name
    assert error.message.startswith(error.param or "-")
    assert expected in error.message
    assert error.code == "invalid_value"
    if isinstance(sent, int | float | str) and len(str(sent)) < 50:
        assert error.message.endswith(f"not {json.dumps(sent)}")


@pytest.mark.parametrize("name", [n for n, p in SAMPLING.items() if "a number" in p.expected])
def test_a_number_too_large_to_be_finite_is_refused(name: str) -> None:
    """JSON spells no infinity, but 1e999 reads as one; it is in no range."""
    body = f'{{"model": "m", "messages": {json.dumps(HELLO)}, "{name}": 1e999}}'
    assert refusal(body.encode()).param == name


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({"stop": ["a", ""]}, "stop[1]", 'stop[1] must be a non-empty string, not ""'),
        ({"stop": [None]}, "stop[0]", "stop[0] must be a non-empty string, not null"),
        (
            {"stop_token_ids": [1, -1]},
            "stop_token_ids[1]",
            "stop_token_ids[1] must be an integer from 0 to 2147483647, not -1",
        ),
        (
            {"stop_token_ids": [MAX_TOKEN_ID + 1]},
            "stop_token_ids[0]",
            "stop_token_ids[0] must be an integer from 0 to 2147483647, not 2147483648",
        ),
        (
            {"logit_bias": {"5": 101}},
            "logit_bias.5",
            "logit_bias.5 must be a number from -100 to 100, not 101",
        ),
        (
            {"logit_bias": {"five": 1}},
            "logit_bias",
            'logit_bias must have token ids in decimal digits as its keys, not "five"',
        ),
        (
            {"logit_bias": {str(i): 1 for i in range(2000)}},
            "logit_bias",
            "logit_bias must have at most 1024 entries, not 2000",
        ),
        ({"user": 5}, "user", "user must be a string, not 5"),
        ({"metadata": []}, "metadata", "metadata must be an object, not []"),
        ({"stream": "yes"}, "stream", 'stream must be true or false, not "yes"'),
        ({"stream": 1}, "stream", "stream must be true or false, not 1"),
    ],
)
def test_a_refusal_is_one_clear_sentence(parameters: dict[str, Any], param: str, message: str) -> None:
    """Inside arrays and objects too, the wrong item is named by its path; a union is one sentence."""
    error = refused(**parameters)
    assert (error.param, error.message) == (param, message)


def test_what_nobody_knows_is_ignored() -> None:
    """Real clients send parameters of other servers; they change nothing."""
    extra = {"extra_body": {"a": 1}, "reasoning_effort": "low", "guided": [1], "": None}
    assert chat(**extra) == chat()
    assert parse({"model": "m", "messages": [{**HELLO[0], "refusal": None, "annotations": []}]}) == chat()


def test_who_the_caller_asks_for_is_taken_without_effect() -> None:
    """`user` and `metadata` are accepted, also as null, and change nothing."""
    assert chat(user="u-1", metadata={"a": [1]}) == chat(user=None, metadata=None) == chat()


# ---- max_tokens ---------------------------------------------------------------------------------------


def test_max_completion_tokens_is_max_tokens() -> None:
    """Either name sets the same limit; null is as good as left out; the two may agree."""
    assert chat(max_completion_tokens=7) == chat(max_tokens=7)
    assert chat(max_completion_tokens=7, max_tokens=None) == chat(max_tokens=7)
    assert chat(max_completion_tokens=None, max_tokens=7) == chat(max_tokens=7)
    assert chat(max_completion_tokens=7, max_tokens=7) == chat(max_tokens=7)


@pytest.mark.parametrize("wrong", [0, "7", 7.0, True])
def test_a_wrong_max_completion_tokens_is_refused_under_its_own_name(wrong: Any) -> None:
    """The message names the parameter that the client wrote."""
    error = refused(max_completion_tokens=wrong)
    assert error.param == "max_completion_tokens"
    assert "an integer of at least 1" in error.message


def test_unequal_names_of_one_limit_are_refused() -> None:
    """Two different limits at once cannot be meant."""
    error = refused(max_completion_tokens=7, max_tokens=8)
    assert error.param == "max_completion_tokens"
    assert "7 is not 8" in error.message


def test_a_deployment_may_change_the_default_of_max_tokens() -> None:
    """The configured default holds where the request gives no limit, and only there."""
    body = {"model": "m", "messages": HELLO}
    assert parse(body, default_max_tokens=512).sampling.max_tokens == 512
    assert parse({**body, "max_tokens": None}, default_max_tokens=512).sampling.max_tokens == 512
    assert parse({**body, "max_tokens": 9}, default_max_tokens=512).sampling.max_tokens == 9
    assert parse({**body, "max_completion_tokens": 9}, default_max_tokens=512).sampling.max_tokens == 9


def test_min_tokens_may_not_pass_max_tokens() -> None:
    """More tokens at least than at most is refused, the default limit included."""
    assert chat(max_tokens=30, min_tokens=30).sampling.min_tokens == 30
    assert refused(max_tokens=30, min_tokens=31).param == "min_tokens"
    assert "which is 24, not 25" in refused(min_tokens=25).message


# ---- stream -------------------------------------------------------------------------------------------


def test_stream_and_its_options_reach_the_replica() -> None:
    """Streaming is off unless asked for, and usage in the stream likewise."""
    assert (chat().stream, chat().include_usage) == (False, False)
    assert chat(stream=None) == chat(stream=False) == chat()
    assert chat(stream=True).stream
    assert not chat(stream=True, stream_options=None).include_usage
    assert not chat(stream=True, stream_options={}).include_usage
    assert not chat(stream=True, stream_options={"include_usage": None}).include_usage
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage


@pytest.mark.parametrize("stream", [{}, {"stream": None}, {"stream": False}])
def test_stream_options_need_a_stream(stream: dict[str, Any]) -> None:
    """Options of a stream that was not asked for are refused, as OpenAI does."""
    assert refused(stream_options={"include_usage": True}, **stream).param == "stream_options"
    assert chat(stream_options=None, **stream) == chat()


@pytest.mark.parametrize("wrong", NOT_BOOLEANS)
def test_include_usage_is_a_boolean(wrong: Any) -> None:
    """Nothing but true, false and null is taken for include_usage."""
    error = refused(stream=True, stream_options={"include_usage": wrong})
    assert error.param == "stream_options.include_usage"


# ---- model and messages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_is_required_is_missed(name: str) -> None:
    """A missing required field is named, with what it must be; null is no value for it."""
    body = {"model": "m", "messages": HELLO}
    missing = refusal({key: value for key, value in body.items() if key != name})
    assert (missing.param, missing.code) == (name, "missing_required_parameter")
    assert "is missing: it must be a non-empty" in missing.message
    assert refusal({**body, name: None}).message.endswith("not null")


@pytest.mark.parametrize("wrong", ["", 5, True, ["m"], {}])
def test_a_model_is_a_name(wrong: Any) -> None:
    """The model is a non-empty string, whichever way it is asked for."""
    error = refused(model=wrong)
    with pytest.raises(InvalidRequest) as caught:
        model_name({"model": wrong})
    assert error.message == caught.value.message
    assert error.message == f"model must be a non-empty string, not {json.dumps(wrong)}"


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
    assert parse({"model": "m", "messages": [{"role": "user", "content": parts}]}).messages == (
        Message("user", "one\ntwo"),
    )


def text_part(**fields: Any) -> dict[str, Any]:
    """A user's message of one good part and one with these fields."""
    return {"role": "user", "content": [{"type": "text", "text": "look"}, fields]}


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("hello", "messages[1]", 'must be an object, not "hello"'),
        ({}, "messages[1].role", "is missing: it must be one of"),
        ({"role": "robot", "content": "x"}, "messages[1].role", '"tool", not "robot"'),
        ({"role": "function", "content": "x"}, "messages[1].role", 'not "function"'),
        ({"role": "User", "content": "x"}, "messages[1].role", 'not "User"'),
        ({"role": None, "content": "x"}, "messages[1].role", "not null"),
        ({"role": "user"}, "messages[1].content", "is missing"),
        ({"role": "user", "content": None}, "messages[1].content", "a string or a non-empty array"),
        ({"role": "user", "content": 5}, "messages[1].content", "not 5"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content", 'not {"type": "text"}'),
        ({"role": "user", "content": []}, "messages[1].content", "not []"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]", 'must be an object, not "x"'),
        ({"role": "assistant", "content": None}, "messages[1].content", "not null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content", "not null"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name", "must be a string, not 5"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id", "is missing"),
        ({"role": "tool", "content": "x", "tool_call_id": None}, "messages[1].tool_call_id", "is missing"),
        (text_part(text="x"), "messages[1].content[1].type", 'is missing: it must be "text"'),
        (text_part(type="text"), "messages[1].content[1].text", "is missing"),
        (text_part(type="text", text=5), "messages[1].content[1].text", "must be a string, not 5"),
        (
            text_part(type="image_url", image_url={"url": "data:"}),
            "messages[1].content[1].type",
            'must be "text", not "image_url"',
        ),
        (text_part(type="input_audio", input_audio={}), "messages[1].content[1].type", 'not "input_audio"'),
        (text_part(type="file", file={}), "messages[1].content[1].type", 'not "file"'),
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


# ---- what is not served -------------------------------------------------------------------------------

WITH_EFFECT: dict[str, Any] = {
    "logprobs": True,
    "top_logprobs": 5,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "messages[].tool_calls": [{"id": "call_1"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "echo": True,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "messages[].function_call": {"name": "f", "arguments": "{}"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "messages[].audio": {"id": "audio_1"},
    "web_search_options": {},
}


def ask_with(name: str, value: Any) -> dict[str, Any]:
    """A body that gives a value to a parameter, in the second message where its name says so."""
    in_message = name.removeprefix("messages[].")
    if in_message == name:
        return {"model": "m", "messages": HELLO * 2, name: value}
    said = {"role": "assistant", "content": "hello"}
    return {"model": "m", "messages": [HELLO[0], {**said, in_message: value}]}


def test_the_values_above_are_for_every_unserved_parameter() -> None:
    """No refused parameter goes untested."""
    assert WITH_EFFECT.keys() == UNSERVED.keys()


@pytest.mark.parametrize("name", UNSERVED)
def test_what_would_change_the_answer_and_is_not_served_is_refused(name: str) -> None:
    """It is never ignored in silence: the refusal names it and says what it may be."""
    error = refusal(ask_with(name, WITH_EFFECT[name]))
    assert error.param == name.replace("[]", "[1]")
    assert error.code == "unsupported_parameter"
    assert error.message.startswith(f"{error.param} is not supported")
    assert ("not supported yet" in error.message) is UNSERVED[name].yet
    assert "it must be left out or null" in error.message


@pytest.mark.parametrize("name", UNSERVED)
def test_neutral_values_of_what_is_not_served_pass(name: str) -> None:
    """Clients that always send null, false or an empty list are not turned away."""
    for value in [None, *UNSERVED[name].neutral]:
        parse(ask_with(name, value))


@pytest.mark.parametrize(("name", "value"), [("logprobs", 0), ("top_logprobs", False), ("tools", {})])
def test_a_neutral_value_has_its_own_type(name: str, value: Any) -> None:
    """0 is not false and an object is no array, for unserved parameters too."""
    assert refused(**{name: value}).param == name


def test_an_assistants_tool_calls_may_stand_without_content() -> None:
    """A message that is refused only for its tool calls is not blamed for the content that it may lack."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1"}]}
    assert refused(messages=[*HELLO, message]).param == "messages[1].tool_calls"


# ---- bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"hello",
        b"{'model': 'm'}",
        b'{"model": "m",}',
        b'{"model": "m"} {}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 01}',
        b'{"model": "\xff"}',
        '{"model": "m"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"model": "m"}',
        b'{"model": "a\nb"}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"model":' * 100_000,
        b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)
def test_what_is_not_json_is_refused_with_its_position(body: bytes) -> None:
    """Malformed JSON, NaN, other encodings and bottomless nesting are a 400 that says where."""
    error = refusal(body)
    assert (error.param, error.code) == (None, "invalid_json")
    assert error.message.startswith("the body is not valid JSON: ")
    assert " at line 1 column " in error.message or " at line 2 column " in error.message


@pytest.mark.parametrize("text", [r"\ud800", r"a\ud800b", r"\udc00", r"\ud800\u0041", r"\udc00\ud800"])
def test_half_a_surrogate_pair_is_no_text(text: str) -> None:
    """An escape that no text can hold is refused in words, in values and in keys."""
    for body in (f'{{"model": "{text} and more"}}', f'{{"{text} and more": 1}}'):
        assert "half of a surrogate pair at line 1" in refusal(body.encode()).message


def test_surrogate_pairs_are_characters() -> None:
    """An escaped pair is the character that it spells."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert parse(body).messages[0].content == "😀"


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"text"', b"true"])
def test_a_body_is_an_object(body: bytes) -> None:
    """Any other JSON value is refused, and shown."""
    assert refusal(body).message == f"the body must be a JSON object, not {body.decode()}"


def test_of_equal_keys_the_last_one_counts() -> None:
    """As in Python and JavaScript."""
    body = b'{"model": "m", "n": 500, "messages": [{"role": "user", "content": "hello"}], "n": 3}'
    assert parse(body).sampling.n == 3


def test_long_values_are_shown_by_their_beginning() -> None:
    """A refusal repeats at most 60 characters of what was sent."""
    assert len(refused(stop=["x" * 10_000] * 5).message) < 200
    assert len(refused(messages=[{"role": "r" * 10_000, "content": ""}]).message) < 200
    assert len(refused(logit_bias={"k" * 10_000: 1}).message) < 200
    assert len(refused(max_tokens=10**4000, max_completion_tokens=10**4000 + 1).message) < 300
    assert len(refused(min_tokens=10**4000).message) < 200


# ---- properties ---------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs too
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
OPTIONAL = sorted(
    ChatRequest.model_fields.keys() - {"model", "messages"} | {name for name in UNSERVED if "." not in name}
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_call_id", "tool_calls", "audio"]),
        st.sampled_from(["user", "assistant", "tool", None])
        | st.lists(st.dictionaries(st.sampled_from(["type", "text"]), st.just("text") | json_values))
        | json_values,
    ),
    max_size=3,
)
nearly_requests = st.fixed_dictionaries(
    {"model": st.just("m") | json_values, "messages": st.just(HELLO) | messages | json_values},
    optional={name: st.none() | st.integers(-2, 3) | json_values for name in OPTIONAL},
)


def answer_to(body: bytes) -> None:
    """A body either reaches the replica, whole, or is refused in words."""
    outcome: Chat | InvalidRequest
    try:
        outcome = parse(body)
    except InvalidRequest as error:
        outcome = error
    if isinstance(outcome, Chat):
        submit = Submit(1, outcome)
        assert decode_to_replica(bytes(encode(submit)[4:])) == submit
    else:
        assert 0 < len(outcome.message) < 400
        assert json.loads(outcome.body())["error"]["message"] == outcome.message


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    """No body whatsoever makes anything but a request or an InvalidRequest."""
    answer_to(body)


@settings(deadline=None)
@given(json_values)
def test_any_json_is_a_request_or_refused(value: Any) -> None:
    """Nor does any JSON value."""
    answer_to(json.dumps(value).encode())


@settings(deadline=None)
@given(nearly_requests)
def test_anything_under_the_right_names_is_a_request_or_refused(body: dict[str, Any]) -> None:
    """Nor do the API's own names with any values; and what is accepted survives the trunk."""
    answer_to(json.dumps(body).encode())


# ---- the OpenAPI document -----------------------------------------------------------------------------

PROPERTIES: dict[str, dict[str, Any]] = ChatRequest.model_json_schema()["properties"]


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_document_says_what_each_parameter_is(name: str) -> None:
    """Each parameter is described with an example that is accepted; each optional one shows its default and
    that it may be null."""
    property_ = PROPERTIES[name]
    assert property_["description"].endswith(".")
    for example in property_["examples"]:
        together = {"stream": True} if name == "stream_options" else {}
        chat(**{name: example}, **together)
    if name not in {"model", "messages"}:
        assert "default" in property_
        assert {"type": "null"} in property_["anyOf"]


@pytest.mark.parametrize("name", sorted(SAMPLING.keys() - {"logit_bias", "stop", "stop_token_ids"}))
def test_the_documents_defaults_are_the_real_ones(name: str) -> None:
    """What the document calls the default is what a replica is told, and what its message type says."""
    assert PROPERTIES[name]["default"] == getattr(chat().sampling, name)
    assert chat().sampling == Sampling(max_tokens=24)


def test_the_document_shows_the_ranges() -> None:
    """The numbers of the API's table stand in the schema."""
    temperature, seed = PROPERTIES["temperature"]["anyOf"][0], PROPERTIES["seed"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    assert (seed["minimum"], seed["maximum"]) == (-INT64, INT64 - 1)


def test_a_model_is_listed_with_what_clients_key_on() -> None:
    """The entry of a model has the fields that the API lists, and real clients require."""
    always = {"id", "object", "created", "owned_by", "name", "is_chat", "is_text", "state", "kind"}
    where_known = {
        "max_context_length",
        "description",
        "creator",
        "license_name",
        "license_url",
        "public_endpoint_pricing",
        "docs_url",
        "prompt_guide_url",
    }
    assert Model.model_fields.keys() == always | where_known
    assert {name for name, field in Model.model_fields.items() if field.default is None} == where_known


def test_what_crosses_the_trunk_is_the_request() -> None:
    """The struct holds the ids that the router chose and nothing that it was not given."""
    assert parse({"model": "M", "messages": HELLO}) == Chat(
        id="chat-1",
        model="M",
        created=1_700_000_000,
        messages=(Message("user", "hello"),),
        sampling=Sampling(max_tokens=24),
    )
    assert msgspec.structs.asdict(parse({"model": "M", "messages": HELLO}))["stream"] is False
