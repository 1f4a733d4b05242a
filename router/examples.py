"""The examples of the OpenAPI document: requests that run as they are, and what comes back."""

from __future__ import annotations

import json
from typing import Any

from router import errors
from router.errors import ApiError
from serving.messages import Refused

Json = dict[str, Any]

# ---- requests, by name: what they show, and what they are but for the model ---------------------------

Requests = dict[str, tuple[str, Json]]

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

CHAT_REQUESTS: Requests = {
    "question": ("A question", {"messages": _QUESTION}),
    "conversation": (
        "A conversation, with a short and reproducible answer",
        {
            "messages": [
                {"role": "system", "content": "You answer in one sentence."},
                *_QUESTION,
                {"role": "assistant", "content": "The capital of France is Paris."},
                {"role": "user", "content": "And of Italy?"},
            ],
            "max_tokens": 64,
            "temperature": 0.2,
            "seed": 7,
            "stop": ["\n\n"],
        },
    ),
    "stream": (
        "A stream, with the usage at its end",
        {"messages": _QUESTION, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "tools": (
        "A tool that the model may ask to have called",
        {
            "messages": [{"role": "user", "content": "How warm is it in Paris?"}],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "get_weather",
                        "description": "The weather in a city.",
                        "parameters": {
                            "type": "object",
                            "properties": {"city": {"type": "string"}},
                            "required": ["city"],
                        },
                    },
                }
            ],
        },
    ),
}

TEXT_REQUESTS: Requests = {
    "prompt": ("A text to go on from", {"prompt": "The capital of France is"}),
    "prompts": (
        "Two choices for each of two prompts",
        {"prompt": ["The capital of France is", "The capital of Italy is"], "n": 2, "max_tokens": 4},
    ),
    "stream": ("A stream", {"prompt": "The capital of France is", "stream": True}),
}

# ---- answers ------------------------------------------------------------------------------------------

MODEL_NAME = "smollm2-135m-instruct"

_COMMON = {"created": 1_735_689_600, "model": MODEL_NAME}


