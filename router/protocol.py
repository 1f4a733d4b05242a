"""The requests that the router takes and the shapes that it answers in.

The types below are at once the check and the text of every refusal: what a message says was expected is read
from their JSON schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, with_config
from pydantic_core import CoreSchema, ErrorDetails, from_json
from typing_extensions import TypedDict

from router.errors import InvalidRequest, shown
from serving.messages import Chat, Message, Sampling

MAX_STOP = 4
"""Stop strings of one request."""

MAX_LOGIT_BIAS = 1024
"""Entries of logit_bias. vLLM's GPU runner has room for as many and fails with more."""

MAX_STOP_TOKEN_IDS = 64
"""Entries of stop_token_ids. vLLM's GPU runner has room for 128, the model's own included."""

MAX_TOKEN_ID = 2**31 - 1
"""No vocabulary goes beyond it; a model's own end is checked by its replica."""

_MOST_TOKENS = 2**31 - 1
"""Any larger count of tokens means the same: more than a context holds. It keeps them within 64 bits."""


class _OrNull:
    """Documents that null is allowed and means the default. `parse_chat` leaves nulls out beforehand."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"type": "null"}]}


T = TypeVar("T")
OrNull = Annotated[T, _OrNull()]

Penalty = Annotated[float, Field(ge=-2, le=2)]
NonEmpty = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[list[NonEmpty], Field(max_length=MAX_STOP, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


STRICT = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
"""No value is turned into another type, and what nobody knows is ignored."""


@with_config(STRICT)
class TextPart(TypedDict):
    """A piece of a message's text. A dict, as a hundred thousand of them fit into one body."""

    type: Annotated[Literal["text"], Field(description="Only text is served.", examples=["text"])]
    text: Annotated[str, Field(description="The text.", examples=["What is the capital of France?"])]


