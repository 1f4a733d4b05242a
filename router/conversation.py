"""What a chat completion request is made of: messages, tools, and the form of its answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, with_config
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict

from router.refusals import unfit
from serving import messages

MAX_TOOLS = 128
"""Tools of one request."""

MAX_SCHEMA_BYTES = 64 * 1024
"""Bytes of one JSON Schema, or of chat_template_kwargs, as compact JSON. An engine makes a grammar of it."""

STRICT = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
"""No value is turned into another type, and what nobody knows is ignored."""


class _AsJson:
    """Takes a JSON object and keeps it as what crosses the trunk: compact JSON, where an integer may have
    any size."""

    _encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._written, core_schema.dict_schema())

    def _written(self, value: dict[str, Any]) -> str:
        try:
            text = self._encode(value)
        except ValueError:
            raise unfit("must have no number beyond those that 64 bits of floating point can hold") from None
        size = len(text.encode())
        if size > MAX_SCHEMA_BYTES:
            raise unfit(f"must have at most {MAX_SCHEMA_BYTES} bytes as JSON, not {size}")
        return text


JsonObject = Annotated[str, _AsJson()]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        title="a name of 1 to 64 ASCII letters, digits, underscores or dashes",
    ),
]


# ---- messages -----------------------------------------------------------------------------------------


# What a body may hold a hundred thousand of is a dict: they are made faster.
@with_config(STRICT)
class TextPart(TypedDict):
    """A piece of a message's text."""

    type: Annotated[Literal["text"], Field(description="Only text is served.", examples=["text"])]
    text: Annotated[str, Field(description="The text.", examples=["What is the capital of France?"])]


Content = Annotated[
    str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)],
    Field(description="The text, or a list of text parts, which are joined by line breaks."),
]


@with_config(STRICT)
class CalledFunction(TypedDict):
    """Which function a model called, and with what."""

    name: Annotated[str, Field(description="The function.", examples=["get_weather"])]
    arguments: Annotated[
        str, Field(description="Its arguments, JSON as the model wrote it.", examples=['{"city": "Paris"}'])
    ]


@with_config(STRICT)
class ToolCall(TypedDict):
    """A call that a model asked for."""

    id: Annotated[str, Field(description="What the answer to the call names.", examples=["call_1"])]
    type: Annotated[
        Literal["function"], Field(description="Only functions are called.", examples=["function"])
    ]
    function: Annotated[CalledFunction, Field(description="The function and its arguments.")]


