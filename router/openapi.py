"""The OpenAPI document: drawn from the types that check requests, the errors that refuse them and the models
of the deployment, so that it says what they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from pydantic_core import from_json

from router import examples
from router.accounts import openapi as accounts_api
from router.accounts.openapi import Bodies, Operation
from router.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorEnvelope,
    Health,
    Model,
    ModelList,
    TextCompletion,
    TextCompletionChunk,
)
from router.completions import ENDPOINTS
from router.errors import MAX_RETRY_AFTER, ApiError
from router.examples import Json
from router.protocol import ChatRequest, TextRequest
from router.settings import ModelSettings, UpstreamModel
from serving.exposition import CONTENT_TYPE

ALWAYS = (400, 405, 408, 431, 500, 503)
"""Statuses of the errors that any request may meet."""

OF_A_COMPLETION = (*ALWAYS, 404, 413, 415, 429, 504)
"""Those that a request for tokens may meet."""

OF_A_PROVIDER = (401, 502)
"""Those that it may meet besides where a model lives at a provider, whose own errors have any status."""

OF_A_KEY = (401, 403)
"""And those where there are accounts."""

# ---- what there is ------------------------------------------------------------------------------------


class Completion(NamedTuple):
    """A path that answers with tokens."""

    identifier: str
    summary: str
    description: str
    request: type[BaseModel]
    requests: examples.Requests
    answer: type[BaseModel]
    whole: Json
    chunk: type[BaseModel]
    stream: str


COMPLETIONS = {
    "/v1/chat/completions": Completion(
        "createChatCompletion",
        "Create a chat completion",
        "The model says what comes next in a conversation, whole or as a stream.",
        ChatRequest,
        examples.CHAT_REQUESTS,
        ChatCompletion,
        examples.CHAT_COMPLETION,
        ChatCompletionChunk,
        examples.CHAT_STREAM,
    ),
    "/v1/completions": Completion(
        "createCompletion",
        "Create a text completion",
        "The model goes on from one text or several, whole or as a stream.",
        TextRequest,
        examples.TEXT_REQUESTS,
        TextCompletion,
        examples.TEXT_COMPLETION,
        TextCompletionChunk,
        examples.TEXT_STREAM,
    ),
}


class Look(NamedTuple):
    """A path that takes GET alone and changes nothing."""

    identifier: str
    tag: str
    summary: str
    description: str
    answer: Any
    """A type whose JSON it is, a JSON value that it always is, or the media type of a text."""
    example: Any = None
    ending: Any = None
    """What it answers with 503 while the router shuts down; None: the same as ever."""
    parameters: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ALWAYS


LOOKS = {
    "/v1/models": Look(
        "listModels",
        "Models",
        "List the models",
        "Each model, under each of its names.",
        ModelList,
        {"object": "list", "data": [examples.MODEL]},
    ),
    "/v1/models/{id}": Look(
        "retrieveModel",
        "Models",
        "Retrieve a model",
        "What is known of one model.",
        Model,
        examples.MODEL,
        parameters=("id",),
        statuses=(*ALWAYS, 404),
    ),
    "/metrics": Look(
        "metrics",
        "Operation",
        "Metrics",
        "What has been counted, for Prometheus. Scrape one of the two scopes.",
        CONTENT_TYPE,
        examples.METRICS,
        parameters=("scope",),
    ),
    "/health": Look(
        "health",
        "Operation",
        "Health",
        "Whether this router takes requests, and the state of each model.",
        Health,
        examples.HEALTH,
        ending=examples.HEALTH | {"status": "shutting down"},
    ),
    "/-/healthz": Look(
        "healthz",
        "Operation",
        "Readiness",
        "Whether this router takes requests, for probes that look at the status alone.",
        "text/plain",
        "success",
        ending="draining",
    ),
    "/-/routes": Look(
        "routes",
        "Operation",
        "Routes",
        "For probes that look for what Ray Serve's own proxy says.",
        {"/": "router"},
    ),
    "/openapi.json": Look(
        "openapi",
        "Operation",
        "This document",
        "The OpenAPI document of this deployment.",
        dict,
    ),
    "/docs": Look("docs", "Operation", "This document as a page", "The same for people.", "text/html"),
}

TAGS = {
    "Completions": "Text from models.",
    "Models": "Which models there are.",
    "Operation": "How the server is, for those who run it.",
}

BEARER: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "The caller's key. As long as there are no keys any is taken, and none.",
}

HEADERS: Json = {
    "x-request-id": {
        "description": "The caller's own id where it gave one that is fit, otherwise a new one. It stands in"
        " the server's log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "retry-after": {
        "description": "Seconds after which the same request may succeed.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_RETRY_AFTER},
    },
    "allow": {
        "description": "The methods that the path takes.",
        "required": True,
        "schema": {"type": "string"},
    },
}

RELAYED_HEADERS: Json = {
    "retry-after": {
        "description": "Seconds after which the same request may succeed. A provider's own may be a date, or"
        " missing.",
        "schema": {"type": "string"},
    },
}
"""Instead of those above, where a model lives at a provider."""

PARAMETERS: Json = {
    "id": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": 'One of the model\'s names, in any case. A "/" in it may be escaped or not.',
        "schema": {"type": "string"},
        "example": examples.MODEL_NAME,
    },
    "scope": {
        "name": "scope",
        "in": "query",
        "description": "Whose: every process's of the deployment, or this router's alone.",
        "schema": {"enum": ["deployment", "process"], "default": "deployment"},
        "example": "process",
    },
    "x-request-id": {
        "name": "x-request-id",
        "in": "header",
        "description": "The caller's own id of the request: 1 to 128 of letters of a to z, digits, dots,"
        " underscores and hyphens. Any other is ignored.",
        "schema": {"type": "string"},
        "example": "job-7.step-2",
    },
    "x-openai-api-key": {
        "name": "X-OpenAI-Api-Key",
        "in": "header",
        "description": "The caller's key for the provider of an upstream model, needed where the deployment"
        " has none. It goes to that provider alone, and is neither kept nor logged. Other models ignore it.",
        "schema": {"type": "string"},
        "example": "sk-of-the-provider",
    },
}

# ---- the document -------------------------------------------------------------------------------------


def document(models: Sequence[ModelSettings], *, accounts: bool = False) -> Json:
    """The OpenAPI 3.1 document of a router for these models; `accounts` says whether keys are asked for."""
    has = Parts(any(isinstance(model, UpstreamModel) for model in models), accounts)
    paths: Json = {
        path: {"post": _completion(one, _names(models, path), has)} for path, one in COMPLETIONS.items()
    }
    paths |= {path: {"get": _look(path, one, has)} for path, one in LOOKS.items()}
    if accounts:
        for path, method, operation in accounts_api.operations():
            paths.setdefault(path, {})[method] = _operation(method, operation)
    tags = _tags(has)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Trunkline",
            "version": version("trunkline"),
            "description": "One endpoint for many language models, for clients of OpenAI's API. An optional"
            " parameter that is null means its default, one that nobody knows is ignored, and one that is"
            " known and cannot be done as asked is refused by its name.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "Where this document came from."}],
        "security": accounts_api.TO_CHANGE if accounts else [{}, {"bearer": []}],
        "tags": [{"name": name, "description": description} for name, description in tags.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(models, has),
            "responses": dict(_error_responses(has)),
            "headers": has.headers,
            "parameters": PARAMETERS | (accounts_api.PARAMETERS if accounts else {}),
            "securitySchemes": accounts_api.SECURITY if accounts else {"bearer": BEARER},
        },
    }


class Parts(NamedTuple):
    """What a deployment has, and another may do without."""

    providers: bool
    accounts: bool

    @property
    def headers(self) -> Json:
        """Every header of answers."""
        found = HEADERS | (RELAYED_HEADERS if self.providers else {})
        return found | accounts_api.HEADERS | accounts_api.RATE_HEADERS if self.accounts else found

    @property
    def errors(self) -> tuple[ApiError, ...]:
        """One error of each kind."""
        shown = examples.ERRORS + (examples.PROVIDER_ERRORS if self.providers else ())
        return shown + (examples.ACCOUNT_ERRORS if self.accounts else ())


def _tags(has: Parts) -> dict[str, str]:
    if not has.accounts:
        return TAGS
    last = "Operation"
    before = {name: description for name, description in TAGS.items() if name != last}
    return before | accounts_api.TAGS | {last: TAGS[last]}


def _names(models: Iterable[ModelSettings], path: str) -> list[str]:
    """The names, aliases included, of the models that answer at the path."""
    answering = [model for model in models if getattr(model.card, ENDPOINTS[path].flag)]
    return [name for model in answering for name in (model.name, *model.aliases)]


def _completion(one: Completion, names: Sequence[str], has: Parts) -> Json:
    refused = _refused(OF_A_COMPLETION)
    if has.accounts:
        refused |= _refused(OF_A_KEY)
    if has.providers:
        refused |= _refused(OF_A_PROVIDER) | {"default": _ref("responses", "ProviderError")}
    answered = _answered(one)
    if has.accounts:
        answered["headers"] |= {name: _ref("headers", name) for name in accounts_api.RATE_HEADERS}
    return {
        "operationId": one.identifier,
        "tags": ["Completions"],
        "summary": one.summary,
        "description": one.description,
        "parameters": _parameters("x-openai-api-key"),
        "requestBody": _body(one, names),
        "responses": {"200": answered, **dict(sorted(refused.items()))},
    }


def _body(one: Completion, names: Sequence[str]) -> Json:
    """A request's body, its examples asking for the first model that there is."""
    model = {"model": names[0] if names else examples.MODEL_NAME}
    requests = {name: (summary, model | request) for name, (summary, request) in one.requests.items()}
    return _json_body(one.request, requests)