class ChatMessage(BaseModel):
    """One turn of the conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] = Field(
        description="The text, or a list of text parts, which are joined by line breaks.",
        examples=["What is the capital of France?"],
    )
    name: str | None = Field(None, description="Tells speakers of one role apart.", examples=["ada"])
    tool_call_id: str | None = Field(
        None,
        description="Required of a message of role tool: the call that it answers.",
        examples=["call_1"],
    )

    def to_message(self) -> Message:
        """The message as the replica takes it, its text in one piece."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content)
        return Message(self.role, content, self.name)


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    model_config = STRICT

    include_usage: bool | None = Field(
        None,
        description="Whether a last chunk before [DONE] carries the usage of the whole request.",
        examples=[True],
    )


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. Made by `parse_chat`."""

    model_config = STRICT

    model: NonEmpty = Field(
        description="The model that answers, by one of the names that GET /v1/models lists, in any case.",
        examples=["smollm2-135m-instruct"],
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] = Field(
        description="The conversation so far, oldest message first.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    # Before max_tokens, which takes its value where it stands alone: so that an error names this one.
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Another name of max_tokens. Both may be given if they are equal.", examples=[128]
    )
    max_tokens: OrNull[Annotated[int, Field(ge=1)]] = Field(
        24,
        description="The most tokens that a choice may have. Prompt and answer together are bound by the"
        " model's context length: an answer that would leave it ends there, with finish_reason length."
        " A deployment may change the default.",
        examples=[128],
    )
    stream: OrNull[bool] = Field(
        default=False,
        description="Whether the answer comes piece by piece, as server-sent events that end with [DONE].",
        examples=[True],
    )
    stream_options: StreamOptions | None = Field(
        None, description="Only with stream.", examples=[{"include_usage": True}]
    )
    temperature: OrNull[Annotated[float, Field(ge=0, le=2)]] = Field(
        1.0,
        description="How far sampling strays from the likeliest tokens. 0 always takes the likeliest.",
        examples=[0.7],
    )
    top_p: OrNull[Annotated[float, Field(ge=0, le=1)]] = Field(
        1.0,
        description="Samples from the likeliest tokens that together have this much of the probability."
        " 0 keeps only the likeliest.",
        examples=[0.9],
    )
    frequency_penalty: OrNull[Penalty] = Field(
        0.0,
        description="Taken from a token's logit for each time that it stands in the generated text.",
        examples=[0.5],
    )
    repetition_penalty: OrNull[Penalty] = Field(
        0.0,
        description="Taken from a token's logit for each time that it stands in the prompt or the generated"
        " text. Additive, and neutral at 0.",
        examples=[0.5],
    )
    presence_penalty: OrNull[Penalty] = Field(
        0.0,
        description="Taken once from the logit of a token that stands in the generated text.",
        examples=[0.5],
    )
    logit_bias: Annotated[dict[TokenIdKey, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = Field(
        None,
        description="Token ids, in decimal digits, and what is added to their logits before sampling.",
        examples=[{"50256": -100}],
    )
    n: OrNull[Annotated[int, Field(ge=1, le=128)]] = Field(
        1,
        description="How many choices to generate. The tokens of all of them are counted as used.",
        examples=[1],
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None,
        description="With the same seed and parameters the same result comes back, as far as the engine"
        " allows. Choice i takes seed + i.",
        examples=[42],
    )
    stop: NonEmpty | StopStrings | None = Field(
        None,
        description="Strings at which generation ends. The returned text does not contain them.",
        examples=["\n\n", ["###", "User:"]],
    )
    top_k: OrNull[Annotated[int, Field(ge=-1)]] = Field(
        0, description="Samples from this many of the likeliest tokens; 0 or -1: from all.", examples=[40]
    )
    min_p: OrNull[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.0,
        description="Leaves out tokens whose probability is below this share of the likeliest one's.",
        examples=[0.05],
    )
    min_tokens: OrNull[Annotated[int, Field(ge=0)]] = Field(
        0, description="Tokens that a choice has before it may end; at most max_tokens.", examples=[8]
    )
    ignore_eos: OrNull[bool] = Field(
        default=False,
        description="Whether to go on where the model would end, up to max_tokens.",
        examples=[False],
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = (
        Field(None, description="Tokens at which generation ends.", examples=[[2]])
    )
    user: str | None = Field(
        None, description="The caller's name for its own user. Accepted, without effect.", examples=["u-1"]
    )
    metadata: dict[str, Any] | None = Field(
        None, description="Notes of the caller's own. Accepted, without effect.", examples=[{"run": "7"}]
    )

    def to_message(self, id: str, model: str, created: int) -> Chat:  # noqa: A002 - the struct's own name
        """The request as it crosses the trunk, under the completion's id and the model's name as shown."""
        return Chat(
            id=id,
            model=model,
            created=created,
            messages=tuple([message.to_message() for message in self.messages]),
            sampling=self._sampling(),
            stream=self.stream,
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )

    def _sampling(self) -> Sampling:
        return Sampling(
            max_tokens=min(self.max_tokens, _MOST_TOKENS),
            temperature=self.temperature,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            n=self.n,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            top_k=min(max(self.top_k, 0), _MOST_TOKENS),
            min_p=self.min_p,
            min_tokens=min(self.min_tokens, _MOST_TOKENS),
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class _Unserved(NamedTuple):
    """A parameter that is known and would change the answer, but is not served."""

    neutral: tuple[Any, ...] = ()
    """The values, beside null, with which the answer is the same."""
    yet: bool = True
    """Whether it will be served one day."""


UNSERVED = {
    "logprobs": _Unserved((False,)),
    "top_logprobs": _Unserved((0,)),
    "response_format": _Unserved(({"type": "text"},)),
    "tools": _Unserved(([],)),
    "tool_choice": _Unserved(("none", "auto")),
    "messages[].tool_calls": _Unserved(([],)),
    "chat_template_kwargs": _Unserved(({},)),
    "echo": _Unserved((False,)),
    "functions": _Unserved(([],), yet=False),
    "function_call": _Unserved(("none", "auto"), yet=False),
    "messages[].function_call": _Unserved(yet=False),
    "modalities": _Unserved((["text"],), yet=False),
    "audio": _Unserved(yet=False),
    "messages[].audio": _Unserved(yet=False),
    "web_search_options": _Unserved(yet=False),
}
"""Every parameter that is refused by its name, at the top or in a message."""

_IN_MESSAGE = "messages[]."
_UNSERVED_AT_TOP = {name: row for name, row in UNSERVED.items() if not name.startswith(_IN_MESSAGE)}
_UNSERVED_IN_MESSAGE = {
    name.removeprefix(_IN_MESSAGE): row for name, row in UNSERVED.items() if name.startswith(_IN_MESSAGE)
}

_HALF_PAIRS = ("unexpected end of hex escape", "lone leading surrogate in hex escape")
"""The parser's words for a \\ud800 that has no other half: no text can hold it."""


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object that a request's body holds; of equal keys the last one counts.

    Raises InvalidRequest, also for NaN, Infinity, halves of surrogate pairs and deep nesting.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = str(error)
        for half in _HALF_PAIRS:
            reason = reason.replace(half, "half of a surrogate pair")
        raise InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(data)}")
    return data


