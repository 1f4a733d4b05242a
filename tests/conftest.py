from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import hypothesis
import pytest
import uvloop

pytest_plugins = ["tests.redis_server", "tests.stores"]

# How long an example takes says nothing on a busy machine, and a run of CI finds what the one before found.
hypothesis.settings.register_profile(
    "trunkline",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,  # a deployment serves all examples of its test
    ],
)
hypothesis.settings.load_profile("trunkline")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test runs on the event loop that Ray Serve gives replicas and routers."""
    return {"uvloop": uvloop.new_event_loop}
