from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.server import Server, serving


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two routers, and models that repeat."""
    config = yaml.safe_load(Path(__file__).with_name("echoes.yaml").read_text())
    with serving(config, tmp_path_factory.mktemp("echoes")) as server:
        yield server
