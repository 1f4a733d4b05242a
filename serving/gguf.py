"""A GGUF file, turned once into a folder that vLLM loads, and kept.

The conversion runs in a process of its own (`python -m serving.gguf FILE`): it needs torch and
transformers, about 2 GB of memory, and whoever asked for it should be left with neither. For a model that
nobody computes, `--without-weights` takes a few seconds and keeps config.json and the tokenizer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

MAGIC = b"GGUF"

VERSION = 1
"""Raise it when the conversion's result changes: folders of an older version are then no longer used."""


_WITHOUT_WEIGHTS = "--without-weights"


class ConversionError(Exception):
    """The file could not be converted, and why, in plain words."""


def is_gguf(file: Path) -> bool:
    """Whether the file begins as a GGUF file does."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def converted(file: Path, progress: Callable[[str], None], *, weights: bool = True) -> Path:
    """The folder made from `file`, converted now if it has not been. Where no weights are asked for, it may
    have them all the same.

    Several processes may ask at once: one converts, the others wait for it. Raises ConversionError.
    """
    whole = folder_of(file)
    folder = whole if weights or whole.is_dir() else folder_of(file, weights=False)
    if not folder.is_dir():
        _run_child(file, progress, weights=weights)
    return folder


def folder_of(file: Path, *, weights: bool = True) -> Path:
    """Where the conversion of `file` is kept, whether or not it is there yet.

    The name holds a digest of the content, so a changed file is never taken for the old one. Reading it
    all costs about a second for each gigabyte; files of hundreds of gigabytes would want something else.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kind = "" if weights else "-without-weights"
    return _cache() / "gguf" / f"{file.stem}-{digest[:12]}-v{VERSION}{kind}"


def _cache() -> Path:
    if own := os.environ.get("TRUNKLINE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared, "trunkline")
    return Path.home() / ".cache" / "trunkline"


def _run_child(file: Path, progress: Callable[[str], None], *, weights: bool) -> None:
    command = [sys.executable, "-m", "serving.gguf", str(file)]
    if not weights:
        command.append(_WITHOUT_WEIGHTS)
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as child,  # noqa: S603 - ourselves
    ):
        try:
            for line in child.stdout or ():
                progress(line.rstrip("\n"))
        except BaseException:
            child.kill()
            raise
        if child.wait() != 0:
            complaints.seek(0)
            lines = [line for line in complaints.read().splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"its process ended with status {child.returncode}"
            raise ConversionError(f"the conversion failed: {reason}")


def convert(file: Path, progress: Callable[[str], None], *, weights: bool = True) -> Path:
    """Convert in this process, unless another has done it or is doing it, and return the folder."""
    folder = folder_of(file, weights=weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock"), file, progress):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            # Left by a conversion that was killed; the lock says that nobody is at it any more.
            shutil.rmtree(partial, ignore_errors=True)
            (_write if weights else _describe)(file, partial, progress)
            partial.rename(folder)
    return folder


@contextlib.contextmanager
def _locked(lock: Path, file: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that converts {file.name}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write(file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"converting {file.name} ({_megabytes(file.stat().st_size)}), once; 1 of 4: loading libraries")
    import torch  # noqa: PLC0415 - takes seconds and memory, so only the process that converts has it
    from transformers import (  # noqa: PLC0415 - the same
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        PreTrainedModel,
    )

    progress(f"converting {file.name}; 2 of 4: reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        # The recipe that yields weights vLLM runs: without `dequantize` the result claims to be quantised.
        with contextlib.redirect_stderr(_BarsAsSentences(f"converting {file.name}; 3 of 4", progress)):
            return AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )

    # float16 keeps three bits more of each weight than bfloat16 does, where the weights are in its range.
    model = load(torch.float16)
    if not all(torch.isfinite(weights).all() for weights in model.parameters()):
        model = load(torch.bfloat16)
    size = sum(weights.numel() * weights.element_size() for weights in model.parameters())
    progress(f"converting {file.name}; 4 of 4: writing {_megabytes(size)}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _describe(file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"reading config and tokenizer of {file.name}, once")
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - as above
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    # What a model says of itself when it is saved.
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = "float16"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


class _BarsAsSentences(io.TextIOBase):
    """A standard error on which transformers draws bars, its only way to say how far it is."""

    _BAR = re.compile(r"(?P<what>[^:\r]+):\s+\d+%.*?(?P<done>\d+)/(?P<all>\d+) \[")

    def __init__(self, prefix: str, progress: Callable[[str], None]) -> None:
        self._prefix = prefix
        self._progress = progress
        self._said = ("", -1)

    def write(self, text: str) -> int:
        if bar := self._BAR.search(text):
            quarter = (bar["what"], 4 * int(bar["done"]) // int(bar["all"]))
            if quarter != self._said:
                self._said = quarter
                what = bar["what"].strip(". ").lower()
                self._progress(f"{self._prefix}: {what}, {bar['done']} of {bar['all']}")
        return len(text)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _say(sentence: str) -> None:
    print(sentence, flush=True)  # noqa: T201 - the parent process reads it


if __name__ == "__main__":
    convert(Path(sys.argv[1]), _say, weights=_WITHOUT_WEIGHTS not in sys.argv[2:])