def _json_body(kind: type[BaseModel], requests: Bodies) -> Json:
    shown = {name: {"summary": summary, "value": body} for name, (summary, body) in requests.items()}
    content = {"schema": _ref("schemas", kind.__name__), "examples": shown}
    return {"required": True, "content": {"application/json": content}}


def _answered(one: Completion) -> Json:
    whole = {"schema": _ref("schemas", one.answer.__name__), "example": one.whole}
    stream = {"schema": _event(one.chunk.__name__), "example": one.stream}
    return _response(
        "The answer, as JSON; with stream, as server-sent events. The schema of text/event-stream is that of"
        " one event, which OpenAPI 3.2 calls itemSchema.",
        {"application/json": whole, "text/event-stream": stream},
    )


def _event(chunk: str) -> Json:
    """The schema of one server-sent event."""
    of_json = {"anyOf": [_ref("schemas", chunk), _ref("schemas", "ErrorEnvelope")]}
    data = {
        "description": "A chunk as JSON. After the last one comes [DONE]; where the answer cannot go on, an"
        " error comes instead, and ends the stream.",
        "anyOf": [
            {"type": "string", "contentMediaType": "application/json", "contentSchema": of_json},
            {"const": "[DONE]"},
        ],
    }
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _look(path: str, one: Look, has: Parts) -> Json:
    responses = {"200": _response("What was asked for.", _content(one.answer, one.example))}
    responses |= _refused(one.statuses)
    if one.ending is not None:
        responses["503"] = _response("The router is shutting down.", _content(one.answer, one.ending))
    look: Json = {
        "operationId": one.identifier,
        "tags": [one.tag],
        "summary": one.summary,
        "description": one.description,
        "parameters": _parameters(*one.parameters),
        "responses": responses,
    }
    if has.accounts:
        guarded = path.startswith("/v1/")
        look["security"] = accounts_api.TO_LOOK if guarded else accounts_api.OPEN
        responses |= _refused((401,)) if guarded else {}
    return look


