from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.answers import Model
from router.errors import InvalidRequest
from router.protocol import MAX_TOKEN_ID, ChatRequest, TextRequest, model_name, parse_chat, parse_text
from router.settings import ModelSettings
from router.unserved import UNSERVED_IN_CHAT
from serving.messages import (
    Chat,
    Message,
    Request,
    ResponseFormat,
    Sampling,
    Submit,
    Tool,
    decode_to_replica,
    encode,
)
from tests.router.asking import HELLO, chat, parse, parse_as_text, refusal, refused

INT64 = 2**63

F = {"type": "function", "function": {"name": "f"}}


NUMBERS = sorted(
    name
    for name, property_ in ChatRequest.model_json_schema()["properties"].items()
    if {"type": "number"}.items() <= property_.get("anyOf", [{}])[0].items()
)


# ---- parameters, beside what the table in test_parameters.py says of each -----------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_too_large_to_be_finite_is_refused(name: str) -> None:
    """JSON spells no infinity, but 1e999 reads as one; it is in no range."""
    body = f'{{"model": "m", "messages": {json.dumps(HELLO)}, "{name}": 1e999}}'
    assert refusal(body.encode()).param == name


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        (
            {"stop": ["a", ""]},
            "stop[1]",
            'stop[1] must be a non-empty string of at most 1024 characters, not ""',
        ),
        (
            {"stop": [None]},
            "stop[0]",
            "stop[0] must be a non-empty string of at most 1024 characters, not null",
        ),
        (
            {"stop": ["a", "x" * 1025]},
            "stop[1]",
            f'stop[1] must be a non-empty string of at most 1024 characters, not "{"x" * 56}...',
        ),
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
    extra = {"extra_body": {"a": 1}, "store": True, "service_tier": "auto", "repetition_factor": 2, "": None}
    assert chat(**extra) == chat()
    assert parse({"model": "m", "messages": [{**HELLO[0], "refusal": None, "annotations": []}]}) == chat()


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


def test_a_deployment_may_have_the_multiplicative_repetition_penalty() -> None:
    """There it is neutral at 1, its default, and in a range of its own; otherwise it is the additive one."""
    body = {"model": "m", "messages": HELLO}
    for value, factor in ((None, 1.0), (2, 2.0), (0.01, 0.01), (1, 1.0)):
        sampling = parse(body | {"repetition_penalty": value}, repetition_penalty="multiplicative").sampling
        assert (sampling.repetition_penalty, sampling.repetition_factor) == (0.0, factor)
    assert parse(body, repetition_penalty="multiplicative") == chat()
    assert chat(repetition_penalty=2).sampling.repetition_factor == 1.0
    for wrong in (0, -1, 2.01, True, "1", 10**400):
        with pytest.raises(
            InvalidRequest, match="repetition_penalty must be a number above 0 and up to 2, not"
        ):
            parse(body | {"repetition_penalty": wrong}, repetition_penalty="multiplicative")


def test_min_tokens_may_not_pass_max_tokens() -> None:
    """More tokens at least than at most is refused, the default limit included."""
    assert chat(max_tokens=30, min_tokens=30).sampling.min_tokens == 30
    assert refused(max_tokens=30, min_tokens=31).param == "min_tokens"
    assert "which is 24, not 25" in refused(min_tokens=25).message


# ---- stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [{}, {"stream": None}, {"stream": False}])
def test_stream_options_need_a_stream(stream: dict[str, Any]) -> None:
    """Options of a stream that was not asked for are refused, as OpenAI does."""
    assert refused(stream_options={"include_usage": True}, **stream).param == "stream_options"
    assert chat(stream_options=None, **stream) == chat()


# ---- what is required ----------------------------------------------------------------------------------


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


# ---- answers that have an end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "beside"),
    [
        ({"response_format": {"type": "json_object"}}, "a response_format of type json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "a response_format of type json_schema",
        ),
        ({"tools": [F], "tool_choice": "required"}, "a tool_choice that must be followed"),
        ({"tools": [F], "tool_choice": F}, "a tool_choice that must be followed"),
    ],
)
def test_nothing_follows_on_an_answer_with_a_form(parameters: dict[str, Any], beside: str) -> None:
    """Where an answer must be JSON or a call it ends with it, so ignore_eos is refused there; elsewhere it
    may go on."""
    error = refused(ignore_eos=True, **parameters)
    assert error.param == "ignore_eos"
    assert error.message == f"ignore_eos must be false or left out beside {beside}, not true"
    assert not chat(ignore_eos=False, **parameters).sampling.ignore_eos
    free: list[dict[str, Any]] = [
        {"response_format": {"type": "text"}},
        *({"tools": [F], "tool_choice": choice} for choice in ("auto", "none", None)),
    ]
    assert all(chat(ignore_eos=True, **others).sampling.ignore_eos for others in free)


# ---- logprobs -----------------------------------------------------------------------------------------


