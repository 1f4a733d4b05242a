"""Every parameter of both endpoints, from a client to what an engine is asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest
import pytest_asyncio

from router.conversation import MAX_TOOLS
from router.protocol import (
    MAX_LOGIT_BIAS,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    ChatRequest,
    TextRequest,
)
from router.settings import ModelLimits
from serving.echo import EchoArguments, EchoEngine
from serving.engine import Prompt
from serving.messages import Chat, Message, NamedTool, Request, ResponseFormat, Sampling, Text, Tool
from tests.harness import Deployment, deployed, served

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
INT64 = 2**63
MOST = 2**31 - 1
"""Tokens that any larger count stands for."""


class Parameter(NamedTuple):
    """One parameter: what an engine is asked for by default, and for what is sent, and what is refused."""

    default: Any
    good: list[tuple[Any, Any]]
    """What is sent, and what the engine is asked for: both ends, and something between."""
    bad: list[Any]
    """One past each end, and what is of another type."""
    expected: str
    """In every refusal of it."""
    beside: Mapping[str, Any] = MappingProxyType({})
    """What it needs beside it."""


def same(*values: Any) -> list[tuple[Any, Any]]:
    """Values that an engine is asked for as they were sent."""
    return [(value, value) for value in values]


def floats(*values: float) -> list[tuple[Any, Any]]:
    """Numbers, which an engine is asked for as floats, however they were written."""
    return [(value, float(value)) for value in values]


NO_NUMBER = ["1", True, [1], {}]
NO_INTEGER = [*NO_NUMBER, 1.0, 1.5]
NO_BOOLEAN = ["true", 0, 1, 1.0, [], {}]
NO_STRING = [5, True, ["x"], {}]
NO_OBJECT = ["x", 5, True, []]

PENALTY = Parameter(0.0, floats(-2, 2, 0, 1.5), [-2.01, 2.01, *NO_NUMBER], "a number from -2 to 2")
SHARE = floats(0, 1, 0.5)
LENGTHS = [(1, 1), (4096, 4096), (MOST, MOST), (MOST + 1, MOST), (10**30, MOST)]

FUNCTION = {"type": "function", "function": {"name": "f"}}
NAMED_F = {"type": "function", "function": {"name": "f"}}
SCHEMA: dict[str, Any] = {"type": "object", "maximum": 10**30}


def json_format(**fields: Any) -> dict[str, Any]:
    """A response_format with a schema of that description."""
    return {"type": "json_schema", "json_schema": {"name": "a-Z_9", **fields}}


BOTH = {
    "model": Parameter(
        None, [("echo", "echo"), ("ECHO", "echo"), ("e", "e")], ["", *NO_STRING], "a non-empty string"
    ),
    "stream": Parameter(default=False, good=same(True, False), bad=NO_BOOLEAN, expected="true or false"),
    "stream_options": Parameter(
        default=False,
        good=[({}, False), ({"include_usage": None}, False), ({"include_usage": True}, True)],
        bad=[*NO_OBJECT, {"include_usage": 1}],
        expected="must be",
        beside={"stream": True},
    ),
    "temperature": Parameter(
        1.0, floats(0, 2, 0.7), [-0.01, 2.01, 10**400, *NO_NUMBER], "a number from 0 to 2"
    ),
    "top_p": Parameter(1.0, SHARE, [-0.01, 1.01, *NO_NUMBER], "a number from 0 to 1"),
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "repetition_penalty": PENALTY,
    "logit_bias": Parameter(
        {},
        [
            ({}, {}),
            ({"0": -100, "50256": 100, "7": 0.5}, {0: -100.0, 50256: 100.0, 7: 0.5}),
            ({str(i): 1 for i in range(MAX_LOGIT_BIAS)}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)),
        ],
        [
            *({"1": bias} for bias in (-100.1, 100.1, "5", True, None)),
            *({key: 1} for key in ("a", "-1", " 1", "1.0", "٣", "", "1" * 11)),
            {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)},
            {str(i): "x" for i in range(MAX_LOGIT_BIAS + 1)},
            *NO_OBJECT,
        ],
        "must",
    ),
    "n": Parameter(1, same(1, 2, 128), [0, 129, -1, *NO_INTEGER], "an integer from 1 to 128"),
    "seed": Parameter(
        None,
        same(-INT64, INT64 - 1, -1, 0),
        [-INT64 - 1, INT64, *NO_INTEGER],
        "an integer from -9223372036854775808 to 9223372036854775807",
    ),
    "stop": Parameter(
        (),
        [
            ("x", ("x",)),
            ([], ()),
            (["a", "b", "c", "d"], ("a", "b", "c", "d")),
            (["a", "a"], ("a", "a")),
            ("é" * MAX_STOP_CHARACTERS, ("é" * MAX_STOP_CHARACTERS,)),
        ],
        [
            *("", 5, True, {}, ["a", "b", "c", "d", "e"], ["a", ""], [None]),
            *("x" * (MAX_STOP_CHARACTERS + 1), ["a", "x" * (MAX_STOP_CHARACTERS + 1)]),
        ],
        "a non-empty string",
    ),
    "top_k": Parameter(
        0, [(-1, 0), (0, 0), (1, 1), (10**30, MOST)], [-2, *NO_INTEGER], "an integer of at least -1"
    ),
    "min_p": Parameter(0.0, SHARE, [-0.01, 1.01, *NO_NUMBER], "a number from 0 to 1"),
    "min_tokens": Parameter(0, same(0, 16), [-1, *NO_INTEGER], "an integer of at least 0"),
    "ignore_eos": Parameter(default=False, good=same(True, False), bad=NO_BOOLEAN, expected="true or false"),
    "stop_token_ids": Parameter(
        (),
        [
            ([], ()),
            ([0, MAX_TOKEN_ID], (0, MAX_TOKEN_ID)),
            ([5] * MAX_STOP_TOKEN_IDS, (5,) * MAX_STOP_TOKEN_IDS),
        ],
        [5, "5", {}, [5] * (MAX_STOP_TOKEN_IDS + 1), [-1], [MAX_TOKEN_ID + 1], ["5"], [None]],
        "an integer from 0 to 2147483647",
    ),
    "user": Parameter(None, [("u-1", None), ("", None)], NO_STRING, "a string"),
}

ONLY_CHAT = {
    "messages": Parameter(
        None,
        [
            ([{"role": "user", "content": "a b"}], (Message("user", "a b"),)),
            ([{"role": "user", "content": "a"}] * 16, (Message("user", "a"),) * 16),
        ],
        ["hello", 5, {}, [], ["hello"], [{}], [{"role": "user", "content": "a"}] * 17],
        "must",
    ),
    "max_completion_tokens": Parameter(24, LENGTHS, [0, -1, *NO_INTEGER], "an integer of at least 1"),
    "max_tokens": Parameter(24, LENGTHS, [0, -1, *NO_INTEGER], "an integer of at least 1"),
    "logprobs": Parameter(None, [(True, 0), (False, None)], NO_BOOLEAN, "true or false"),
    "top_logprobs": Parameter(
        0, same(0, 5, 20), [-1, 21, *NO_INTEGER], "an integer from 0 to 20", {"logprobs": True}
    ),
    "response_format": Parameter(
        None,
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, ResponseFormat()),
            (json_format(), ResponseFormat()),
            (json_format(schema=None, strict=None, description=None), ResponseFormat()),
            (
                json_format(schema=SCHEMA, strict=True, description="d"),
                ResponseFormat(json.dumps(SCHEMA, separators=(",", ":"))),
            ),
        ],
        [
            *NO_OBJECT,
            *({}, {"type": "xml"}, {"type": None}, {"type": "json_schema"}),
            *({"type": "json_schema", "json_schema": wrong} for wrong in ({}, None, "x", {"name": ""})),
            *({"type": "json_schema", "json_schema": {"name": name}} for name in ("a b", "ä", "x" * 65, 5)),
            *(json_format(schema=schema) for schema in NO_OBJECT),
            *(json_format(strict=1), json_format(description=1)),
        ],
        "must be",
    ),
    "tools": Parameter(
        (),
        [
            ([], ()),
            ([FUNCTION], (Tool("f"),)),
            ([FUNCTION] * MAX_TOOLS, (Tool("f"),) * MAX_TOOLS),
            (
                [
                    {
                        "type": "function",
                        "function": {
                            "name": "x" * 64,
                            "description": "d",
                            "parameters": SCHEMA,
                            "strict": False,
                        },
                    }
                ],
                (Tool("x" * 64, "d", json.dumps(SCHEMA, separators=(",", ":")), strict=False),),
            ),
        ],
        [
            *("x", 5, True, {}, [5], [{}], [FUNCTION] * (MAX_TOOLS + 1)),
            *([{"type": "function", "function": wrong}] for wrong in (None, "f", {}, {"name": "x" * 65})),
            [{"type": "custom", "custom": {"name": "f"}}],
            [{"type": "function", "function": {"name": "f", "parameters": "{}"}}],
        ],
        "must be",
    ),
    "tool_choice": Parameter(
        "auto",
        [*same("none", "auto", "required"), (NAMED_F, NamedTool("f"))],
        [
            *("any", 5, True, [], {}, {"type": "custom"}, {"type": "function"}),
            *({"type": "function", "function": wrong} for wrong in (None, "f", {}, {"name": "g"})),
        ],
        "must be",
        {"tools": [FUNCTION]},
    ),
    "parallel_tool_calls": Parameter(
        default=True, good=same(True, False), bad=NO_BOOLEAN, expected="true or false"
    ),
    "reasoning_effort": Parameter(
        None,
        same("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        ["", "Low", *NO_STRING],
        'one of "none", "minimal", "low"',
    ),
    "chat_template_kwargs": Parameter(
        None, [({}, "{}"), ({"a": {"b": 1}}, '{"a":{"b":1}}')], NO_OBJECT, "an object"
    ),
    "metadata": Parameter(None, [({}, None), ({"a": [1]}, None)], NO_OBJECT, "an object"),
}

ONLY_TEXT = {
    "prompt": Parameter(
        None,
        [
            ("a b", ("a b",)),
            ("", ("",)),
            (["a"], ("a",)),
            (["a", ""], ("a", "")),
            (["a"] * MAX_PROMPTS, ("a",) * MAX_PROMPTS),
            ([5], ((5,),)),
            ([0, MAX_TOKEN_ID], ((0, MAX_TOKEN_ID),)),
            ([[1]], ((1,),)),
            ([[1], [2, 3]], ((1,), (2, 3))),
            ([[1]] * MAX_PROMPTS, ((1,),) * MAX_PROMPTS),
        ],
        [
            *(5, True, {}, [], [None], [True], [1.0], [{}], ["a"] * (MAX_PROMPTS + 1)),
            *([-1], [MAX_TOKEN_ID + 1], [1, "a"], ["a", 1], [[]], [[1], []], [[1], "a"], [[1], [-1]]),
            [[1]] * (MAX_PROMPTS + 1),
        ],
        "must be",
    ),
    # An engine cannot do with less than one token: for who wants none the replica drops it.
    "max_tokens": Parameter(16, [(0, 1), *LENGTHS], [-1, *NO_INTEGER], "an integer of at least 0"),
    "echo": Parameter(default=False, good=same(True, False), bad=NO_BOOLEAN, expected="true or false"),
    "logprobs": Parameter(None, same(0, 5), [-1, 6, *NO_INTEGER], "an integer from 0 to 5"),
    "best_of": Parameter(None, [(2, None)], [1, 3, 10**30, *NO_INTEGER], "best_of must", {"n": 2}),
}

TABLE = {
    CHAT: BOTH | ONLY_CHAT,
    TEXT: BOTH | ONLY_TEXT,
}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]},
    TEXT: {"model": "echo", "prompt": "one two three"},
}
REQUESTS: dict[str, type[ChatRequest | TextRequest]] = {CHAT: ChatRequest, TEXT: TextRequest}
OPTIONAL = [(path, name) for path, table in TABLE.items() for name in table if name not in BODIES[path]]
EVERY = [(path, name) for path, table in TABLE.items() for name in table]


# ---- the way there ------------------------------------------------------------------------------------


class Attentive(EchoEngine):
    """An echo engine that remembers what it was asked for last, but for what differs each time."""

    asked: Request | None = None

    async def render(self, request: Request) -> list[Prompt]:
        self.asked = msgspec.structs.replace(request, id="", created=0)
        return await super().render(request)


ENGINE = Attentive(EchoArguments(max_model_len=300))
"""Its context is short, as it talks until max_tokens."""


class Outcome(NamedTuple):
    """What became of a request, without what differs each time."""

    status: int
    asked: Request | None
    """What the engine was asked for."""
    error: dict[str, Any] | None
    choices: dict[int, tuple[str, str]]
    """Each choice's text and how it ended."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    """One echo model that takes up to 16 messages, and has a short name beside its own."""
    async with deployed(served(ENGINE, aliases=("e",), limits=ModelLimits(messages=16))) as one:
        yield one


