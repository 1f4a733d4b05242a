"""Where a model comes from: from the words of the configuration to a folder that vLLM loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from serving import gguf

Kind = Literal["folder", "gguf", "package", "hub"]

_PACKAGE = "package:"
_PATH_STARTS = ("/", "./", "../", "~/")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_WEIGHTS = "*.safetensors"
_OLD_WEIGHTS = "*.bin"
_NOT_WEIGHTS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]


class SourceError(Exception):
    """The source cannot be used, and why, in words for whoever wrote the configuration."""


def kind(source: str) -> Kind:
    """What a source is, by its spelling alone, so that it means the same on every machine.

    A path begins with /, ./, ../ or ~/ or ends in .gguf; `package:` begins a package's file; anything else
    is a hub id.
    """
    if source.startswith(_PACKAGE):
        return "package"
    if source.lower().endswith(".gguf"):
        return "gguf"
    if source.startswith(_PATH_STARTS) or source in {".", "..", "~"}:
        return "folder"
    return "hub"


def anchored(source: str, base: Path) -> str:
    """The source with a relative path taken from `base`, the folder of the configuration that names it."""
    if kind(source) in {"package", "hub"}:
        return source
    return str((base / Path(source).expanduser()).resolve())


def check(source: str) -> None:
    """Find what is wrong with a source without downloading or converting anything. Raises SourceError."""
    if kind(source) == "hub":
        _check_hub(source)
    else:
        _check_path(_path(source))


def resolve(source: str, progress: Callable[[str], None], *, weights: bool = True) -> Path:
    """The folder that vLLM loads, downloaded or converted where need be, which may take minutes, or without
    `weights` seconds.

    `progress` is called with plain sentences meanwhile. Raises SourceError.
    """
    check(source)
    if kind(source) == "hub":
        return _download(source, progress, weights=weights)
    path = _path(source)
    if path.is_dir():
        return path
    try:
        return gguf.converted(path, progress, weights=weights)
    except gguf.ConversionError as error:
        raise SourceError(f"source {source!r}: {error}") from error


def _path(source: str) -> Path:
    if kind(source) == "package":
        return _package_path(source)
    return Path(source).expanduser().absolute()


def _package_path(source: str) -> Path:
    package, _, inside = source.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not inside or ".." in inside.split("/"):
        raise SourceError(f"source {source!r}: expected package:NAME/FILE, with a top-level package's name")
    # Only looked up, never imported: what the package itself depends on need not be installed.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"source {source!r}: the Python package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0], inside)


def _check_path(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        _check_gguf(path)
    elif not path.exists():
        raise SourceError(f"source: there is no folder {path}")
    elif not path.is_dir():
        raise SourceError(f"source: {path} is neither a folder nor a .gguf file")
    elif not (path / "config.json").is_file():
        raise SourceError(
            f"source: the folder {path} has no config.json, so it holds no model that vLLM loads"
        )


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"source: there is no file {path}")
    if not gguf.is_gguf(path):
        raise SourceError(f"source: {path} is not a GGUF file; its first bytes are not {gguf.MAGIC!r}")


def _check_hub(source: str) -> None:
    name, revision = _hub_id(source)
    if Path(source).is_dir():
        raise SourceError(
            f"source {source!r}: names a model on the hub, but a folder of that name is here too;"
            f" write './{source}' to mean the folder"
        )
    from huggingface_hub import constants, try_to_load_from_cache  # noqa: PLC0415 - slow, and for the hub only

    if constants.HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(name, "config.json", revision=revision), str
    ):
        raise SourceError(
            f"source {source!r}: HF_HUB_OFFLINE is set, and the hub's local cache has no such model"
        )


def _hub_id(source: str) -> tuple[str, str | None]:
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceError(
            f"source {source!r}: expected a path that begins with / or ./, a .gguf file, package:NAME/FILE,"
            " or a hub id such as org/name"
        )
    return match["name"], match["revision"]


def _download(source: str, progress: Callable[[str], None], *, weights: bool) -> Path:
    from huggingface_hub import errors  # noqa: PLC0415 - slow, and for the hub only

    name, revision = _hub_id(source)
    progress(f"fetching {source} from the model hub, or from its local cache")
    try:
        folder = _snapshot(name, revision, [*_NOT_WEIGHTS, _WEIGHTS] if weights else _NOT_WEIGHTS)
        if weights and not any(folder.glob(_WEIGHTS)):
            folder = _snapshot(name, revision, [*_NOT_WEIGHTS, _OLD_WEIGHTS])
    except errors.GatedRepoError as error:
        raise SourceError(
            f"source {source!r}: its owner asks for an agreement; accept it on the hub and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"source {source!r}: the hub has the model but not the revision {revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"source {source!r}: the hub has no such model, or it is private and HF_TOKEN does not open it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"source {source!r}: the hub cannot be reached, and its local cache does not have the model"
        ) from error
    except OSError as error:
        raise SourceError(f"source {source!r}: the download failed: {error}") from error
    _check_path(folder)
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, and for the hub only

    # A repository often holds its weights twice more, for other frameworks, in folders of their own.
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))
