"""The OpenAPI document as forms: for every parameter of a request what a page needs to ask for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from router.completions import ENDPOINTS
from router.docs import Field, Reader

Json = dict[str, Any]

Widget = Literal["choice", "flag", "number", "integer", "text", "texts", "prompt", "messages", "json"]
"""How a parameter is asked for: one of several words, yes or no, a number, a text, several texts, a text or
JSON, a conversation, any JSON."""

FIRST = (
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "frequency_penalty",
    "repetition_penalty",
    "presence_penalty",
    "logit_bias",
    "n",
    "seed",
    "stop",
)
"""Parameters that most people look for, in their order; the others come after them."""

SPEAKERS = ("system", "user", "assistant", "tool", "developer")
"""Roles in the order in which they are offered; others come first."""

BEYOND_SDK = frozenset(
    {
        "repetition_penalty",
        "top_k",
        "min_p",
        "min_tokens",
        "ignore_eos",
        "stop_token_ids",
        "chat_template_kwargs",
    }
)
"""Parameters that OpenAI's Python SDK has no argument for: there they go into `extra_body`."""


class Parameter(NamedTuple):
    """A field of a body, as a form asks for it."""

    path: str
    """`temperature`, or `stream_options.include_usage`."""
    kind: str
    """Its type and range in words."""
    required: bool
    default: str | None
    """As JSON; None where there is none, or it is null."""
    description: str
    example: str
    """As it is typed in; "" where there is none."""
    widget: Widget
    choices: tuple[str, ...]
    least: float | None
    most: float | None
    beyond_sdk: bool
    common: bool
    """Whether it is one of FIRST."""


class Extra(NamedTuple):
    """What a message may have beside a role and a content."""

    parameter: Parameter
    roles: tuple[str, ...]
    """Whose messages may."""


class Form(NamedTuple):
    """One path that answers with tokens, as a page has it."""

    path: str
    summary: str
    description: str
    parameters: tuple[Parameter, ...]
    roles: tuple[str, ...]
    """Who may speak in a conversation; nobody where there is none."""
    extras: tuple[Extra, ...]
    examples: tuple[tuple[str, Json], ...]
    """Requests, each after what it shows."""
    answers: tuple[Json, ...]
    """status, media, summary (of an error its code) and text of each example, those of errors included."""


def forms(document: Json) -> dict[str, Form]:
    """The form of each path that answers with tokens, by the path."""
    reader = Reader(document)
    errors = {one["name"]: one for one in reader.errors()}
    return {
        operation["path"]: _form(document, operation, errors)
        for operation in reader.operations()
        if operation["path"] in ENDPOINTS and operation["method"] == "POST"
    }


def _form(document: Json, operation: Json, errors: Json) -> Form:
    content = operation["requestBody"]["content"]["application/json"]
    schema = _follow(document, content["schema"])
    words = {field.path: field for field in operation["fields"]}
    parameters = [
        parameter
        for name, node in schema["properties"].items()
        for parameter in _parameters(document, name, node, words)
    ]
    order = {name: place for place, name in enumerate(FIRST)}
    parameters.sort(key=lambda one: order.get(one.path.partition(".")[0], len(order)))
    messages = schema["properties"].get("messages")
    return Form(
        operation["path"],
        operation["summary"],
        operation["description"],
        tuple(parameters),
        tuple(sorted(messages["items"]["discriminator"]["mapping"], key=_turn)) if messages else (),
        tuple(_extras(document, messages["items"], words)) if messages else (),
        tuple((one["summary"], one["value"]) for one in content["examples"].values()),
        (*_answers(operation), *_refusals(operation, errors)),
    )


# ---- parameters ---------------------------------------------------------------------------------------


def _parameters(document: Json, name: str, node: Json, words: dict[str, Field]) -> Iterator[Parameter]:
    """The parameter; where it is an object with simple fields alone, those instead."""
    leaves = [leaf for leaf in _leaves(document, node) if leaf.get("type") != "null"]
    inner = leaves[0].get("properties", {}) if len(leaves) == 1 else {}
    fields = {part: list(_leaves(document, one)) for part, one in inner.items()}
    if fields and all(_is_simple(leaf) for leaves in fields.values() for leaf in leaves):
        for part, one in inner.items():
            yield _parameter(document, f"{name}.{part}", one, words)
    else:
        yield _parameter(document, name, node, words)


