from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from serving.vllm_arguments import RESERVED, VllmMissing, known, refusals


@pytest.mark.filterwarnings("default")  # what vLLM imports warns of deprecations
def test_names_are_those_of_vllm() -> None:
    """The names read from vLLM's source text are exactly the public fields of its class."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - slow, and for this test only

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert known() == {name for name in fields if not name.startswith("_")}


def test_names_are_known_without_vllm_being_loaded() -> None:
    """Checking names loads neither vLLM nor torch."""
    code = (
        "import sys; from serving.vllm_arguments import known; known()\n"
        "print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_good_names_pass() -> None:
    """Names of vLLM's own are not refused."""
    assert refusals(["max_model_len", "tensor_parallel_size", "tokenizer"]) == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_model_length", "max_model_len"), ("max-num-seqs", "max_num_seqs"), ("Dtype", "dtype")],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    """A misspelt name is refused, and the refusal names what was probably meant."""
    (refusal,) = refusals(["dtype", name])
    assert refusal.startswith(f"engine_args.{name}: ")
    assert nearest in refusal


def test_name_like_no_other_is_refused_without_a_guess() -> None:
    """Where nothing is near, nothing is suggested."""
    assert refusals(["qqqqqq"]) == ["engine_args.qqqqqq: vLLM has no such argument"]


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_name_is_refused_with_the_reason(name: str) -> None:
    """What Trunkline sets itself exists in vLLM and cannot be configured, and the refusal says why."""
    assert name in known()
    assert refusals([name]) == [f"engine_args.{name}: cannot be set; {RESERVED[name]}"]


def test_missing_vllm_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM there are no names to check against, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    known.cache_clear()
    with pytest.raises(VllmMissing, match=r"not installed.*`cpu` or `gpu`"):
        refusals(["dtype"])