def model_name(data: dict[str, Any]) -> str:
    """The model that a request asks for, so that the rest can be read under its limits.

    Raises InvalidRequest.
    """
    name = data.get("model")
    if isinstance(name, str) and name:
        return name
    raise _wrong("model", value=data["model"]) if "model" in data else _missing("model")


def parse_chat(data: dict[str, Any], *, max_messages: int, default_max_tokens: int) -> ChatRequest:
    """The request that a JSON object describes.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    _refuse_longer(data, "messages", max_messages)
    _refuse_longer(data, "logit_bias", MAX_LOGIT_BIAS)
    _refuse_unserved(data)
    given = {name: value for name, value in data.items() if value is not None or name in _REQUIRED}
    given.setdefault("max_tokens", given.get("max_completion_tokens", default_max_tokens))
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False)) from None
    _check_together(request)
    return request


def _refuse_unserved(data: dict[str, Any]) -> None:
    _refuse_named(data, _UNSERVED_AT_TOP)
    messages = data.get("messages")
    for position, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and not _UNSERVED_IN_MESSAGE.keys().isdisjoint(message):
            _refuse_named(message, _UNSERVED_IN_MESSAGE, f"messages[{position}].")


def _refuse_named(fields: dict[str, Any], unserved: dict[str, _Unserved], prefix: str = "") -> None:
    for name, value in fields.items():
        row = unserved.get(name)
        if row is None or value is None or any(_is(value, neutral) for neutral in row.neutral):
            continue
        allowed = " or ".join(["left out", "null", *map(shown, row.neutral)])
        raise InvalidRequest(
            f"{prefix}{name} is not supported{' yet' if row.yet else ''}:"
            f" it must be {allowed}, not {shown(value)}",
            param=prefix + name,
            code="unsupported_parameter",
        )


def _refuse_longer(data: dict[str, Any], name: str, limit: int) -> None:
    """Before each entry is looked at: half a million bad ones took seconds."""
    value = data.get(name)
    if isinstance(value, list | dict) and len(value) > limit:
        raise InvalidRequest(f"{name} must have at most {limit} entries, not {len(value)}", param=name)


def _is(value: Any, neutral: Any) -> bool:
    """Whether they are the same in JSON, where 0 is not false."""
    return type(value) is type(neutral) and bool(value == neutral)


def _check_together(request: ChatRequest) -> None:
    """What no field can be checked for alone."""
    if request.max_completion_tokens not in {None, request.max_tokens}:
        raise InvalidRequest(
            f"max_completion_tokens is another name of max_tokens and must equal it where both are given:"
            f" {shown(request.max_completion_tokens)} is not {shown(request.max_tokens)}",
            param="max_completion_tokens",
        )
    if request.min_tokens > request.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, which is {shown(request.max_tokens)},"
            f" not {shown(request.min_tokens)}",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true, not false", param="stream_options")
    for position, message in enumerate(request.messages):
        if message.role == "tool" and message.tool_call_id is None:
            raise InvalidRequest(
                f"messages[{position}].tool_call_id is missing: a message of role tool must say which call it"
                " answers",
                param=f"messages[{position}].tool_call_id",
                code="missing_required_parameter",
            )


# ---- refusals in words: the schema says what was expected --------------------------------------------

_SCHEMA = ChatRequest.model_json_schema()
_REQUIRED = frozenset(_SCHEMA["required"])

Step = str | int


def _refusal(errors: list[ErrorDetails]) -> InvalidRequest:
    """One sentence about the first field that is wrong. Of a union's branches, the one that got furthest into
    the value is meant."""
    placed = [(_steps(error["loc"]), error) for error in errors]
    first = placed[0][0]
    steps, error = max((p for p in placed if p[0][: len(first)] == first), key=lambda p: len(p[0]))
    if error["loc"][-1] == "[key]":
        path = _path(steps[:-1])
        return InvalidRequest(
            f"{path} must have token ids in decimal digits as its keys, not {shown(error['input'])}",
            param=path,
        )
    return _missing(*steps) if error["type"] == "missing" else _wrong(*steps, value=error["input"])


def _missing(*steps: Step) -> InvalidRequest:
    return InvalidRequest(
        f"{_path(steps)} is missing: it must be {_expected(steps)}",
        param=_path(steps),
        code="missing_required_parameter",
    )


def _wrong(*steps: Step, value: Any) -> InvalidRequest:
    return InvalidRequest(
        f"{_path(steps)} must be {_expected(steps)}, not {shown(value)}", param=_path(steps)
    )


def _path(steps: tuple[Step, ...]) -> str:
    """As a programmer writes it: `messages[2].role`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _steps(loc: tuple[Step, ...]) -> tuple[Step, ...]:
    """A location without the names of unions' branches, which pydantic puts between the fields."""
    node, steps = _SCHEMA, []
    for step in loc:
        child = _child(node, step)
        if child is not None:
            node = child
            steps.append(step)
    return tuple(steps)