def _parameter(document: Json, path: str, node: Json, words: dict[str, Field], name: str = "") -> Parameter:
    """`name` is its name on the form where that is not its path in the document."""
    field, kind = words[path], words[path].kind
    if path == "model":
        kind = "string, one of the models in any case"  # their names are what can be chosen
    leaves = [leaf for leaf in _leaves(document, node) if leaf.get("type") != "null"]
    bounds = leaves[0] if len(leaves) == 1 else {}
    widget = _widget(name or path, leaves)
    example = field.examples[0] if field.examples else ""
    return Parameter(
        name or path,
        kind,
        field.required,
        field.default and field.default.removesuffix(".0"),
        field.description,
        json.loads(example) if example and widget == "text" else example,
        widget,
        tuple(str(word) for leaf in leaves for word in leaf.get("enum", ())),
        bounds.get("minimum", bounds.get("exclusiveMinimum")),
        bounds.get("maximum"),
        path.partition(".")[0] in BEYOND_SDK,
        path.partition(".")[0] in FIRST,
    )


def _widget(path: str, leaves: list[Json]) -> Widget:
    kinds = {leaf.get("type", "enum") for leaf in leaves}
    if path == "messages":
        return "messages"
    if any("enum" in leaf for leaf in leaves) and "object" not in kinds:
        return "choice"
    match sorted(kinds):
        case ["boolean"]:
            return "flag"
        case ["number"] | ["integer"] as one:
            return "integer" if one == ["integer"] else "number"
        case ["string"]:
            return "text"
        case ["array", "string"] if len(leaves) == 2:
            return "texts"
        case ["array", "string"]:
            return "prompt"
        case _:
            return "json"


def _extras(document: Json, items: Json, words: dict[str, Field]) -> Iterator[Extra]:
    roles: dict[str, list[str]] = {}
    nodes: dict[str, Json] = {}
    required: set[str] = set()
    for role, reference in items["discriminator"]["mapping"].items():
        schema = _follow(document, {"$ref": reference})
        for name, node in schema["properties"].items():
            roles.setdefault(name, []).append(role)
            nodes[name] = node
        required |= set(schema["required"])
    for name in [name for name in nodes if name not in {"role", "content"}]:
        parameter = _parameter(document, f"messages[].{name}", nodes[name], words, name)
        # The document's words for all roles together say of none of these that it has to be there.
        yield Extra(parameter._replace(required=name in required), tuple(roles[name]))


def _turn(role: str) -> int:
    return SPEAKERS.index(role) if role in SPEAKERS else -1


def _is_simple(leaf: Json) -> bool:
    return leaf.get("type") in {"boolean", "number", "integer", "null"}


def _leaves(document: Json, node: Json) -> Iterator[Json]:
    """Schemas without alternatives, references followed."""
    node = _follow(document, node)
    branches = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    for branch in branches:
        yield from _leaves(document, branch)
    if not branches:
        yield node


def _follow(document: Json, node: Json) -> Json:
    while "$ref" in node:
        found = document
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        node = found
    return node


# ---- answers ------------------------------------------------------------------------------------------


def _answers(operation: Json) -> Iterator[Json]:
    for answer in operation["answers"]:
        for form in answer["forms"]:
            if form["example"] is not None:
                summary = "as a stream" if form["media"] == "text/event-stream" else "whole"
                yield _answer(answer["status"], form["media"], summary, form["example"])


def _refusals(operation: Json, errors: Json) -> Iterable[Json]:
    for status, name in operation["errors"].items():
        for code, example in errors[name]["examples"].items():
            text = json.dumps(example["value"], indent=2, ensure_ascii=False)
            yield _answer(status, "application/json", code, text)


def _answer(status: str, media: str, summary: str, text: str) -> Json:
    return {"status": status, "media": media, "summary": summary, "text": text}