class ChatMessage(BaseModel):
    """What messages of all roles have in common."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None
    name: str | None = Field(None, description="Tells speakers of one role apart.", examples=["ada"])

    def to_message(self) -> messages.Message:
        """The message as the replica takes it, its text in one piece."""
        return messages.Message(self.role, self._text(), self.name)

    def _text(self) -> str | None:
        content = self.content
        if content is None or isinstance(content, str):
            return content
        return "\n".join([part["text"] for part in content])


class Instructions(ChatMessage):
    """What the model shall be like."""

    role: Literal["system", "developer"] = Field(description="Who speaks.", examples=["system"])
    content: Content = Field(examples=["You are a helpful assistant."])


class UserMessage(ChatMessage):
    """What was asked."""

    role: Literal["user"] = Field(description="Who speaks.", examples=["user"])
    content: Content = Field(examples=["What is the capital of France?"])


class AssistantMessage(ChatMessage):
    """What was answered. It has a content, or tool calls, or both."""

    role: Literal["assistant"] = Field(description="Who speaks.", examples=["assistant"])
    content: Content | None = Field(
        None,
        description="The text, or a list of text parts. It may be null or missing beside tool calls.",
        examples=["The capital of France is Paris."],
    )
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None,
        description="The calls that the model asked for.",
        examples=[
            [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]
        ],
    )
    reasoning_content: str | None = Field(
        None,
        description="What the model thought before it answered, for chat templates that show it again.",
        examples=["The question is about a capital."],
    )
    reasoning: str | None = Field(
        None,
        description="Another name of reasoning_content, which counts where both are given.",
        examples=["The question is about a capital."],
    )

    def to_message(self) -> messages.Message:
        calls = tuple(map(_tool_call, self.tool_calls)) if self.tool_calls else ()
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        return messages.Message(self.role, self._text(), self.name, calls, None, reasoning)


def _tool_call(call: ToolCall) -> messages.ToolCall:
    function = call["function"]
    return messages.ToolCall(call["id"], function["name"], function["arguments"])


class ToolMessage(ChatMessage):
    """What a called function gave back."""

    role: Literal["tool"] = Field(description="Who speaks.", examples=["tool"])
    content: Content = Field(examples=['{"celsius": 21}'])
    tool_call_id: str = Field(description="The call that is answered.", examples=["call_1"])

    def to_message(self) -> messages.Message:
        return messages.Message(self.role, self._text(), self.name, tool_call_id=self.tool_call_id)


AnyMessage = Annotated[
    Instructions | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


# ---- tools and the form of an answer ------------------------------------------------------------------


class FunctionDefinition(BaseModel):
    """A function that the model may ask to have called."""

    model_config = STRICT

    name: Name = Field(description="What the model calls it.", examples=["get_weather"])
    description: str | None = Field(
        None, description="What it does, for the model.", examples=["The weather in a city."]
    )
    parameters: JsonObject | None = Field(
        None,
        description=f"JSON Schema of its arguments, of at most {MAX_SCHEMA_BYTES} bytes.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None, description="Whether its arguments shall be held to the schema.", examples=[True]
    )


class FunctionTool(BaseModel):
    """A tool, which is a function."""

    model_config = STRICT

    type: Literal["function"] = Field(description="Only functions can be tools.", examples=["function"])
    function: FunctionDefinition = Field(description="The function.")

    def to_message(self) -> messages.Tool:
        """The tool as the replica takes it."""
        function = self.function
        return messages.Tool(function.name, function.description, function.parameters, function.strict)


class FunctionName(BaseModel):
    """A function, by its name."""

    model_config = STRICT

    name: str = Field(description="One of the tools.", examples=["get_weather"])


class NamedToolChoice(BaseModel):
    """The choice of one function, which must be called."""

    model_config = STRICT

    type: Literal["function"] = Field(description="Only functions can be chosen.", examples=["function"])
    function: FunctionName = Field(description="The function.")


class TextFormat(BaseModel):
    """Any text."""

    model_config = STRICT

    type: Literal["text"] = Field(description="Any text.", examples=["text"])

    def to_message(self) -> messages.ResponseFormat | None:
        """The format as the replica takes it."""
        return None


class JsonObjectFormat(BaseModel):
    """A JSON object."""

    model_config = STRICT

    type: Literal["json_object"] = Field(description="Any JSON object.", examples=["json_object"])

    def to_message(self) -> messages.ResponseFormat:
        """The format as the replica takes it."""
        return messages.ResponseFormat()


class NamedSchema(BaseModel):
    """A JSON Schema and what it is called."""

    model_config = STRICT

    name: Name = Field(description="What the caller calls it.", examples=["capital"])
    description: str | None = Field(
        None, description="What it is for. Accepted, without effect.", examples=["A capital of a country."]
    )
    # `schema` is a method of every pydantic model.
    schema_: JsonObject | None = Field(
        None,
        alias="schema",
        description=f"JSON Schema of the answer, of at most {MAX_SCHEMA_BYTES} bytes; without one, any JSON"
        " object.",
        examples=[{"type": "object", "properties": {"capital": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None, description="Accepted, without effect: every answer is held to the schema.", examples=[True]
    )


class JsonSchemaFormat(BaseModel):
    """JSON of a schema."""

    model_config = STRICT

    type: Literal["json_schema"] = Field(description="JSON of a schema.", examples=["json_schema"])
    json_schema: NamedSchema = Field(description="The schema.")

    def to_message(self) -> messages.ResponseFormat:
        """The format as the replica takes it."""
        return messages.ResponseFormat(self.json_schema.schema_)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
