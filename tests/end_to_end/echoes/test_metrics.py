from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import httpx

from tests.end_to_end.client import ask_all, chat
from tests.end_to_end.echoes import ECHO, LONE, PAIR
from tests.end_to_end.server import Metrics, Server, http

MODELS = (ECHO, PAIR, LONE)

CONNECTIONS = 200
"""As many are tried until each router has taken one; the kernel deals them out at random."""


async def test_every_router_tells_the_same(server: Server) -> None:
    """Whichever router answers a scrape, it has the samples of all: both routers' and every replica's, each
    labelled with the process that it comes from; ?scope=process has the one router's alone."""
    await ask_all(server, [chat(model, "a b", max_tokens=2) for model in MODELS * 20])
    with connections(server) as routers:
        own = {name: Metrics(client.get("/metrics?scope=process").text) for name, client in routers.items()}
        whole = {name: Metrics(client.get("/metrics").text) for name, client in routers.items()}
    processes = {*server.routers(), *(name for model in MODELS for name in server.replicas(model))}
    assert len(processes) == 6
    first, second = whole.values()
    assert first.samples.keys() == second.samples.keys()
    for metrics in whole.values():
        assert set(metrics.by("replica", "process_cpu_seconds_total")) == processes
        assert metrics.total("trunkline_requests_total") == first.total("trunkline_requests_total")
    for name, metrics in own.items():
        assert set(metrics.by("replica", "process_cpu_seconds_total")) == {name}
        assert metrics.samples.keys() == {
            series for series in first.samples if ("replica", name) in series[1]
        }


async def test_counters_never_go_back(server: Server) -> None:
    """Over many scrapes of both routers, with requests in between, no counter falls and none disappears."""
    scrapes = []
    with connections(server) as routers:
        for _ in range(5):
            await ask_all(server, [chat(model, "a b c", stream=True) for model in (ECHO, LONE) * 5])
            scrapes += [Metrics(client.get("/metrics").text) for client in routers.values()]
    for earlier, later in pairwise(scrapes):
        fallen = {
            series: (value, later.samples.get(series))
            for series, value in earlier.samples.items()
            if series[0] in earlier.counters and later.samples.get(series, -1) < value
        }
        assert not fallen
    assert scrapes[-1].total("trunkline_generation_tokens_total") > scrapes[0].total(
        "trunkline_generation_tokens_total"
    )


def test_health_is_told_as_serve_would(server: Server) -> None:
    """The probes that are made for Ray Serve's own proxy find what they look for, and /health each model."""
    with http(server) as client:
        assert client.get("/-/healthz").text == "success"
        assert client.get("/-/routes").json() == {"/": "router"}
        assert client.get("/health").json() == {
            "status": "ok",
            "models": {ECHO: "ready", PAIR: "ready", LONE: "ready"},
        }


@contextmanager
def connections(server: Server) -> Iterator[dict[str, httpx.Client]]:
    """A kept connection to each router, by the router's id."""
    found: dict[str, httpx.Client] = {}
    with ExitStack() as opened:
        for _ in range(CONNECTIONS):
            client = opened.enter_context(http(server))
            metrics = Metrics(client.get("/metrics?scope=process").text)
            (router,) = metrics.by("replica", "process_cpu_seconds_total")
            found.setdefault(router, client)
            if len(found) == len(server.routers()):
                break
        assert found.keys() == server.routers().keys()
        yield found