def _expected(steps: tuple[Step, ...]) -> str:
    """What the schema asks for at that place."""
    node = _SCHEMA
    for step in steps:
        node = _child(node, step) or node
    return " or ".join(_phrase(branch) for branch in _branches(node) if branch.get("type") != "null")


def _branches(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, references followed."""
    if "$ref" in node:
        node = _SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" not in node:
        yield node
    for branch in node.get("anyOf", ()):
        yield from _branches(branch)


def _child(node: dict[str, Any], step: Step) -> dict[str, Any] | None:
    """The schema of an item or a property; None where there is none of that name."""
    for branch in _branches(node):
        if isinstance(step, int):
            child = branch.get("items")
        else:
            anything = next(iter(branch.get("patternProperties", {}).values()), None)
            child = branch.get("properties", {}).get(step, anything)
        if child is not None:
            return dict(child)
    return None


def _phrase(node: dict[str, Any]) -> str:
    """A schema in words, without its alternatives."""
    if "const" in node:
        return shown(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(shown, node["enum"]))
    match node["type"]:
        case "string":
            return "a non-empty string" if node.get("minLength") else "a string"
        case "boolean":
            return "true or false"
        case "integer" | "number":
            return ("an integer" if node["type"] == "integer" else "a number") + _range(node)
        case "array":
            return _array(node) + " or ".join(map(_phrase, _branches(node["items"])))
        case _:
            return (
                f"an object of up to {node['maxProperties']} entries"
                if "maxProperties" in node
                else "an object"
            )


def _array(node: dict[str, Any]) -> str:
    if node.get("minItems"):
        return "a non-empty array, each item "
    return f"an array of up to {node['maxItems']} items, each "


def _range(node: dict[str, Any]) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    if most is None:
        return f" of at least {least}"
    return f" from {least} to {most}"


# ---- answers, where a FastAPI route makes them --------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people: the field, its value and what was expected.")
    type: str = Field(description="The class of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field that is wrong.", examples=["messages[0].role"])
    code: str | None = Field(description="For programs.", examples=["invalid_value"])


class ErrorEnvelope(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail


class Model(BaseModel):
    """An available model. What is not known of it is left out."""

    id: str = Field(description="The name to ask for.", examples=["smollm2-135m-instruct"])
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds.", examples=[1735689600])
    owned_by: str = Field(
        description="Who answers for the deployment or the provider.", examples=["trunkline"]
    )
    name: str = Field(description="The same as id.", examples=["smollm2-135m-instruct"])
    is_chat: bool = Field(description="Whether it answers chat completions.", examples=[True])
    is_text: bool = Field(description="Whether it answers text completions.", examples=[False])
    max_context_length: int | None = Field(
        None, description="Tokens that prompt and answer may have together.", examples=[8192]
    )
    description: str | None = Field(None, description="For people who choose a model.")
    creator: str | None = Field(None, description="Who made the model.")
    license_name: str | None = Field(None, description="The license of its weights.", examples=["Apache-2.0"])
    license_url: str | None = Field(None, description="Where that license can be read.")
    public_endpoint_pricing: str | None = Field(
        None, description="The price in words.", examples=["$0.0003 / 1k tokens"]
    )
    docs_url: str | None = Field(None, description="Where the model is documented.")
    prompt_guide_url: str | None = Field(None, description="How to prompt it.")
    state: Literal["ready", "loading", "stopped", "failed"] = Field(description="Whether it answers now.")
    kind: Literal["hosted", "upstream"] = Field(
        description="Whether it runs here or at an upstream provider."
    )


class ModelList(BaseModel):
    """The available models, aliases as models of their own."""

    object: Literal["list"] = "list"
    data: list[Model]
