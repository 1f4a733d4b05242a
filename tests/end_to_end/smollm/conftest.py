from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.end_to_end.server import ROOT, Server, serving
from tests.end_to_end.smollm import QUEUE_S


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve` starts, with a queue that is soon given up."""
    config = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
    config["timeouts"] = {"queue_s": QUEUE_S}
    with serving(config, tmp_path_factory.mktemp("smollm")) as server:
        yield server
