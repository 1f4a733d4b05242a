from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from serving.simulation.answers import Prose
from serving.source import resolve
from tests.end_to_end.server import ROOT, Server, serving

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "simulated.yaml").read_text())

LONGEST = 1024
"""Tokens of an answer here at most."""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve CONFIG=deploy/simulated.yaml` starts."""
    with serving(CONFIG, tmp_path_factory.mktemp("simulated")) as server:
        yield server


@pytest.fixture(scope="package")
def prose() -> Callable[[int, int], str]:
    """The text of so many tokens that the simulation's answers have for a seed."""
    (model,) = CONFIG["models"]
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(model["source"], print, weights=False))
    answers = Prose(tokenizer, LONGEST)

    def said(seed: int, tokens: int) -> str:
        text: str = tokenizer.decode(list(answers.answer(seed, tokens)))
        return text

    return said


@pytest.fixture(autouse=True)
def open_files() -> Iterator[None]:
    """Lets this process have a connection for each stream."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
