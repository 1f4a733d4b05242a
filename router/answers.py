"""The shapes of what is answered. Those of completions are the document's: a replica writes their bytes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from router.conversation import ToolCall


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people: the field, its value and what was expected.")
    type: str = Field(description="The class of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field that is wrong.", examples=["messages[0].role"])
    code: str | None = Field(description="For programs.", examples=["invalid_value"])


class ErrorEnvelope(BaseModel):
    """Every error, whatever its status. After a stream has begun, it is the last event's data."""

    error: ErrorDetail


# ---- models -------------------------------------------------------------------------------------------


class TokenPrice(BaseModel):
    """What a model's tokens cost, in dollars for a million of them, as decimals."""

    prompt: str = Field(description="Of prompts.", examples=["0.15"])
    completion: str = Field(description="Generated ones, over all choices.", examples=["0.6"])


class Model(BaseModel):
    """An available model. What is not known of it is left out."""

    id: str = Field(description="The name to ask for.", examples=["smollm2-135m-instruct"])
    object: Literal["model"] = Field("model", description="What this is.")
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
    price: TokenPrice | None = Field(None, description="The price in numbers; left out where it is free.")
    docs_url: str | None = Field(None, description="Where the model is documented.")
    prompt_guide_url: str | None = Field(None, description="How to prompt it.")
    state: Literal["ready", "loading", "stopped", "failed"] = Field(description="Whether it answers now.")
    kind: Literal["hosted", "upstream"] = Field(
        description="Whether it runs here or at an upstream provider."
    )


class ModelList(BaseModel):
    """The available models, aliases as models of their own."""

    object: Literal["list"] = Field("list", description="What this is.")
    data: list[Model] = Field(description="The models.")


class Health(BaseModel):
    """Whether this router takes requests, and which models answer."""

    status: Literal["ok", "shutting down"] = Field(description="It comes with 503 while it shuts down.")
    models: dict[str, Literal["ready", "loading", "stopped", "failed"]] = Field(
        description="The state of each model, by name."
    )


# ---- completions --------------------------------------------------------------------------------------

Created = Field(description="When the request came, in Unix seconds.", examples=[1735689600])
AskedFor = Field(description="The name that was asked for.", examples=["smollm2-135m-instruct"])
Place = Field(description="Which choice it is, counted from 0.", examples=[0])


class PromptDetails(BaseModel):
    """More about the prompt tokens."""

    cached_tokens: int = Field(description="Those that the KV cache held already.", examples=[0])


class CompletionDetails(BaseModel):
    """More about the completion tokens."""

    reasoning_tokens: int = Field(description="Those of the reasoning.", examples=[0])


class Usage(BaseModel):
    """Tokens, over all choices."""

    prompt_tokens: int = Field(description="Tokens of the prompt, or of all prompts.", examples=[12])
    completion_tokens: int = Field(description="Generated tokens.", examples=[24])
    total_tokens: int = Field(description="Both together.", examples=[36])
    prompt_tokens_details: PromptDetails | None = Field(None, description="More about the prompt tokens.")
    completion_tokens_details: CompletionDetails | None = Field(
        None, description="More about the generated tokens, of a model that reasons."
    )


class LikelyToken(BaseModel):
    """A token and how likely it was."""

    token: str = Field(description="Its text.", examples=[" Paris"])
    logprob: float = Field(description="The logarithm of its probability.", examples=[-0.1])
    bytes: list[int] | None = Field(description="Its UTF-8 bytes.", examples=[[32, 80, 97, 114, 105, 115]])


class TokenLogprobs(LikelyToken):
    """A generated token and the likeliest ones at its place."""

    top_logprobs: list[LikelyToken] = Field(
        description="The likeliest tokens at its place, likeliest first, as many as were asked for."
    )


class Logprobs(BaseModel):
    """One entry for each token of the text."""

    content: list[TokenLogprobs] = Field(description="The tokens.")
    refusal: None = Field(description="No model here refuses in tokens of their own.")


class ChatAnswer(BaseModel):
    """What the model says. Calls and reasoning are there where it made any."""

    role: Literal["assistant"] = Field(description="Who speaks.")
    content: str | None = Field(description="The text; null where there are only calls.")
    reasoning_content: str | None = Field(None, description="What it thought before.")
    tool_calls: list[ToolCall] | None = Field(None, description="The calls that it asks for.")