def test_logprobs_are_as_many_as_asked_for() -> None:
    """To ask for logprobs alone is to be told of the chosen tokens, for top_logprobs of others beside them.
    Those need logprobs, but to ask for none is to ask for nothing."""
    assert (chat().logprobs, chat(logprobs=True).logprobs) == (None, 0)
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert chat(logprobs=False, top_logprobs=None) == chat()
    assert refused(top_logprobs=0).message == "top_logprobs needs logprobs to be true, not false"
    error = refused(top_logprobs=1)
    assert (error.param, error.message) == (
        "top_logprobs",
        "top_logprobs needs logprobs to be true, not false",
    )


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
    (ChatRequest.model_json_schema()["properties"].keys() | UNSERVED_IN_CHAT.keys()) - {"model", "messages"}
)
words = st.sampled_from(
    [
        *("type", "function", "name", "parameters", "json_schema", "schema", "strict", "description", "id"),
        *("arguments", "json_object", "text", "required", "auto", "f"),
    ]
)
nested = st.recursive(
    words | st.none() | st.just({}) | json_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_call_id", "tool_calls", "reasoning", "audio"]),
        st.sampled_from(["user", "assistant", "tool", None])
        | st.lists(st.dictionaries(st.sampled_from(["type", "text"]), st.just("text") | json_values))
        | nested,
    ),
    max_size=3,
)
nearly_chats = st.fixed_dictionaries(
    {"model": st.just("m") | json_values, "messages": st.just(HELLO) | messages | json_values},
    optional={name: st.none() | st.integers(-2, 3) | nested for name in OPTIONAL},
)
prompts = st.recursive(
    texts | st.integers(-1, 5) | st.integers() | json_values,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
nearly_texts = st.fixed_dictionaries(
    {"model": st.just("m") | json_values, "prompt": prompts},
    optional={
        name: st.none() | st.integers(-2, 3) | json_values
        for name in sorted(TextRequest.model_json_schema()["properties"].keys() - {"model", "prompt"})
    },
)


def answer_to(body: bytes) -> None:
    """A body either reaches the replica, whole, or is refused in words, at both endpoints."""
    for read in (parse, parse_as_text):
        outcome: Request | InvalidRequest
        try:
            outcome = read(body)
        except InvalidRequest as error:
            outcome = error
        if isinstance(outcome, InvalidRequest):
            assert 0 < len(outcome.message) < 400
            assert json.loads(outcome.body())["error"]["message"] == outcome.message
        else:
            submit = Submit(1, outcome)
            assert decode_to_replica(bytes(encode(submit)[4:])) == submit


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
@given(nearly_chats | nearly_texts)
def test_anything_under_the_right_names_is_a_request_or_refused(body: dict[str, Any]) -> None:
    """Nor do the API's own names with any values; and what is accepted survives the trunk."""
    answer_to(json.dumps(body).encode())


# ---- the OpenAPI document -----------------------------------------------------------------------------

DOCUMENTED = {kind: kind.model_json_schema() for kind in (ChatRequest, TextRequest)}
DESCRIBED = [
    (kind, place, name)
    for kind, schema in DOCUMENTED.items()
    for place in ("", *schema["$defs"])
    for name in (schema["$defs"][place] if place else schema)["properties"]
]
"""Each field of a request, or of something in it, and where it stands."""


@pytest.mark.parametrize(("kind", "place", "name"), DESCRIBED)
def test_the_document_says_what_each_field_is(kind: Any, place: str, name: str) -> None:
    """Each is described in a sentence, with an example unless it is described elsewhere; each that may be
    left out shows its default, and that it may be null."""
    schema = DOCUMENTED[kind]
    schema = schema["$defs"][place] if place else schema
    field = schema["properties"][name]
    assert field["description"].endswith(".")
    assert "examples" in field or "$ref" in field
    if name not in schema.get("required", ()):
        assert "default" in field
        assert {"type": "null"} in field["anyOf"]


TOGETHER: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "get_weather"}}]},
}
"""What some examples need beside them."""


@pytest.mark.parametrize(("kind", "place", "name"), [each for each in DESCRIBED if not each[1]])
def test_the_documents_examples_are_good(kind: Any, place: str, name: str) -> None:
    """What the document shows as an example is taken."""
    body: dict[str, Any] = {"model": "m", "prompt": "a", "messages": HELLO}
    read = parse_text if kind is TextRequest else parse_chat
    for example in DOCUMENTED[kind]["properties"][name]["examples"]:
        read(body | TOGETHER.get(name, {}) | {name: example}, ModelSettings(name="m"))


PROPERTIES: dict[str, dict[str, Any]] = DOCUMENTED[ChatRequest]["properties"]


def test_the_documents_defaults_are_the_message_types() -> None:
    """What a message type's own default is, the router puts in."""
    assert chat().sampling == Sampling(max_tokens=24)
    assert chat() == Chat("chatcmpl-key", "m", 1_700_000_000, (Message("user", "hello"),), chat().sampling)


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
        "price",
        "docs_url",
        "prompt_guide_url",
    }
    assert Model.model_fields.keys() == always | where_known
    assert {name for name, field in Model.model_fields.items() if field.default is None} == where_known


def test_everything_crosses() -> None:
    """The replica gets all that was asked for, each in its own field."""
    schema = {"type": "object"}
    asked = chat(
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
        logprobs=True,
        top_logprobs=3,
    )
    assert asked == msgspec.structs.replace(
        chat(),
        response_format=ResponseFormat('{"type":"object"}'),
        tools=(Tool("f", None, '{"type":"object"}', None),),
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning_effort="low",
        chat_template_kwargs='{"enable_thinking":false}',
        logprobs=3,
    )


def test_what_crosses_the_trunk_is_the_request() -> None:
    """The struct holds the ids that the router chose and nothing that it was not given."""
    assert parse({"model": "M", "messages": HELLO}) == Chat(
        id="chatcmpl-key",
        model="M",
        created=1_700_000_000,
        messages=(Message("user", "hello"),),
        sampling=Sampling(max_tokens=24),
    )
    assert msgspec.structs.asdict(parse({"model": "M", "messages": HELLO}))["stream"] is False