def _operation(method: str, one: Operation) -> Json:
    content = {
        media: {
            "schema": {"type": "string"} if form.answer is None else _ref("schemas", form.answer.__name__),
            "example": form.example,
        }
        for media, form in one.forms.items()
    }
    drawn: Json = {
        "operationId": one.identifier,
        "tags": [one.tag],
        "summary": one.summary,
        "description": one.description,
        "security": accounts_api.TO_LOOK if method == "get" else accounts_api.TO_CHANGE,
        "parameters": [*_query(one.query), *_parameters(*one.parameters)],
    }
    if one.body is not None:
        drawn["requestBody"] = _json_body(one.body, one.bodies)
    refused = _refused({*ALWAYS, *accounts_api.OF_ANY, *one.refused})
    return drawn | {"responses": {str(one.status): _response("What was asked for.", content), **refused}}


def _query(kind: type[BaseModel] | None) -> Iterator[Json]:
    """The parameters behind the question mark. None of them has to be given, and null cannot be."""
    if kind is None:
        return
    for name, field in kind.model_json_schema(schema_generator=_Schemas)["properties"].items():
        description, example = field.pop("description"), field.pop("examples")[0]
        if not field.get("default"):
            field.pop("default", None)
        schema = next(one for one in field.get("anyOf", [field]) if one.get("type") != "null")
        yield {
            "name": name,
            "in": "query",
            "description": description,
            "schema": schema,
            "example": example,
        }


def _content(answer: Any, example: Any) -> Json:
    """What a path that takes GET alone answers with."""
    if isinstance(answer, str):
        content = {answer.partition(";")[0]: {"schema": {"type": "string"}}}
    elif isinstance(answer, type) and issubclass(answer, BaseModel):
        content = {"application/json": {"schema": _ref("schemas", answer.__name__)}}
    elif answer is dict:
        content = {"application/json": {"schema": {"type": "object"}}}
    else:
        content, example = {"application/json": {"schema": {"const": answer}}}, answer
    if example is not None:
        for media in content.values():
            media["example"] = example
    return content