ChatFinish = Literal["stop", "length", "tool_calls"]
TextFinish = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int = Place
    message: ChatAnswer
    logprobs: Logprobs | None = Field(description="Null unless asked for.")
    finish_reason: ChatFinish = Field(description="Why it ended.", examples=["stop"])


class ChatCompletion(BaseModel):
    """The whole answer of POST /v1/chat/completions."""

    id: str = Field(description="Ours, unique.", examples=["chatcmpl-6f0c"])
    object: Literal["chat.completion"] = Field(description="What this is.")
    created: int = Created
    model: str = AskedFor
    choices: list[ChatChoice] = Field(description="All n of them.")
    usage: Usage = Field(description="What it took.")


class FunctionDelta(BaseModel):
    """More of a call. The name comes once, the arguments piece by piece."""

    name: str | None = Field(None, description="The function's name.")
    arguments: str | None = Field(None, description="The next piece of its arguments.")


class ToolCallDelta(BaseModel):
    """More of one of the calls. Id and type come with its first piece."""

    index: int = Field(description="Which call it is, counted from 0.", examples=[0])
    id: str | None = Field(None, description="What a tool message that answers the call names.")
    type: Literal["function"] | None = Field(None, description="Only functions are called.")
    function: FunctionDelta | None = Field(None, description="More of the function.")


class Delta(BaseModel):
    """What is new of a choice. The role comes with the first piece, or with every one where the deployment
    says so."""

    role: Literal["assistant"] | None = Field(None, description="Who speaks.")
    content: str | None = Field(None, description="The next piece of the text.")
    reasoning_content: str | None = Field(None, description="The next piece of the reasoning.")
    tool_calls: list[ToolCallDelta] | None = Field(None, description="The next pieces of calls.")


class ChunkChoice(BaseModel):
    """A piece of one of the n answers."""

    index: int = Place
    delta: Delta
    logprobs: Logprobs | None = Field(description="Null unless asked for.")
    finish_reason: ChatFinish | None = Field(description="Null until the choice has ended.")


class ChatCompletionChunk(BaseModel):
    """The data of one event of a streamed answer of POST /v1/chat/completions."""

    id: str = Field(description="The same in every chunk.", examples=["chatcmpl-6f0c"])
    object: Literal["chat.completion.chunk"] = Field(description="What this is.")
    created: int = Created
    model: str = AskedFor
    choices: list[ChunkChoice] = Field(description="None in the chunk that carries the usage.")
    usage: Usage | None = Field(None, description="In the last chunk, where it was asked for.")


class TextLogprobs(BaseModel):
    """One entry of each list for each token of the text."""

    tokens: list[str] = Field(description="The text of each token.")
    token_logprobs: list[float | None] = Field(description="Null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens at each place and the token that stands there, each with its"
        " logarithm; null for the first token of a prompt."
    )
    text_offset: list[int] = Field(description="Where in the text each token begins, in characters.")


class TextChoice(BaseModel):
    """One of the n texts of one of the prompts: those of the first prompt come first."""

    index: int = Place
    text: str = Field(description="The generated text; with echo, the prompt before it.")
    logprobs: TextLogprobs | None = Field(description="Null unless asked for.")
    finish_reason: TextFinish = Field(description="Why it ended.", examples=["length"])


class TextCompletion(BaseModel):
    """The whole answer of POST /v1/completions."""

    id: str = Field(description="Ours, unique.", examples=["cmpl-6f0c"])
    object: Literal["text_completion"] = Field(description="What this is.")
    created: int = Created
    model: str = AskedFor
    choices: list[TextChoice] = Field(description="All of them, n for each prompt.")
    usage: Usage = Field(description="What it took.")


class TextChunkChoice(BaseModel):
    """A piece of one of the texts."""

    index: int = Place
    text: str = Field(description="The next piece of the text.")
    logprobs: TextLogprobs | None = Field(description="Null unless asked for.")
    finish_reason: TextFinish | None = Field(description="Null until the choice has ended.")


class TextCompletionChunk(BaseModel):
    """The data of one event of a streamed answer of POST /v1/completions."""

    id: str = Field(description="The same in every chunk.", examples=["cmpl-6f0c"])
    object: Literal["text_completion"] = Field(description="What this is.")
    created: int = Created
    model: str = AskedFor
    choices: list[TextChunkChoice] = Field(description="None in the chunk that carries the usage.")
    usage: Usage | None = Field(None, description="In the last chunk, where it was asked for.")
