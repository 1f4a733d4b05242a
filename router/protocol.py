"""The requests that the router takes, and how they are read.

The types are at once the check, the document and the text of every refusal: what a message says was expected
is read from their JSON schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, from_json

from router.conversation import (
    MAX_SCHEMA_BYTES,
    MAX_TOOLS,
    STRICT,
    AnyMessage,
    AssistantMessage,
    FunctionTool,
    JsonObject,
    NamedToolChoice,
    ResponseFormat,
)
from router.errors import InvalidRequest, shown
from router.refusals import Refusals, missing, wrong
from router.settings import ModelSettings
from router.unserved import (
    UNSERVED_IN_CHAT,
    UNSERVED_IN_TEXT,
    refuse_unserved,
    refuse_unserved_in_messages,
)
from serving.messages import Chat, NamedTool, Sampling, Text

MAX_STOP = 4
"""Stop strings of one request."""

MAX_STOP_CHARACTERS = 1024
"""Of each. As long as a text may be the beginning of one, it is held back."""

MAX_LOGIT_BIAS = 1024
"""Entries of logit_bias. vLLM's GPU runner has room for as many and fails with more."""

MAX_STOP_TOKEN_IDS = 64
"""Entries of stop_token_ids. vLLM's GPU runner has room for 128, the model's own included."""

MAX_TOKEN_ID = 2**31 - 1
"""No vocabulary goes beyond it; a model's own end is checked by its replica."""

MAX_PROMPTS = 128
"""Prompts of one text completion request."""

MAX_TOOLS_BYTES = 256 * 1024
"""Bytes of the parameters of all tools together, as compact JSON."""

_MOST_TOKENS = 2**31 - 1
"""Any larger count of tokens means the same: more than a context holds. It keeps them within 64 bits."""