def _response(description: str, content: Json) -> Json:
    headers = {"x-request-id": _ref("headers", "x-request-id")}
    return {"description": description, "headers": headers, "content": content}


def _refused(statuses: Iterable[int]) -> Json:
    return {str(status): _ref("responses", f"Error{status}") for status in sorted(statuses)}


def _error_responses(has: Parts) -> Iterator[tuple[str, Json]]:
    """For each status a response that shows every error which has it."""
    by_status = attrgetter("status")
    for status, group in groupby(sorted(has.errors, key=by_status), by_status):
        same = list(group)
        response = _error_response(f"{status} {HTTPStatus(status).phrase}", same)
        for name in sorted({name for error in same for name in error.headers}):
            always = all(name in error.headers for error in same)
            response["headers"][name] = _ref("headers", name) if always else _optional(has.headers[name])
        yield f"Error{status}", response
    if has.providers:
        yield "ProviderError", _error_response("What the provider said.", [examples.PROVIDER_ERROR])


def _optional(header: Json) -> Json:
    return {name: value for name, value in header.items() if name != "required"}


def _error_response(description: str, errors: Iterable[ApiError]) -> Json:
    shown = {error.code: _shown(error) for error in errors}
    content = {"schema": _ref("schemas", "ErrorEnvelope"), "examples": shown}
    return _response(description, {"application/json": content})


def _shown(error: ApiError) -> Json:
    summary = (type(error).__doc__ or "").partition("\n")[0]
    return {"summary": summary, "value": from_json(error.body())}


def _parameters(*names: str) -> list[Json]:
    return [_ref("parameters", name) for name in (*names, "x-request-id")]


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


# ---- schemas ------------------------------------------------------------------------------------------


class _Schemas(GenerateJsonSchema):
    """Says of keys what pydantic checks, and does not repeat the names of fields as their titles."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dict_schema(self, schema: Any) -> Json:
        drawn = super().dict_schema(schema)
        return drawn | {"additionalProperties": False} if "patternProperties" in drawn else drawn


def _schemas(models: Sequence[ModelSettings], has: Parts) -> Json:
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(ErrorEnvelope, "serialization")]
    for one in COMPLETIONS.values():
        modes += [(one.request, "validation"), (one.answer, "serialization"), (one.chunk, "serialization")]
    modes += [(model, "serialization") for model in (ModelList, Model, Health)]
    if has.accounts:
        modes += _account_modes()
    template = "#/components/schemas/{model}"
    _, drawn = models_json_schema(modes, ref_template=template, schema_generator=_Schemas)
    schemas: Json = drawn["$defs"]
    for path, one in COMPLETIONS.items():
        properties = schemas[one.request.__name__]["properties"]
        _put_names(properties, _names(models, path))
        _put_penalty(properties, models)
    _put_lengths(schemas["ChatRequest"]["properties"], models)
    return schemas


def _account_modes() -> Iterator[tuple[type[BaseModel], JsonSchemaMode]]:
    for _, _, operation in accounts_api.operations():
        if operation.body is not None:
            yield operation.body, "validation"
        for form in operation.forms.values():
            if form.answer is not None:
                yield form.answer, "serialization"


def _put_names(properties: Json, names: Sequence[str]) -> None:
    """Which models there are. Any case is as good, so that an enumeration alone would say too little."""
    if names:
        properties["model"] = {
            "description": properties["model"]["description"],
            "anyOf": [{"enum": list(names)}, {"type": "string", "minLength": 1}],
            "examples": [names[0]],
        }


def _put_penalty(properties: Json, models: Sequence[ModelSettings]) -> None:
    """The other repetition_penalty, where it is that of all models."""
    if {model.repetition_penalty for model in models} == {"multiplicative"}:
        properties["repetition_penalty"] = {
            "description": "Divides the logits of tokens that stand in the prompt or the generated text, and"
            " multiplies those below zero. Neutral at 1.",
            "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 2}, {"type": "null"}],
            "default": 1.0,
            "examples": [1.1],
        }


def _put_lengths(properties: Json, models: Sequence[ModelSettings]) -> None:
    """How long a chat and its answer are, as far as that is the same for all models."""
    limits = {model.limits.messages for model in models}
    if len(limits) == 1:
        properties["messages"]["maxItems"] = limits.pop()
    defaults = {model.default_max_tokens for model in models}
    if len(defaults) == 1:
        properties["max_tokens"]["default"] = defaults.pop()
