"""Refusals in words: the JSON schema of a request says what was expected.

A schema with a title that begins with a small letter is called by it; pydantic's own begin with a capital.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails, PydanticCustomError

from router.errors import InvalidRequest, shown

Step = str | int
Steps = tuple[Step, ...]
Schema = dict[str, Any]

_UNFIT = "unfit"


def unfit(why: str) -> PydanticCustomError:
    """What a validator raises where no schema can say what is wrong. `why` goes on where the path of the
    field ends."""
    return PydanticCustomError(_UNFIT, "{why}", {"why": why})


def wrong(path: str, expected: str, value: Any, note: str = "") -> InvalidRequest:
    """A value is not what it must be."""
    return InvalidRequest(f"{path} must be {expected}, not {shown(value)}{note}", param=path)


def missing(path: str, expected: str) -> InvalidRequest:
    """A field that must be there is not."""
    return InvalidRequest(
        f"{path} is missing: it must be {expected}", param=path, code="missing_required_parameter"
    )


class Refusals:
    """What a schema was made of, in words."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def of(self, errors: list[ErrorDetails]) -> InvalidRequest:
        """One sentence about the first field that is wrong. Of a union's branches, the one that got furthest
        into the value is meant."""
        placed = [(*self._find(error["loc"]), error) for error in errors]
        first = placed[0][0]
        same = [place for place in placed if place[0][: len(first)] == first]
        steps, node, error = max(same, key=lambda place: len(place[0]))
        if sum(place[0] == steps for place in same) > 1:  # no branch got any further than another
            _, node = self._find(error["loc"][:-1])
        if error["type"] == _UNFIT:
            return InvalidRequest(f"{_path(steps)} {error['msg']}", param=_path(steps))
        if error["type"].startswith("union_tag"):
            return self._untagged(steps, node, error["input"])
        if error["loc"][-1] == "[key]":  # logit_bias alone is particular about its keys
            path = _path(steps[:-1])
            return InvalidRequest(
                f"{path} must have token ids in decimal digits as its keys, not {shown(error['input'])}",
                param=path,
            )
        if error["type"] == "missing":
            return missing(_path(steps), self._expected(node))
        return wrong(_path(steps), self._expected(node), error["input"], _note(node))

    def expected(self, name: str) -> str:
        """What a field of the request must be."""
        return self._expected(self._schema["properties"][name])

    def _untagged(self, steps: Steps, node: Schema, value: Any) -> InvalidRequest:
        """The field that says which branch of a union is meant is missing or says none of them."""
        tagged = next((each for each in self._nodes(node) if "discriminator" in each), None)
        if tagged is None:
            return wrong(_path(steps), self._expected(node), value)
        name = tagged["discriminator"]["propertyName"]
        path = _path((*steps, name))
        expected = _one_of(tagged["discriminator"]["mapping"])
        return wrong(path, expected, value[name]) if name in value else missing(path, expected)

    def _find(self, loc: Steps) -> tuple[Steps, Schema]:
        """A location without the names of unions' branches, which pydantic puts between the fields, and the
        schema that holds there."""
        node, steps = self._schema, []
        for step in loc:
            branch = self._branch(node, step)
            if branch is None and (branch := self._child(node, step)) is not None:
                steps.append(step)
            node = branch or node
        return tuple(steps), node

    def _branch(self, node: Schema, step: Step) -> Schema | None:
        """The branch of a union that has that name: the value that tells it apart, or its title."""
        for each in self._nodes(node):
            reference = each.get("discriminator", {}).get("mapping", {}).get(step)
            if reference is not None:
                return self._follow(reference)
            if each.get("title") == step:
                return each
        return None

    def _child(self, node: Schema, step: Step) -> Schema | None:
        """The schema of an item or a property; None where there is none of that name."""
        for branch in self._leaves(node):
            if isinstance(step, int):
                child = branch.get("items")
            else:
                anything = next(iter(branch.get("patternProperties", {}).values()), None)
                child = branch.get("properties", {}).get(step, anything)
            if child is not None:
                return dict(child)
        return None

    def _nodes(self, node: Schema) -> Iterator[Schema]:
        """A schema and all its alternatives, references followed."""
        if "$ref" in node:
            node = self._follow(node["$ref"])
        yield node
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from self._nodes(branch)

    def _leaves(self, node: Schema) -> Iterator[Schema]:
        """The alternatives themselves, but for null."""
        for each in self._nodes(node):
            if not each.keys() & {"anyOf", "oneOf"} and each.get("type") != "null":
                yield each

    def _follow(self, reference: str) -> Schema:
        return dict(self._schema["$defs"][reference.rpartition("/")[2]])

    def _expected(self, node: Schema) -> str:
        """What a schema asks for. Alternatives that read the same are one."""
        return " or ".join(dict.fromkeys(map(self._phrase, self._leaves(node))))

    def _phrase(self, node: Schema) -> str:
        """A schema in words, without its alternatives."""
        if node.get("title", "")[:1].islower():
            return str(node["title"])
        if "const" in node:
            return shown(node["const"])
        if "enum" in node:
            return _one_of(node["enum"])
        match node["type"]:
            case "string":
                return ("a non-empty string" if node.get("minLength") else "a string") + _length(node)
            case "boolean":
                return "true or false"
            case "integer" | "number":
                return ("an integer" if node["type"] == "integer" else "a number") + _range(node)
            case "array":
                return _array(node) + self._expected(node["items"])
            case _:
                most = node.get("maxProperties")
                return f"an object of up to {most} entries" if most else "an object"


def _path(steps: Steps) -> str:
    """As a programmer writes it: `messages[2].role`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _note(node: Schema) -> str:
    """Why there is only one value that is good."""
    return f". {node['description']}" if "const" in node and "description" in node else ""


def _one_of(values: Any) -> str:
    return "one of " + ", ".join(map(shown, values))


def _array(node: Schema) -> str:
    if "maxItems" in node:
        return f"an array of up to {node['maxItems']} items, each "
    return "a non-empty array, each item " if node.get("minItems") else "an array, each item "


def _length(node: Schema) -> str:
    return f" of at most {node['maxLength']} characters" if "maxLength" in node else ""


def _range(node: Schema) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    if most is None:
        return "" if least is None else f" of at least {least}"
    return f" from {least} to {most}"
