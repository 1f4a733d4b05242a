from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from serving.source import resolve
from tests.serving.replayed import SMOLLM2

# What xgrammar imports warns of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")


class Program:
    """Schemas tried out in the program, which is started again when one has ended it."""

    def __init__(self, vocabulary: str) -> None:
        self._vocabulary = vocabulary.encode() + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def flaw(self, schema: Any, kind: str = "json") -> str | None:
        """What is wrong with a schema. Raises EOFError if it has ended the program."""
        trial = {"kind": kind, "spec": json.dumps(schema), "any_whitespace": False}
        answer = self._asked(json.dumps(trial).encode() + b"\n")
        if not answer:
            self.end()
            raise EOFError
        return msgspec.json.decode(answer, type=str | None)

    def end(self) -> None:
        """Leave nothing behind. It ends by itself when nobody can ask any more."""
        if self._process is not None:
            self._process.communicate(timeout=20)
            self._process = None

    def _asked(self, line: bytes) -> bytes:
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "serving.grammars"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.starts += 1
        assert self._asked(self._vocabulary) == b"ready\n"
        return self._process


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """The program, with SmolLM2's vocabulary."""
    import xgrammar  # noqa: PLC0415 - slow, and for this file only
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(resolve(SMOLLM2, print))
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    program = Program(vocabulary.serialize_json())
    yield program
    program.end()


def test_counts_pieces_with_repetitions_written_out() -> None:
    """A pattern counts for what it is when each of its repetitions is written out."""
    from serving.grammars import count_pieces  # noqa: PLC0415 - loads xgrammar

    counted = {
        "": 0,
        "abc": 3,
        "a{3}": 3,
        "(ab){2,5}": 10,
        "(?:ab){2,5}": 10,
        "(?<name>ab){2,5}": 10,
        "a{2,}": 6,
        "a*": 4,
        r"[\]a-z]{2}": 2,
        r"\d{3}-\d{4}": 8,
        r"\u{2028}": 1,
        "((a{1,100}){1,100}){1,100}": 1_000_000,
        ")((": 1,
    }
    assert {pattern: count_pieces(pattern) for pattern in counted} == counted


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"]},
        {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
        {"type": "string", "pattern": "^[a-z]{1,64}$"},
        {"enum": [f"value {number}" for number in range(1000)]},
        {"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000},
    ],
)
def test_a_good_schema(program: Program, schema: Any) -> None:
    """A schema that an engine can hold an answer to has no flaw."""
    assert program.flaw(schema) is None


@pytest.mark.parametrize(
    ("schema", "flaw"),
    [
        ({"type": "nonsense"}, 'Unsupported type "nonsense"'),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"minItems": 5, "maxItems": 2, "type": "array"}, "5 > 2"),
        ({"type": "string", "pattern": "(["}, "pars"),
        ({"type": "string", "pattern": "[z-a]"}, "bound"),
        ({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}, "has 1000002 pieces"),
        ({"type": "object", "patternProperties": {"a{1,999}": {}}}, "has 999 pieces"),
        ({"type": "string", "pattern": ".{0,256}"}, "no grammar can be made of it"),
        ({"type": "integer", "maximum": 10**40}, "no grammar can be made of it"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "nothing can be of this schema"),
    ],
)
def test_a_flaw_is_told(program: Program, schema: Any, flaw: str) -> None:
    """What is wrong with a schema is said in words for its author, who has not seen our sources."""
    told = program.flaw(schema)
    assert told
    assert flaw in told
    assert "\n" not in told
    assert ".cc" not in told


def test_what_takes_too_long_ends_the_program(program: Program) -> None:
    """A schema over which xgrammar would take hours ends the program, which can be started again."""
    with pytest.raises(EOFError):
        program.flaw({"type": "string", "pattern": "(.{0,14}){0,14}"})
    before = program.starts
    assert program.flaw({"type": "object"}) is None
    assert program.starts == before + 1


def test_schemas_among_other_text(program: Program) -> None:
    """A structural tag is tried like a schema, and the schemas in it are looked at."""
    call = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    tag = {"type": "tag", "begin": "<call>", "content": call, "end": "</call>"}
    spec = {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": ["<call>"], "tags": [tag]},
    }
    assert program.flaw(spec, "structural_tag") is None
    call["json_schema"] = {"type": "string", "pattern": "a{1,999}"}
    assert "999" in (program.flaw(spec, "structural_tag") or "")


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {}}, "'not'"),
        ({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}, "'if'"),
        ({"type": "array", "items": {"minimum": 5}}, "'minimum'"),
        ({"anyOf": [{"type": "string"}, {"required": ["a"]}]}, "'required'"),
        (
            {"items": {"$ref": "http://127.0.0.1:9/schema.json"}, "type": "array"},
            "'http://127.0.0.1:9/schema.json'",
        ),
        ({"$defs": {"a": {"dependentRequired": {}}}, "$ref": "#/$defs/a"}, "'dependentRequired'"),
    ],
)
def test_what_would_be_passed_over_is_a_flaw(program: Program, schema: Any, keyword: str) -> None:
    """A keyword that no answer would be held to is refused by its name, wherever in a schema it stands."""
    assert keyword in (program.flaw(schema) or "")


def test_names_and_values_are_no_keywords(program: Program) -> None:
    """A property called like a keyword, and a value that looks like a schema, are neither."""
    properties = {"not": {"type": "string"}, "required": {"const": {"if": 1, "minimum": 2}}}
    assert program.flaw({"type": "object", "properties": properties, "required": ["not"]}) is None
