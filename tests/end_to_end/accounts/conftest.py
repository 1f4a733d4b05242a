from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.end_to_end.accounts import (
    ADMIN_KEY,
    ADMIN_PASSWORD,
    CLOSED,
    ECHO,
    FAR,
    FAR_PACED,
    PACED,
    PRICES,
    SHARED,
    SHARED_PER_MINUTE,
)
from tests.end_to_end.accounts.office import Office
from tests.end_to_end.server import Server, free_port, serving
from tests.redis_server import RedisServer, running_redis
from tests.stores import PostgresCluster, postgres_cluster

PROVIDER_KEY = "TEST_PROVIDER_KEY"

ENVIRONMENT = {
    "TRUNKLINE_ADMIN_KEY": ADMIN_KEY,
    "TRUNKLINE_ADMIN_PASSWORD": ADMIN_PASSWORD,
    PROVIDER_KEY: ADMIN_KEY,
}


@pytest.fixture(scope="package")
def postgres_server() -> Iterator[PostgresCluster]:
    """A PostgreSQL that tests of this folder may stop."""
    with postgres_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def redis_server() -> Iterator[RedisServer]:
    """A Redis that nobody else empties."""
    with running_redis() as server:
        yield server


@pytest.fixture(scope="package")
def store(postgres_server: PostgresCluster) -> str:
    """The URL of the server's store."""
    return postgres_server.url(postgres_server.create_database())


@pytest.fixture(scope="package")
def server(
    store: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two routers, models that repeat, and models of a provider: which is this server itself."""
    port = free_port()
    config = two_routers(store, redis_server.url, "refuse", port)
    with serving(config, tmp_path_factory.mktemp("accounts"), ENVIRONMENT, port) as server:
        yield server


@pytest.fixture(scope="package")
def office(server: Server) -> Office:
    """The first admin."""
    return Office(server)


def two_routers(store: str, redis: str, when_store_is_down: str, port: int) -> Mapping[str, Any]:
    """A configuration of two routers that count together. At `port` is the provider of the models that are
    not its own."""
    place = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key_env": PROVIDER_KEY}
    return {
        "routers": 2,
        "accounts": {"store": store, "redis": redis, "when_store_is_down": when_store_is_down},
        "models": [
            {"name": ECHO, "engine": "echo", "price": prices(ECHO)},
            paced(100),
            {"name": FAR, "upstream": place | {"model": ECHO}, "price": prices(FAR)},
            {"name": FAR_PACED, "upstream": place | {"model": PACED}, "price": prices(FAR_PACED)},
            {"name": CLOSED, "upstream": place | {"model": ECHO}, "price": prices(CLOSED)},
            {
                "name": SHARED,
                "upstream": place | {"model": ECHO},
                "price": prices(SHARED),
                "shared_limits": {"requests_per_minute": SHARED_PER_MINUTE},
            },
        ],
    }


def paced(tokens_per_second: float) -> dict[str, Any]:
    """A model that takes its time."""
    arguments = {"tokens_per_second": tokens_per_second, "time_to_first_token_s": 0.1}
    return {"name": PACED, "engine": "echo", "engine_args": arguments, "price": prices(PACED)}


def prices(model: str) -> dict[str, float]:
    """A model's prices as a configuration has them: in dollars for a million tokens."""
    prompt, completion = PRICES[model]
    return {"prompt": prompt / 1000, "completion": completion / 1000}
