from __future__ import annotations

import re

from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server


def test_an_idle_router_stays_under_200_mb(server: Server, report: Report) -> None:
    """A router that has started and has nothing to do holds less than 200 MB."""
    (router,) = server.routers().values()
    resident = router.memory_info().rss
    report("idle router, resident", f"{resident / 1e6:.0f} MB (promised: under 200)")
    assert resident < 200e6


def test_the_router_is_ready_soon_after_ray(server: Server, report: Report) -> None:
    """Once Ray is up the router serves within seconds, whatever the models still have to load."""
    ray_up, ready = (stamp(server, text) for text in ("starting the deployments", "router ready"))
    report("router ready after Ray was up", f"{ready - ray_up:.1f} s (promised: about 5)")
    assert ready - ray_up < 25
    assert stamp(server, "model smollm2-135m-instruct ready") > ready


def test_the_start_tells_where_everything_is(server: Server) -> None:
    """The start says what it does and ends with where the logs are and a curl line for the first model."""
    for step in ("the model is in /", "starting Ray", "model echo ready", "(3/3)"):
        assert step in server.said
    assert f"logs are in {server.log_dir}" in server.said
    assert f"curl {server.url}/v1/chat/completions" in server.said
    assert '"model": "smollm2-135m-instruct"' in server.said


def stamp(server: Server, text: str) -> float:
    """The seconds that stand before a line that the start has written."""
    found = re.search(rf"^ *([0-9.]+) s  {re.escape(text)}", server.said, re.MULTILINE)
    assert found, server.said
    return float(found[1])
