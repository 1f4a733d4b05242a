from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from serving.engine import Engine
from serving.source import resolve
from tests.serving.asking import running, smollm2
from tests.serving.replayed import SMOLLM2


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with a template that, as many do, refuses one role."""
    converted = resolve(SMOLLM2, print)
    own = tmp_path_factory.mktemp("model")
    for file in converted.iterdir():
        (own / file.name).symlink_to(file)
    template = own / "chat_template.jinja"
    template.unlink()
    shutil.copy(converted / template.name, template)
    refusal = "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    loop = "{% for message in messages %}"
    template.write_text(template.read_text().replace(loop, loop + refusal, 1))
    return own


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    """One vLLM engine with a real model for all who ask for it."""
    async with running(smollm2(folder)) as engine:
        yield engine