async def ask(deployment: Deployment, path: str, name: str, *, streamed: bool, **parameters: Any) -> Outcome:
    """Send a small request with these parameters. `name` is the one that the table is at: of whether to
    stream it may have its own idea."""
    ENGINE.asked = None
    form = {} if name == "stream" else {"stream": streamed}
    response = await deployment.http.post(path, json=BODIES[path] | form | parameters)
    if response.status_code != 200:
        return Outcome(response.status_code, ENGINE.asked, response.json()["error"], {})
    if response.headers["content-type"] == "application/json":
        return Outcome(200, ENGINE.asked, None, gathered([response.json()]))
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return Outcome(
        200, ENGINE.asked, None, gathered([json.loads(event.removeprefix("data: ")) for event in events])
    )


def gathered(pieces: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """The choices of an answer, whole or in pieces."""
    choices: dict[int, tuple[str, str]] = {}
    for piece in [choice for event in pieces for choice in event["choices"]]:
        said = piece.get("message") or piece.get("delta") or {}
        text, _ = choices.get(piece["index"], ("", ""))
        choices[piece["index"]] = (
            text + (piece.get("text") or said.get("content") or ""),
            piece["finish_reason"],
        )
    return choices


async def both_ways(
    deployment: Deployment, path: str, name: str, **parameters: Any
) -> tuple[Outcome, Outcome]:
    """What becomes of a request whole, and streamed."""
    whole = await ask(deployment, path, name, streamed=False, **parameters)
    return whole, await ask(deployment, path, name, streamed=True, **parameters)


ELSEWHERE = {
    "stream_options": "include_usage",
    "max_completion_tokens": "max_tokens",
    "top_logprobs": "logprobs",
    "prompt": "prompts",
}
"""What an engine knows by another name."""


def heard(asked: Request | None, name: str) -> Any:
    """What an engine was asked for under the name of a parameter; None where it does not hear of it."""
    assert asked is not None, "the engine was not asked"
    known = ELSEWHERE.get(name, name)
    return getattr(asked.sampling if known in Sampling.__struct_fields__ else asked, known, None)


def document(path: str, name: str) -> dict[str, Any]:
    """What the OpenAPI document says of a parameter."""
    property_: dict[str, Any] = REQUESTS[path].model_json_schema()["properties"][name]
    return property_


# ---- the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "name"), OPTIONAL)
async def test_left_out_and_null_mean_the_default(deployment: Deployment, path: str, name: str) -> None:
    """An optional parameter may be left out, be null, or be the default that the document names: an engine is
    asked for the same, and answers the same."""
    parameter = TABLE[path][name]
    left_out = await both_ways(deployment, path, name, **parameter.beside)
    assert [outcome.status for outcome in left_out] == [200, 200]
    assert heard(left_out[0].asked, name) == parameter.default
    for value in (None, document(path, name)["default"]):
        assert await both_ways(deployment, path, name, **parameter.beside, **{name: value}) == left_out


@pytest.mark.parametrize(("path", "name"), EVERY)
async def test_values_up_to_both_ends_are_taken(deployment: Deployment, path: str, name: str) -> None:
    """The ends of each range belong to it. An engine is asked for the value in its own type, and what it says
    is the same whole and streamed, also where that is that it cannot do it."""
    parameter = TABLE[path][name]
    for sent, expected in parameter.good:
        whole, streamed = await both_ways(deployment, path, name, **parameter.beside, **{name: sent})
        for outcome in (whole, streamed):
            value = heard(outcome.asked, name)
            assert (value, type(value)) == (expected, type(expected)), sent
        assert whole.status == 200 or "this model repeats words" in (whole.error or {})["message"], sent
        assert (whole.error, whole.choices) == (streamed.error, streamed.choices), sent


@pytest.mark.parametrize(("path", "name"), EVERY)
async def test_values_past_an_end_or_of_another_type_are_refused(
    deployment: Deployment, path: str, name: str
) -> None:
    """One past each end, and each wrong type, is a 400 that names the parameter, the value and what was
    expected, whole and streamed, and no engine hears of it. A string is no number, a boolean no integer, and
    1.0 no integer either."""
    parameter = TABLE[path][name]
    for sent in parameter.bad:
        whole, streamed = await both_ways(deployment, path, name, **parameter.beside, **{name: sent})
        assert whole == streamed, sent
        assert (whole.status, whole.asked) == (400, None), sent
        error = whole.error or {}
        assert error["type"] == "invalid_request_error"
        assert error["param"].split(".")[0].split("[")[0] == name, sent
        assert error["message"].startswith(error["param"])
        assert parameter.expected in error["message"], sent
        if isinstance(sent, int | float | str) and len(str(sent)) < 50 and error["code"] == "invalid_value":
            assert error["message"].endswith(f"not {json.dumps(sent)}")


@pytest.mark.parametrize("path", TABLE)
async def test_the_table_has_every_parameter(path: str) -> None:
    """No parameter of the API, and nothing that an engine is asked for, goes untested."""
    assert TABLE[path].keys() == REQUESTS[path].model_json_schema()["properties"].keys()
    asked = (Chat if path == CHAT else Text).__struct_fields__
    known = {ELSEWHERE.get(name, name) for name in TABLE[path]}
    ours = {"id", "created", "sampling", "role_in_every_chunk", "repetition_factor"}
    assert {*asked, *Sampling.__struct_fields__} - ours <= known


ENDS = {
    "minimum": int | float,
    "maximum": int | float,
    "minLength": str,
    "minItems": list,
    "maxItems": list,
    "maxProperties": dict,
}
"""The words of JSON Schema for a bound, and what they bound."""


@pytest.mark.parametrize(("path", "name"), EVERY)
async def test_the_table_has_both_ends(path: str, name: str) -> None:
    """Each bound that the document names is taken in the table above, and one past it is refused."""
    parameter = TABLE[path][name]
    schema = document(path, name)
    for branch in schema.get("anyOf", schema.get("oneOf", [schema])):
        for end in branch.keys() & ENDS.keys():
            outwards = -1 if end.startswith("min") else 1
            past = [(size - branch[end]) * outwards for size in sizes(parameter.bad, ENDS[end])]
            assert branch[end] in sizes([sent for sent, _ in parameter.good], ENDS[end]), end
            assert any(0 < distance <= 1 for distance in past), end


def sizes(values: list[Any], kind: Any) -> list[float]:
    """How much each of the values of that type is."""
    ones = [value for value in values if isinstance(value, kind) and not isinstance(value, bool)]
    return [value if isinstance(value, int | float) else len(value) for value in ones]
