from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from serving.vllm_arguments import RESERVED, VllmMissing, known, parsers


@pytest.mark.filterwarnings("default")  # what vLLM imports warns of deprecations
def test_names_are_those_of_vllm() -> None:
    """The names read from vLLM's source text are exactly the public fields of its class."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - slow, and for this test only

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert known() == {name for name in fields if not name.startswith("_")}


@pytest.mark.filterwarnings("default")  # what vLLM imports warns of deprecations
def test_parsers_are_those_of_vllm() -> None:
    """The parsers read from vLLM's source text are those that it finds by name."""
    from vllm.reasoning import ReasoningParserManager  # noqa: PLC0415 - slow, and for this test only
    from vllm.tool_parsers import ToolParserManager  # noqa: PLC0415

    assert parsers("tool_parser") == set(ToolParserManager.list_registered()) > {"hermes", "llama3_json"}
    assert parsers("reasoning_parser") == set(ReasoningParserManager.list_registered()) > {"deepseek_r1"}


def test_names_are_known_without_vllm_being_loaded() -> None:
    """Checking names loads neither vLLM nor torch."""
    code = (
        "import sys; from serving.vllm_arguments import known, parsers\n"
        "known(), parsers('tool_parser'), parsers('reasoning_parser')\n"
        "print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_reserved_names_exist() -> None:
    """What Trunkline sets itself are arguments that vLLM has."""
    assert RESERVED.keys() <= known()


def test_missing_vllm_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM there are no names to check against, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    known.cache_clear()
    with pytest.raises(VllmMissing, match=r"not installed.*`cpu` or `gpu`"):
        known()
