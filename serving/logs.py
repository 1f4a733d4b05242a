"""Structured logs: one JSON object a line, from every process of a deployment in the same form."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import structlog


def configure(role: str, directory: Path | None) -> None:
    """Send this process's log to `<directory>/<role>-<pid>.jsonl`, or to standard output without a directory.

    Nothing that a client sent is ever a line of its own: values are JSON strings.
    """
    file: BinaryIO = sys.stdout.buffer
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f"{role}-{os.getpid()}.jsonl").open("ab", buffering=0)
    encoder = msgspec.json.Encoder(enc_hook=repr)
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            lambda _logger, _method, event: encoder.encode({"role": role, **event}),
        ],
        logger_factory=structlog.BytesLoggerFactory(cast("BinaryIO", LossyFile(file))),
        cache_logger_on_first_use=True,
    )


class LossyFile:
    """A file that loses what cannot be written: a full disk must not stop the serving."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: bytes) -> None:
        """Write, or not."""
        with suppress(OSError):
            self._file.write(line)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError):
            self._file.flush()
