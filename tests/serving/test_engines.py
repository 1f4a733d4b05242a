from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.echo import EchoEngine
from serving.engines import build_engine, refusals
from serving.settings import EngineSettings


def test_settings_travel() -> None:
    """Settings reach a replica in another process unchanged."""
    settings = EngineSettings(source="org/name", engine_args={"max_model_len": 2048})
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - just pickled


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "vllm"}, "source: missing"),
        ({"engine": "echo", "source": "org/name"}, "'org/name' is given, but the engine echo loads no model"),
        ({"engine": "llamacpp"}, "'vllm' or 'echo'"),
        ({"engine": "echo", "engine_arguments": {}}, "engine_arguments"),
    ],
)
def test_settings_that_fit_no_engine_are_refused(settings: dict[str, object], said: str) -> None:
    """An engine has a source exactly if it loads a model, and no key is unknown."""
    with pytest.raises(ValidationError, match=said):
        EngineSettings.model_validate(settings)


def test_echo_is_built_from_its_arguments() -> None:
    """The echo engine takes its arguments from the same settings as any engine."""
    engine = build_engine(EngineSettings(engine="echo", engine_args={"max_model_len": 100}))
    assert isinstance(engine, EchoEngine)
    assert engine.context_length == 100


def test_good_settings_have_no_refusal(tmp_path: Path) -> None:
    """Settings that would start are not refused."""
    (tmp_path / "config.json").write_text("{}")
    assert refusals(EngineSettings(source=str(tmp_path), engine_args={"dtype": "float32"})) == []
    assert refusals(EngineSettings(engine="echo", engine_args={"tokens_per_second": 20.0})) == []


def test_all_refusals_are_found_at_once(tmp_path: Path) -> None:
    """A wrong source and wrong names are refused together, so that one look corrects all."""
    found = refusals(EngineSettings(source=str(tmp_path / "gone"), engine_args={"dtypo": 1, "model": "x"}))
    assert len(found) == 3


def test_wrong_echo_argument_is_refused() -> None:
    """An argument that the echo engine does not take is refused by name and value."""
    (refusal,) = refusals(EngineSettings(engine="echo", engine_args={"max_num_seqs": 0}))
    assert refusal.startswith("engine_args.max_num_seqs: ")
    assert "0" in refusal


def test_checking_loads_no_engine() -> None:
    """Settings are built and checked without vLLM or torch being loaded."""
    code = (
        "import sys; from serving.engines import refusals; from serving.settings import EngineSettings\n"
        "refusals(EngineSettings(source='/nowhere', engine_args={'dtype': 'auto'}))\n"
        "print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