class _OrNull:
    """Documents that null is allowed and means the default. Nulls are left out before a request is read."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"type": "null"}]}


T = TypeVar("T")
OrNull = Annotated[T, _OrNull()]

Penalty = Annotated[float, Field(ge=-2, le=2)]
NonEmpty = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenIdKey, Bias], Field(max_length=MAX_LOGIT_BIAS)]


# ---- prompts ------------------------------------------------------------------------------------------

_TEXT = "a string"
_TEXTS = f"an array of 1 to {MAX_PROMPTS} strings"
_TOKENS = "a non-empty array of token ids"
_TOKEN_LISTS = f"an array of 1 to {MAX_PROMPTS} non-empty arrays of token ids"


def _prompt_form(prompt: Any) -> str | None:
    """Which form of a prompt is meant, as its first item tells; None where it is none of them."""
    if isinstance(prompt, list) and prompt:
        return {str: _TEXTS, int: _TOKENS, list: _TOKEN_LISTS}.get(type(prompt[0]))
    return _TEXT if isinstance(prompt, str) else None


Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
UpToMaxPrompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)

AnyPrompt = Annotated[
    Annotated[str, Tag(_TEXT), Field(title=_TEXT)]
    | Annotated[list[str], Tag(_TEXTS), UpToMaxPrompts, Field(title=_TEXTS)]
    | Annotated[list[TokenId], Tag(_TOKENS), Field(min_length=1, fail_fast=True, title=_TOKENS)]
    | Annotated[list[Tokens], Tag(_TOKEN_LISTS), UpToMaxPrompts, Field(title=_TOKEN_LISTS)],
    Discriminator(_prompt_form),
]


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    model_config = STRICT

    include_usage: bool | None = Field(
        None,
        description="Whether a last chunk before [DONE] carries the usage of the whole request.",
        examples=[True],
    )


def _required_first(schema: dict[str, Any]) -> None:
    """Puts what must be given where a reader looks first."""
    schema["properties"] = dict(
        sorted(schema["properties"].items(), key=lambda field: field[0] not in schema["required"])
    )


class GenerationRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(**STRICT, json_schema_extra=_required_first)

    model: NonEmpty = Field(
        description="The model that answers, by one of the names that GET /v1/models lists, in any case.",
        examples=["smollm2-135m-instruct"],
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
        " text. Additive, and neutral at 0. A deployment may have the multiplicative one instead, above 0 and"
        " up to 2 and neutral at 1.",
        examples=[0.5],
    )
    presence_penalty: OrNull[Penalty] = Field(
        0.0,
        description="Taken once from the logit of a token that stands in the generated text.",
        examples=[0.5],
    )
    logit_bias: LogitBias | None = Field(
        None,
        description="Token ids, in decimal digits, and what is added to their logits before sampling.",
        examples=[{"50256": -100}],
    )
    n: OrNull[Annotated[int, Field(ge=1, le=128)]] = Field(
        1,
        description="How many choices to generate, for each prompt. The tokens of all of them are counted as"
        " used.",
        examples=[1],
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None,
        description="With the same seed and parameters the same result comes back, as far as the engine"
        " allows. Choice i takes seed + i.",
        examples=[42],
    )
    stop: StopString | StopStrings | None = Field(
        None,
        description=f"Strings at which generation ends, of at most {MAX_STOP_CHARACTERS} characters each. The"
        " returned text does not contain them.",
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
        description="Whether to go on where the model would end, up to max_tokens. Not where the answer has a"
        " form that ends: JSON, or a call that must be made.",
        examples=[False],
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = (
        Field(None, description="Tokens at which generation ends.", examples=[[2]])
    )
    user: str | None = Field(
        None, description="The caller's name for its own user. Accepted, without effect.", examples=["u-1"]
    )
    repetition_factor: SkipJsonSchema[float] = 1.0
    """What repetition_penalty is under a deployment that has the multiplicative one. No client's own."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            max_tokens=min(max_tokens, _MOST_TOKENS),
            temperature=self.temperature,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            repetition_factor=self.repetition_factor,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()}
            if self.logit_bias
            else {},
            n=self.n,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            top_k=min(max(self.top_k, 0), _MOST_TOKENS),
            min_p=self.min_p,
            min_tokens=min(self.min_tokens, _MOST_TOKENS),
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1, fail_fast=True)] = Field(
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
    logprobs: OrNull[bool] = Field(
        default=False,
        description="Whether each generated token comes with its log probability, that of the model itself,"
        " before penalties and bias.",
        examples=[True],
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="How many of the likeliest tokens come with theirs at each place. Needs logprobs.",
        examples=[5],
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="What the answer must be: any text, which is the default, a JSON object, or JSON of a"
        " schema.",
        examples=[{"type": "json_object"}],
    )
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None,
        description="The functions that the model may ask to have called. Their parameters have at most"
        f" {MAX_TOOLS_BYTES} bytes together.",
        examples=[[{"type": "function", "function": {"name": "get_weather"}}]],
    )
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None,
        description="Whether the model calls none of the tools, decides itself, must call one, or must call"
        " the one that is named. By default it decides where there are tools.",
        examples=["auto", {"type": "function", "function": {"name": "get_weather"}}],
    )
    parallel_tool_calls: OrNull[bool] = Field(
        default=True, description="Whether one answer may have several calls.", examples=[False]
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None,
        description="How much the model thinks before it answers. Handed to the model's chat template.",
        examples=["low"],
    )
    chat_template_kwargs: JsonObject | None = Field(
        None,
        description=f"What the model's chat template sees beside the messages, of at most {MAX_SCHEMA_BYTES}"
        " bytes.",
        examples=[{"enable_thinking": False}],
    )
    metadata: dict[str, Any] | None = Field(
        None, description="Notes of the caller's own. Accepted, without effect.", examples=[{"run": "7"}]
    )

    def to_message(self, identifier: str, model: str, created: int, *, role_in_every_chunk: bool) -> Chat:
        """The request as it crosses the trunk, under an id of ours and the model's name as shown."""
        choice = self.tool_choice or "auto"
        return Chat(
            id=identifier,
            model=model,
            created=created,
            messages=tuple([message.to_message() for message in self.messages]),
            sampling=self._sampling(self.max_tokens),
            stream=self.stream,
            include_usage=self.include_usage,
            role_in_every_chunk=role_in_every_chunk,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            response_format=self.response_format.to_message() if self.response_format else None,
            tools=tuple([tool.to_message() for tool in self.tools or ()]),
            tool_choice=choice if isinstance(choice, str) else NamedTool(choice.function.name),
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning_effort,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class TextRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: AnyPrompt = Field(
        description="What the model goes on from: a text or token ids, or a list of either, each of which is"
        " a prompt of its own.",
        examples=["Once upon a time", ["One", "Two"], [1, 2, 3]],
    )
    max_tokens: OrNull[Annotated[int, Field(ge=0)]] = Field(
        16,
        description="The most tokens that a choice may have. Prompt and answer together are bound by the"
        " model's context length: an answer that would leave it ends there, with finish_reason length.",
        examples=[128],
    )
    echo: OrNull[bool] = Field(
        default=False, description="Whether each choice's text begins with its prompt.", examples=[True]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None,
        description="How many of the likeliest tokens come with their log probabilities at each place, beside"
        " the one that was chosen; those of the model itself, before penalties and bias.",
        examples=[2],
    )
    best_of: int | None = Field(
        None,
        description="Must equal n: choosing among more choices than are returned is not served.",
        examples=[1],
    )

    def to_message(self, identifier: str, model: str, created: int) -> Text:
        """The request as it crosses the trunk, under an id of ours and the model's name as shown."""
        return Text(
            id=identifier,
            model=model,
            created=created,
            prompts=tuple([each if isinstance(each, str) else tuple(each) for each in self._prompts]),
            sampling=self._sampling(self.max_tokens),
            stream=self.stream,
            include_usage=self.include_usage,
            echo=self.echo,
            logprobs=self.logprobs,
        )

    @property
    def _prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


# ---- reading ------------------------------------------------------------------------------------------

R = TypeVar("R", ChatRequest, TextRequest)

_REQUIRED = frozenset({"model", "messages", "prompt"})

_REFUSALS = {kind: Refusals(kind.model_json_schema()) for kind in (ChatRequest, TextRequest)}

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
    """The model that a request asks for, so that the rest can be read under its settings.

    Raises InvalidRequest.
    """
    name = data.get("model")
    if isinstance(name, str) and name:
        return name
    expected = _REFUSALS[ChatRequest].expected("model")
    raise wrong("model", expected, name) if "model" in data else missing("model", expected)


def parse_chat(data: dict[str, Any], settings: ModelSettings) -> ChatRequest:
    """The chat completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    _refuse_longer(data, "messages", settings.limits.messages)
    refuse_unserved(data, UNSERVED_IN_CHAT)
    refuse_unserved_in_messages(data.get("messages"))
    given = _given(data, settings)
    given.setdefault("max_tokens", given.get("max_completion_tokens", settings.default_max_tokens))
    request = _validated(ChatRequest, given)
    _check_chat(request)
    return request


def parse_text(data: dict[str, Any], settings: ModelSettings) -> TextRequest:
    """The text completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    refuse_unserved(data, UNSERVED_IN_TEXT)
    request = _validated(TextRequest, _given(data, settings))
    if request.best_of not in {None, request.n}:
        raise InvalidRequest(
            f"best_of must equal n, which is {request.n}, not {shown(request.best_of)}: choosing among more"
            " choices than are returned is not supported",
            param="best_of",
            code="unsupported_parameter",
        )
    return request


def _given(data: dict[str, Any], settings: ModelSettings) -> dict[str, Any]:
    """What is not null of a request: null means the default, but a required field has none."""
    _refuse_longer(data, "logit_bias", MAX_LOGIT_BIAS)
    given = {name: value for name, value in data.items() if value is not None or name in _REQUIRED}
    given.pop("repetition_factor", None)
    if settings.repetition_penalty == "multiplicative":
        factor = given.pop("repetition_penalty", 1.0)
        if type(factor) not in {int, float} or not 0 < factor <= 2:
            raise wrong("repetition_penalty", "a number above 0 and up to 2", factor)
        given["repetition_factor"] = factor
    return given


def _validated(kind: type[R], given: dict[str, Any]) -> R:
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _REFUSALS[kind].of(error.errors(include_url=False, include_context=False)) from None
    if request.min_tokens > request.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, which is {shown(request.max_tokens)},"
            f" not {shown(request.min_tokens)}",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true, not false", param="stream_options")
    return request


def _check_chat(request: ChatRequest) -> None:
    """What no field can be checked for alone."""
    if request.max_completion_tokens not in {None, request.max_tokens}:
        raise InvalidRequest(
            f"max_completion_tokens is another name of max_tokens and must equal it where both are given:"
            f" {shown(request.max_completion_tokens)} is not {shown(request.max_tokens)}",
            param="max_completion_tokens",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true, not false", param="top_logprobs")
    if request.ignore_eos:
        _check_endless(request)
    for position, message in enumerate(request.messages):
        if isinstance(message, AssistantMessage) and message.content is None and not message.tool_calls:
            raise missing(
                f"messages[{position}].content",
                "a string or an array of text parts, as there are no tool_calls",
            )
    if request.tools or request.tool_choice:
        _check_tools(request)


def _check_endless(request: ChatRequest) -> None:
    """Where an answer has a form, text of no form would follow it."""
    form = request.response_format
    if form is not None and form.to_message() is not None:
        beside = f"a response_format of type {form.type}"
    elif request.tools and request.tool_choice not in {None, "none", "auto"}:
        beside = "a tool_choice that must be followed"
    else:
        return
    raise wrong("ignore_eos", f"false or left out beside {beside}", value=True)


def _check_tools(request: ChatRequest) -> None:
    functions = [tool.function for tool in request.tools or ()]
    size = sum(len(function.parameters.encode()) for function in functions if function.parameters)
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequest(
            f"tools must have at most {MAX_TOOLS_BYTES} bytes of parameters as JSON, not {size}",
            param="tools",
        )
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if all(function.name != name for function in functions):
            raise wrong("tool_choice.function.name", "the name of one of the tools", name)
    elif choice == "required" and not functions:
        raise wrong("tool_choice", 'left out or "none" or "auto" where there are no tools', choice)


def _refuse_longer(data: dict[str, Any], name: str, limit: int) -> None:
    """Before each entry is looked at: half a million bad ones took seconds."""
    value = data.get(name)
    if isinstance(value, list | dict) and len(value) > limit:
        raise InvalidRequest(f"{name} must have at most {limit} entries, not {len(value)}", param=name)
