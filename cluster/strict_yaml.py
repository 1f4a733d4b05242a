"""A YAML file as plain data, and what PyYAML would pass over in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from cluster.faults import ConfigError, Fault, fault, field_at, shown


def read(path: Path) -> tuple[dict[Any, Any], list[Fault]]:
    """The mapping at the top of the file, and a fault for each key that is given twice anywhere in it.

    Raises ConfigError where there is no such mapping.
    """
    text = _text(path)
    try:
        data, repeated = _construct(text)
    except RecursionError:
        raise ConfigError(path, [fault("", "too_deep")]) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, [_syntax_fault(error, text)]) from None
    if data is None:
        raise ConfigError(path, [fault("", "empty")])
    if not isinstance(data, dict):
        raise ConfigError(path, [fault("", "not_mapping", value=shown(data))])
    return data, repeated


class _Loader(yaml.SafeLoader):
    """SafeLoader, but a date and a lone = stay text, as no setting is either of them, and what does not fit
    its tag is an error of YAML's and not of whatever Python function was tried on it."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"this is no {kind}", node.start_mark) from error
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConstructorError(None, None, "half a surrogate pair", node.start_mark)
        return value


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        found = fault("", "no_file")
    except UnicodeDecodeError as error:
        found = fault("", "not_utf8", at=error.start)
    except (OSError, ValueError) as error:
        found = fault("", "unreadable", reason=getattr(error, "strerror", None) or error)
    raise ConfigError(path, [found])


def _construct(text: str) -> tuple[Any, list[Fault]]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        # First: merge keys (<<) are resolved by writing what they merge into the nodes.
        repeated = list(_duplicates(root))
        return None if root is None else loader.construct_document(root), repeated
    except (OverflowError, ValueError) as error:  # an escape past the last character of Unicode
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from error
    finally:
        loader.dispose()


def _syntax_fault(error: yaml.YAMLError, text: str) -> Fault:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        reason = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark
        return fault("", "not_yaml", reason=reason, line=mark.line + 1, column=mark.column + 1)
    # What is left is a character that YAML forbids.
    before = text[: getattr(error, "position", 0)]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return fault("", "not_yaml", reason=getattr(error, "reason", error), line=line, column=column)


def _duplicates(root: yaml.Node | None) -> Iterator[Fault]:
    """YAML forbids a key twice in a mapping; PyYAML keeps the last."""
    pending: list[tuple[yaml.Node | None, tuple[str | int, ...]]] = [(root, ())]
    seen: set[int] = set()  # an alias is the same node again, and may contain itself
    while pending:
        node, at = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(item, (*at, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            yield from _repeated(node, at)
            pending += [(value, (*at, str(key.value))) for key, value in node.value]


def _repeated(node: yaml.MappingNode, at: tuple[str | int, ...]) -> Iterator[Fault]:
    first: dict[str, yaml.Mark] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:str":
            mark = first.setdefault(key.value, key.start_mark)
            if mark is not key.start_mark:
                lines = {"line": mark.line + 1, "again": key.start_mark.line + 1}
                yield fault(field_at(*at, key.value), "given_twice", **lines)
