from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.end_to_end.server import ROOT, Server, serving
from tests.end_to_end.smollm import ALIAS, QUEUE_S, REFUSING, SMOLLM, UPSTREAM
from tests.end_to_end.smollm.refusing import refusing


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve` starts, with a queue that is soon given up, a name with a slash in it, a tool parser,
    and models at a provider that is not there and at one that refuses."""
    config = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
    config["timeouts"] = {"queue_s": QUEUE_S}
    (smollm,) = (model for model in config["models"] if model["name"] == SMOLLM)
    smollm["aliases"] = [ALIAS]
    smollm["tool_parser"] = "hermes"
    config["models"].append({"name": UPSTREAM, "upstream": {"base_url": "http://127.0.0.1:9/v1"}})
    with refusing() as url:
        config["models"].append(
            {"name": REFUSING, "upstream": {"base_url": url}, "timeouts": {"first_token_s": 1.0}}
        )
        with serving(config, tmp_path_factory.mktemp("smollm")) as server:
            yield server