def _usage(prompt: int, completion: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


CHAT_COMPLETION: Json = {
    "id": "chatcmpl-6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21",
    "object": "chat.completion",
    **_COMMON,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The capital of France is Paris."},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _usage(37, 7),
}

TEXT_COMPLETION: Json = {
    "id": "cmpl-6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21",
    "object": "text_completion",
    **_COMMON,
    "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
    "usage": _usage(5, 2),
}


def _stream(head: Json, choices: list[Json], usage: Json | None = None) -> str:
    """The events of a stream, one for each of the choices; with their usage, it stands in one more."""
    chunks = [{**head, "choices": [{"index": 0, "logprobs": None, **choice}]} for choice in choices]
    if usage is not None:
        chunks = [*(chunk | {"usage": None} for chunk in chunks), {**head, "choices": [], "usage": usage}]
    events = [*(json.dumps(chunk, separators=(",", ":")) for chunk in chunks), "[DONE]"]
    return "".join(f"data: {event}\n\n" for event in events)


CHAT_STREAM = _stream(
    {"id": CHAT_COMPLETION["id"], "object": "chat.completion.chunk", **_COMMON},
    [
        {"delta": {"role": "assistant", "content": "The capital of France"}, "finish_reason": None},
        {"delta": {"content": " is Paris."}, "finish_reason": None},
        {"delta": {}, "finish_reason": "stop"},
    ],
    CHAT_COMPLETION["usage"],
)

TEXT_STREAM = _stream(
    {"id": TEXT_COMPLETION["id"], "object": TEXT_COMPLETION["object"], **_COMMON},
    [{"text": " Paris", "finish_reason": None}, {"text": ".", "finish_reason": "stop"}],
)

MODEL: Json = {
    "id": MODEL_NAME,
    "object": "model",
    "created": 1_735_689_600,
    "owned_by": "trunkline",
    "name": MODEL_NAME,
    "is_chat": True,
    "is_text": True,
    "max_context_length": 8192,
    "license_name": "Apache-2.0",
    "state": "ready",
    "kind": "hosted",
}

HEALTH: Json = {"status": "ok", "models": {MODEL_NAME: "ready"}}

METRICS = """\
# HELP trunkline_trunks Trunks between this router and the model's replicas that are up.
# TYPE trunkline_trunks gauge
trunkline_trunks{model="smollm2-135m-instruct",replica="x3v9k2ab"} 1
"""

# ---- errors -------------------------------------------------------------------------------------------


def _of_the_replica(message: str, param: str, code: str) -> ApiError:
    return errors.from_refusal(Refused(0, 400, message, param, code))


ERRORS: tuple[ApiError, ...] = (
    errors.InvalidRequest("temperature must be a number from 0 to 2, not 3", param="temperature"),
    errors.InvalidRequest(
        "messages is missing: it must be a non-empty array, each item an object",
        param="messages",
        code="missing_required_parameter",
    ),
    errors.InvalidRequest(
        "functions is not supported: it must be left out or null or [], not [{}]",
        param="functions",
        code="unsupported_parameter",
    ),
    errors.InvalidRequest(
        "the body is not valid JSON: EOF while parsing an object at line 1 column 1", code="invalid_json"
    ),
    _of_the_replica(
        "messages: the prompt has 9000 tokens, and with at least one token of answer it must fit the model's"
        " context of 8192 tokens",
        "messages",
        "context_length_exceeded",
    ),
    _of_the_replica(
        "the answer has more than 8388608 characters, which only a stream may have",
        "stream",
        "answer_too_long",
    ),
    errors.WrongEndpoint(MODEL_NAME, "is_text"),
    errors.MalformedRequest(),
    errors.ModelNotFound("nobody"),
    errors.UnknownPath("/v1/embeddings"),
    errors.MethodNotAllowed("GET", "/v1/chat/completions", ["POST"]),
    errors.RequestTimeout(30),
    errors.BodyTooLarge(4_194_304),
    errors.UnsupportedMediaType("text/plain"),
    errors.HeadersTooLarge(65_536),
    errors.InternalError(),
    errors.FirstTokenTimeout(300),
    errors.Stalled(60),
    errors.TotalTimeout(3600),
    errors.Overloaded(MODEL_NAME, retry_after=2),
    errors.NoReplica(MODEL_NAME),
    errors.ReplicaLost(),
    errors.ShuttingDown(),
    errors.TooManyConnections(),
)
"""One of each kind and code that a client may get with a status of its own."""

ACCOUNT_ERRORS: tuple[ApiError, ...] = (
    errors.MissingKey(),
    errors.InvalidKey(),
    errors.WrongPassword(),
    errors.Forbidden("only an admin may see and change accounts"),
    errors.BadCsrf(),
    errors.ModelForbidden(MODEL_NAME),
    errors.NotFound("key", "7c1c8f1de5a54f6cb0f3c2a9d4e5b617"),
    errors.Taken("account", "ada"),
    errors.RateLimited(
        "the key may send 60 requests in a minute, and has",
        retry_after=12,
        headers={
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "12s",
            "x-ratelimit-limit-tokens": "100000",
            "x-ratelimit-remaining-tokens": "41017",
            "x-ratelimit-reset-tokens": "47.2s",
        },
    ),
    errors.QuotaExceeded("the key may use 25.5 dollars in a month, and what is left is not enough"),
    errors.TooManyFailures(8),
    errors.LimitsUnavailable(),
    errors.StoreUnavailable(),
    errors.InvalidRequest("diasbled is not known here", param="diasbled", code="unknown_parameter"),
)
"""The same, where there are accounts."""

PROVIDER_ERRORS: tuple[ApiError, ...] = (
    errors.MissingProviderKey("gpt-4o"),
    errors.UpstreamFailed("the provider's answer ended before it was complete"),
    errors.UpstreamTimeout(10),
)
"""The same, where a model lives at a provider."""

PROVIDER_ERROR = errors.ProviderError(
    402,
    "You exceeded your current quota.",
    kind="insufficient_quota",
    param=None,
    code="insufficient_quota",
    headers={},
)
"""One that has the provider's own status and words."""
