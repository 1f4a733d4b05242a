"""What the scripts beside this share. They run in the environments of the clients that they drive, so they
and this import nothing but that client, what comes with it, and Python's own library."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

ANSWER = "The capital of France is Paris."
"""What the model says to PARIS at temperature 0."""

PREFIX = "check_"

Error = TypeVar("Error", bound=Exception)


def run() -> None:
    """Run the script's checks in their order, and say on a line of JSON how each went."""
    for name, check in list(vars(sys.modules["__main__"]).items()):
        if name.startswith(PREFIX):
            outcome = {"check": name.removeprefix(PREFIX), "failure": failure(check)}
            print(json.dumps(outcome), flush=True)  # noqa: T201 - the test reads it


def failure(check: Callable[[], object]) -> str | None:
    """What went wrong in a check, for a person; None if nothing did."""
    try:
        result = check()
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except Exception as error:  # noqa: BLE001 - the next check runs whatever it was
        return described(error)
    return None


def described(error: Exception) -> str:
    """An exception with its causes, and the script's own lines and variables on the way to it."""
    script = sys.modules["__main__"].__file__
    whole = traceback.TracebackException.from_exception(error, capture_locals=True)
    link: traceback.TracebackException | None = whole
    while link:
        link.stack[:] = [frame for frame in link.stack if frame.filename == script]
        link = link.__cause__ or link.__context__
    return "".join(whole.format())


def refused(kind: type[Error], call: Callable[..., object], **parameters: Any) -> Error:
    """The exception of that very class which a call raises."""
    try:
        answer = call(**parameters)
    except kind as error:
        if type(error) is kind:
            return error
        raise
    raise AssertionError(f"no {kind.__name__}, but {answer!r}")
