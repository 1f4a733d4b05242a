"""What can be wrong with a configuration, and the words in which it is said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

# The kinds up to `value_error` are pydantic's own.
WORDING = {
    "missing": "required, and not given",
    "extra_forbidden": "unknown key; {known}",
    "invalid_key": "expected keys that are text, got {value} as a key",
    "model_type": "expected keys with values, got {value}",
    "dict_type": "expected keys with values, got {value}",
    "tuple_type": "expected a list, got {value}",
    "string_type": "expected text, got {value}",
    "path_type": "expected a path, got {value}",
    "bool_type": "expected true or false, got {value}",
    "int_type": "expected a whole number, got {value}",
    "float_type": "expected a number, got {value}",
    "finite_number": "expected a finite number, got {value}",
    "literal_error": "expected {expected}, got {value}",
    "greater_than": "expected more than {gt}, got {value}",
    "greater_than_equal": "expected at least {ge}, got {value}",
    "less_than_equal": "expected at most {le}, got {value}",
    "value_error": "expected {error}, got {value}",
    "no_file": "no such file",
    "unreadable": "cannot be read: {reason}",
    "not_utf8": "not UTF-8 text, at byte {at}",
    "not_yaml": "not YAML: {reason}, at line {line}, column {column}",
    "too_deep": "nested too deeply to be a configuration",
    "empty": "empty; a configuration has at least `models`",
    "not_mapping": "expected keys with values at the top, got {value}",
    "given_twice": "given at line {line} and again at line {again}",
    "name_taken": "{value} is already the name at {first}",
    "name_case": "{value} differs only by case from the name at {first}, and names are matched in any case",
    "no_backend": "expected engine, for a model that runs here, or upstream, for one that a provider serves;"
    " neither is given",
    "two_backends": "given beside engine; a model runs here or is served by a provider",
    "hosted_only": "means nothing for a model that a provider serves; leave it out",
    "url_parts": "expected an address without user name, password, query and fragment: no key belongs there",
    "variable_name": "expected the name of an environment variable, as OPENAI_API_KEY, not the key itself",
    "no_key": "the environment variable {variable} is not set",
    "unfit_key": "the environment variable {variable} has something that cannot be a key:"
    " expected printable ASCII without spaces",
    "open_to_all": "false lets anybody use the models, which is for a loopback address alone;"
    " listen.host is {host}",
    "bad_store": "cannot be used: {reason}",
    "store_of_one": "a store in a file is for one router, and routers is {routers}; expected"
    " postgresql://user:password@host/database",
    "no_redis": "{routers} routers count limits together in Redis; expected redis://host:port/database",
    "store_url": "expected sqlite:///path or postgresql://user:password@host/database",
    "redis_url": "expected redis://host:port/database",
    "source_missing": "required for engine vllm: a folder, a GGUF file or a hub id",
    "source_unused": "the echo engine has no model to load; leave it out",
    "no_vllm": "{reason}",
    "unknown_argument": "unknown vLLM engine argument; {known}",
    "unknown_parser": "unknown to vLLM; {known}",
    "simulation_missing": "required for a simulated accelerator: step_ms, or the device to model",
    "not_simulated": "given without `accelerator: simulated`",
    "accelerator_unused": "the echo engine computes nothing; leave it out",
    "parser_unused": "the echo engine calls no tools and does not reason; leave it out",
    "reserved_argument": "cannot be set: {reason}",
    "workers": "expected a whole number of at least 1, got {value}",
    "gpus": "expected auto, 0 or {workers} (what the parallel sizes in engine_args multiply to), got {value}",
    "gpus_unused": "expected auto or 0, as {engine} uses none, got {value}",
}


class Fault(NamedTuple):
    """What is wrong, and in which field; in none where it is the file as a whole."""

    field: str
    text: str


class ConfigError(Exception):
    """The configuration cannot be used. Its text has a line for each fault."""

    def __init__(self, path: Path, faults: Iterable[Fault]) -> None:
        self.path = path
        self.faults = tuple(dict.fromkeys(faults))
        lines = (": ".join(filter(None, (str(path), *fault))) for fault in self.faults)
        super().__init__("\n".join(map(_printable, lines)))


def fault(field: str, kind: str, **details: object) -> Fault:
    """A fault of one of the kinds in WORDING, with the details that its words ask for."""
    return Fault(field, WORDING[kind].format(**details))


def field_at(*location: str | int) -> str:
    """`models[1].engine_args.max_model_len`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_short(step)}" for step in location)
    return "".join(steps).removeprefix(".")


def nearest(key: str, known: Iterable[str]) -> str:
    """The known keys that an unknown one may have been meant to be."""
    known = sorted(known)
    if near := get_close_matches(key.lower().replace("-", "_"), known):
        return f"did you mean {' or '.join(near)}?"
    return f"known ones are {', '.join(known)}" if len(known) < 20 else "none has a name like it"


def shown(value: object) -> str:
    """A value of the file as people would say it, its type where they could mistake it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the boolean {str(value).lower()}"
        case str():
            return f"the text {json.dumps(_short(value), ensure_ascii=False)}"
        case int() if value.bit_length() > 128:
            return "a number of more than 38 digits"
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case dict():
            return f"a mapping of {len(value)} keys" if value else "an empty mapping"
    return str(value)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _printable(text: str) -> str:
    """`text` without anything that would break the line or the terminal it is shown on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
