"""Tries out what grammar xgrammar makes of a schema, in a program of its own.

    python -m serving.grammars

Schemas are written by clients, and over some xgrammar takes hours, or all memory, or ends its process. So
each is tried first where that harms nobody: one that takes more than CPU_S or MEMORY_BYTES ends this program,
and whoever has started it can tell.

It reads a line of JSON, the vocabulary as xgrammar writes it, and says READY. It answers every further line,
a `Trial`, with one of its own: what is wrong with it, as JSON; null if nothing is.
"""

from __future__ import annotations

import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import xgrammar

CPU_S = 10.0
"""Seconds of processor time for one trial. The engine will need about as many again."""

MEMORY_BYTES = 2 << 30
"""What this program may take of memory beside the vocabulary."""

CACHE_BYTES = 64 << 20
"""Of that, what xgrammar may keep for the next schema."""

MOST_PIECES = 256
"""Of one pattern, with its repetitions written out. Far below what xgrammar would try, a pattern can cost the
engine seconds for each token."""

LOOP = 4
"""Pieces that one without a bound counts for: what it costs grows with the square of their number."""

UNHELD = {"not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"}
"""Keywords that xgrammar passes over: an answer would only be said to be of such a schema."""

HELD_BY_TYPE = {
    "minLength": "string",
    "maxLength": "string",
    "pattern": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "minItems": "array",
    "maxItems": "array",
    "required": "object",
}
"""Keywords that it passes over where the schema does not say the type that they are for."""

_SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_DATA = {"const", "enum", "default", "examples"}

READY = b"ready\n"

_PIECES = re.compile(
    r"\\u\{[^}]*\} | \\. | \[(?:\\.|[^\]\\])*\] | (?P<open>\((?:\?(?:[:=!]|<[=!]|<\w+>))?) | (?P<close>\))"
    r" | (?P<loop>[*+]) | \{(?P<least>\d+)(?P<range>,(?P<most>\d*))?\} | .",
    re.DOTALL | re.VERBOSE,
)
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class Trial(msgspec.Struct, frozen=True):
    """What vLLM would hand to xgrammar."""

    kind: Literal["json", "structural_tag"]
    """What `spec` is: a JSON Schema, or xgrammar's own format for schemas with other text around them."""
    spec: str
    any_whitespace: bool


def main() -> None:
    """Try one after another, until nobody asks any more."""
    lines = sys.stdin.buffer
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(lines.readline().decode())
    # One thread, so that this takes no more than one processor from the engine. With a cache, as vLLM has
    # one: xgrammar can do less with it.
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_limit_bytes=CACHE_BYTES)
    most = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    _say(READY)
    for line in lines:
        # At zero comes a signal that nothing here handles.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        wrong = flaw(compiler, msgspec.json.decode(line, type=Trial))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(msgspec.json.encode(wrong) + b"\n")


def flaw(compiler: xgrammar.GrammarCompiler, trial: Trial) -> str | None:
    """What keeps an engine from holding an answer to this, in words for the client; None if nothing does."""
    for pattern in _patterns(_schemas(trial)):
        pieces = count_pieces(pattern)
        if pieces > MOST_PIECES:
            return (
                f"the pattern {pattern[:80]!r} has {pieces} pieces with its repetitions written out, and an"
                f" answer can be held to at most {MOST_PIECES}"
            )
    passed_over = next(_passed_over(_schemas(trial)), None)
    if passed_over is not None:
        return passed_over
    try:
        grammar = _compiled(compiler, trial)
    except (RuntimeError, MemoryError) as error:
        return _reason(str(error))
    tokens = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
    xgrammar.GrammarMatcher(grammar).fill_next_token_bitmask(tokens)
    return None if tokens.any() else "nothing can be of this schema"


def count_pieces(pattern: str) -> int:
    """How many characters, classes and the like a regular expression has, its repetitions written out."""
    groups = [0]
    last = 0
    for piece in _PIECES.finditer(pattern):
        times = _times(piece)
        if piece["open"]:
            groups.append(0)
            last = 0
        elif times is not None:
            groups[-1] += last * (times - 1)
            last *= times
        else:
            last = groups.pop() if piece["close"] and len(groups) > 1 else 1
            groups[-1] += last
    return sum(groups)


def _times(piece: re.Match[str]) -> int | None:
    """How often what stands before it is there; None for what is no repetition."""
    if piece["loop"]:
        return LOOP
    if not piece["least"]:
        return None
    # A number of any length is a pattern, but one of ten digits is too much already.
    least, most = int(piece["least"][:10]), int((piece["most"] or "0")[:10])
    return least + LOOP if piece["range"] and not piece["most"] else max(least, most)


def _compiled(compiler: xgrammar.GrammarCompiler, trial: Trial) -> xgrammar.CompiledGrammar:
    if trial.kind == "structural_tag":
        return compiler.compile_structural_tag(trial.spec)
    separators = None if trial.any_whitespace else (",", ":")
    return compiler.compile_json_schema(
        trial.spec, any_whitespace=trial.any_whitespace, separators=separators
    )


def _schemas(trial: Trial) -> Any:
    said = msgspec.json.decode(trial.spec)
    return said if trial.kind == "json" else list(_found(said, "json_schema"))


def _patterns(schemas: Any) -> Iterator[str]:
    yield from (pattern for pattern in _found(schemas, "pattern") if isinstance(pattern, str))
    for properties in _found(schemas, "patternProperties"):
        yield from properties


def _passed_over(schema: Any) -> Iterator[str]:
    """What of a schema an answer could not be held to, in words; in all schemas that it is made of."""
    if isinstance(schema, list):
        for each in schema:
            yield from _passed_over(each)
        return
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in UNHELD:
            yield f"an answer cannot be held to {keyword!r}"
        elif keyword == "$ref" and not str(value).startswith("#"):
            yield f"an answer cannot be held to a schema that is elsewhere: {str(value)[:80]!r}"
        elif keyword in HELD_BY_TYPE and "type" not in schema:
            yield f"an answer is held to {keyword!r} only beside a type, such as {HELD_BY_TYPE[keyword]!r}"
        elif keyword in _SCHEMA_MAPS and isinstance(value, dict):
            yield from _passed_over(list(value.values()))
        elif keyword not in _DATA:
            yield from _passed_over(value)


def _found(node: Any, key: str) -> Iterator[Any]:
    """Every value under a key, however deep."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        node = node.values()
    elif not isinstance(node, list):
        return
    for inner in node:
        yield from _found(inner, key)


def _reason(message: str) -> str:
    """What xgrammar says, without where in its sources it says it; and nothing of what only they explain."""
    reason = _PLACE.sub("", message).strip().partition("\n")[0]
    return "no grammar can be made of it" if reason.startswith("Check failed") else reason[:300]


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
