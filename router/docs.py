"""The page at /docs: the OpenAPI document for people. It is one file, it works without scripts, and it names
no other host.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from router.settings import ModelSettings

Json = dict[str, Any]

_HERE = Path(__file__).parent
_STYLE = (_HERE / "docs.css").read_text()
_STYLE_HASH = b64encode(sha256(_STYLE.encode()).digest()).decode()

PAGE_HEADERS = {
    "content-security-policy": f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Nothing may be shown or run but what is in the page."""


class Documentation:
    """What a router says of itself. Each form is made when it is first asked for, in a thread: it takes a
    tenth of a second."""

    def __init__(self, models: Sequence[ModelSettings], *, accounts: bool = False) -> None:
        self._models = models
        self._accounts = accounts

    async def openapi(self) -> bytes:
        """The OpenAPI document as JSON."""
        return await asyncio.to_thread(lambda: self._json)

    async def page(self) -> bytes:
        """The same as HTML."""
        return await asyncio.to_thread(lambda: self._page)

    @cached_property
    def _document(self) -> Json:
        # What it is drawn from takes memory, and few ask for it.
        from router.openapi import document  # noqa: PLC0415

        return document(self._models, accounts=self._accounts)

    @cached_property
    def _json(self) -> bytes:
        return json.dumps(self._document, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def _page(self) -> bytes:
        # Few ask for the page, and every router would hold the memory.
        from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

        templates = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        reader = Reader(self._document)
        page = templates.get_template("docs.html").render(
            style=_STYLE,
            document=self._document,
            operations=list(reader.operations()),
            errors=list(reader.errors()),
        )
        return page.encode()


class Field(NamedTuple):
    """A field of a body or a parameter beside it, as a row."""

    path: str
    """As a programmer writes it: `messages[].role`."""
    kind: str
    required: bool
    default: str | None
    description: str
    examples: list[str]


class Reader:
    """Reads the document for the page."""

    def __init__(self, document: Json) -> None:
        self._document = document

    def operations(self) -> Iterator[Json]:
        """Each path and method."""
        for path, methods in self._document["paths"].items():
            for method, operation in methods.items():
                body = operation.get("requestBody", {}).get("content", {}).get("application/json")
                responses = operation["responses"]
                yield {
                    **operation,
                    "method": method.upper(),
                    "path": path,
                    "parameters": [self._parameter(self._follow(one)) for one in operation["parameters"]],
                    "fields": list(self._fields([body["schema"]])) if body else [],
                    "examples": _examples(body or {}),
                    "answers": [
                        self._answer(status, one) for status, one in responses.items() if "$ref" not in one
                    ],
                    "errors": {status: _name(one) for status, one in responses.items() if "$ref" in one},
                }

    def errors(self) -> Iterator[Json]:
        """Each group of errors that have the same status."""
        for name, response in self._document["components"]["responses"].items():
            examples = response["content"]["application/json"]["examples"]
            yield {**response, "name": name, "examples": examples}

    def _answer(self, status: str, response: Json) -> Json:
        forms = [
            {
                "media": media,
                "fields": list(self._fields([content["schema"]])),
                "example": _shown(content["example"]) if "example" in content else None,
            }
            for media, content in response["content"].items()
        ]
        return {"status": status, "description": response["description"], "forms": forms}

    def _parameter(self, one: Json) -> Field:
        schema = one["schema"]
        default = json.dumps(schema["default"]) if "default" in schema else None
        return Field(
            f"{one['name']} ({one['in']})",
            self._kind([schema]),
            one.get("required", False),
            default,
            one["description"],
            [str(one["example"])],
        )

    def _fields(self, nodes: Iterable[Json], prefix: str = "") -> Iterator[Field]:
        """The fields of an object, each followed by those within it. A field that several alternatives of the
        object have is one."""
        objects = [leaf for leaf in self._leaves(nodes) if "properties" in leaf]
        merged: dict[str, list[Json]] = {}
        for one in objects:
            for name, node in one["properties"].items():
                merged.setdefault(name, []).append(node)
        for name, same in merged.items():
            required = all(name in one.get("required", ()) for one in objects)
            yield self._field(prefix + name, same, required=required)
            yield from self._fields(same, f"{prefix}{name}.")
            yield from self._fields(self._items(same), f"{prefix}{name}[].")

    def _field(self, path: str, same: list[Json], *, required: bool) -> Field:
        default = same[0].get("default")
        shown = [
            json.dumps(example, ensure_ascii=False) for node in same for example in node.get("examples", ())
        ]
        return Field(
            path,
            self._kind(same),
            required,
            None if default is None else json.dumps(default),
            " ".join(dict.fromkeys(node["description"] for node in same if "description" in node)),
            list(dict.fromkeys(shown)),
        )

    def _items(self, nodes: Iterable[Json]) -> list[Json]:
        return [leaf["items"] for leaf in self._leaves(nodes) if "items" in leaf]

    def _leaves(self, nodes: Iterable[Json]) -> Iterator[Json]:
        """Schemas without alternatives, references followed; of JSON within a string, that JSON's."""
        for given in nodes:
            node = self._follow(given)
            branches = [*node.get("anyOf", ()), *node.get("oneOf", ())]
            if "contentSchema" in node:
                branches.append(node["contentSchema"])
            if branches:
                yield from self._leaves(branches)
            else:
                yield node

    def _kind(self, nodes: Iterable[Json]) -> str:
        """What a value may be, null last."""
        phrases = dict.fromkeys(map(self._phrase, self._leaves(nodes)))
        return " or ".join(sorted(phrases, key=lambda phrase: phrase == "null"))

    def _phrase(self, leaf: Json) -> str:
        if leaf.get("title", "")[:1].islower():  # it is one that says what is expected
            return str(leaf["title"])
        if "const" in leaf:
            return json.dumps(leaf["const"])
        if "enum" in leaf:
            return " or ".join(map(json.dumps, leaf["enum"]))
        match leaf["type"]:
            case "array":
                return f"array of {_count(leaf)}{self._kind([leaf['items']])}"
            case "string" if leaf.get("minLength"):
                return "non-empty string"
            case kind:
                return f"{kind}{_range(leaf)}"

    def _follow(self, node: Json) -> Json:
        """What a reference stands for; what stands beside it is worth more."""
        if "$ref" not in node:
            return node
        found = self._document
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        return {**found, **{name: value for name, value in node.items() if name != "$ref"}}


def _name(reference: Json) -> str:
    return str(reference["$ref"].rpartition("/")[2])


def _examples(content: Json) -> list[tuple[str, str]]:
    return [(one["summary"], _shown(one["value"])) for one in content.get("examples", {}).values()]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _count(array: Json) -> str:
    least, most = array.get("minItems"), array.get("maxItems")
    if most is None:
        return f"at least {least} items, each " if least else ""
    return f"{least} to {most} items, each " if least else f"up to {most} items, each "


def _range(leaf: Json) -> str:
    if "maxProperties" in leaf:
        return f" of up to {leaf['maxProperties']} entries"
    if "exclusiveMinimum" in leaf:
        return f" above {leaf['exclusiveMinimum']}, up to {leaf['maximum']}"
    least, most = leaf.get("minimum"), leaf.get("maximum")
    if least is None:
        return ""
    return f" of at least {least}" if most is None else f" from {least} to {most}"
