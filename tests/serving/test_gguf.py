from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serving import gguf
from serving.source import SourceError, resolve

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WIDTH = 32
HEADS = 4

# transformers and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")


def write_model(file: Path, *, largest: float = 1.0) -> np.ndarray:
    """Write the smallest Llama that is one, and return its embeddings, the first of which is `largest`."""
    from gguf import GGUFWriter, TokenType  # noqa: PLC0415 - so that what needs no file needs no library

    tokens = ["<s>", "</s>", *(chr(letter) for letter in range(ord("a"), ord("z") + 1)), "ab"]
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    numbers = np.random.default_rng(0)
    embeddings = numbers.normal(size=(len(tokens), WIDTH)).astype(np.float32)
    embeddings[0, 0] = largest
    shapes = {
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (2 * WIDTH, WIDTH),
        "blk.0.ffn_up": (2 * WIDTH, WIDTH),
        "blk.0.ffn_down": (WIDTH, 2 * WIDTH),
    }
    writer.add_tensor("token_embd.weight", embeddings)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings


def stored_embeddings(folder: Path) -> tuple[str, np.ndarray]:
    """The type and the values of a folder's embeddings."""
    from safetensors.torch import load_file  # noqa: PLC0415 - brings torch

    weights = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    return str(weights.dtype), weights.float().numpy()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, for this process and its children."""
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_that_nobody_computes_needs_no_weights(tmp_path: Path, cache: Path) -> None:
    """Without weights a file becomes a config that names its architecture, and a tokenizer, once; where there
    is a whole conversion, that is used."""
    file = tmp_path / "tiny.F32.gguf"
    write_model(file)
    said: list[str] = []
    folder = resolve(str(file), said.append, weights=False)
    assert cache in folder.parents
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    assert resolve(str(file), said.append, weights=False) == folder
    assert len(said) == 1
    whole = resolve(str(file), said.append)
    assert whole != folder
    assert resolve(str(file), said.append, weights=False) == whole
    described = json.loads((whole / "config.json").read_text())
    assert {key: described[key] for key in config} == config


def test_conversion_happens_once_and_whole(tmp_path: Path, cache: Path) -> None:
    """Two that ask for a file at once get one conversion of it, whole, whatever a killed one left behind, and
    who asks later gets it at once."""
    file = tmp_path / "tiny.F32.gguf"
    embeddings = write_model(file)
    left = gguf.folder_of(file).with_name(f".{gguf.folder_of(file).name}.partial")
    left.mkdir(parents=True)
    (left / "half of something").touch()
    with subprocess.Popen(
        [sys.executable, "-m", "serving.gguf", str(file)], stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        assert "1 of 4" in killed.stdout.readline()
        killed.kill()

    said: list[str] = []
    with ThreadPoolExecutor(2) as two:
        folders = [two.submit(resolve, str(file), said.append) for _ in range(2)]
    (folder,) = {asked.result() for asked in folders}

    assert cache in folder.parents
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "half of something").exists()
    dtype, stored = stored_embeddings(folder)
    assert dtype == "torch.float16"
    np.testing.assert_allclose(stored, embeddings, rtol=1e-3, atol=1e-6)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert sum("1 of 4" in line for line in said) == 1
    assert sum("waiting for another process" in line for line in said) == 1
    assert any("11 of 11" in line for line in said)
    assert not any("\r" in line or "%" in line for line in said)

    said.clear()
    assert resolve(str(file), said.append) == folder
    assert not said


def test_weights_too_large_for_float16_are_kept(tmp_path: Path, cache: Path) -> None:
    """A model with a weight beyond float16's range is stored with fewer bits rather than with infinities."""
    file = tmp_path / "large.gguf"
    write_model(file, largest=2.0**20)
    dtype, stored = stored_embeddings(gguf.convert(file, print))
    assert dtype == "torch.bfloat16"
    assert stored[0, 0] == 2.0**20


def test_another_content_is_another_folder(tmp_path: Path, cache: Path) -> None:
    """A file that was replaced under its name is converted anew."""
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf.MAGIC + b"one")
    first = gguf.folder_of(file)
    file.write_bytes(gguf.MAGIC + b"two")
    assert gguf.folder_of(file) != first
    assert {first.name[:6], gguf.folder_of(file).name[:6]} == {"model-"}


def test_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRUNKLINE_CACHE comes before XDG_CACHE_HOME, which comes before the home folder."""
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf.MAGIC)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tmp_path / "home/.cache/trunkline" in gguf.folder_of(file).parents
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg/trunkline" in gguf.folder_of(file).parents
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "own"))
    assert tmp_path / "own" in gguf.folder_of(file).parents


def test_broken_file_fails_with_its_reason(tmp_path: Path, cache: Path) -> None:
    """A file that only begins as GGUF fails with one line of reason and leaves no folder that looks done."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(gguf.MAGIC + b"\x03\x00\x00\x00" + b"\x00" * 16)
    with pytest.raises(SourceError, match=r"broken.gguf.*the conversion failed: .+") as failed:
        resolve(str(file), print)
    assert "\n" not in str(failed.value)
    assert not gguf.folder_of(file).exists()
