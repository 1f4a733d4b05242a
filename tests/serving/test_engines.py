from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from pydantic import ValidationError

from serving.echo import EchoEngine
from serving.engines import build_engine
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
        ({"engine": "echo", "accelerator": "simulated"}, "the engine echo has none"),
        ({"source": "org/name", "accelerator": "simulated"}, "together, or neither"),
        ({"source": "org/name", "simulation": {"step_ms": 5}}, "together, or neither"),
        ({"source": "org/name", "accelerator": "simulated", "simulation": {}}, "exactly one of step_ms and"),
    ],
)
def test_settings_that_fit_no_engine_are_refused(settings: dict[str, object], said: str) -> None:
    """An engine has a source exactly if it loads a model, an accelerator's simulation exactly if it has one,
    and no key is unknown."""
    with pytest.raises(ValidationError, match=said):
        EngineSettings.model_validate(settings)


def test_echo_is_built_from_its_arguments() -> None:
    """The echo engine takes its arguments from the same settings as any engine."""
    engine = build_engine(EngineSettings(engine="echo", engine_args={"max_model_len": 100}))
    assert isinstance(engine, EchoEngine)
    assert engine.context_length == 100


def test_the_echo_engine_loads_no_vllm() -> None:
    """An engine without a model starts without what a model needs."""
    code = (
        "import sys; from serving.engines import build_engine; from serving.settings import EngineSettings\n"
        "build_engine(EngineSettings(engine='echo'))\n"
        "print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
