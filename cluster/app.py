"""The composition root: what a configuration becomes on Ray.

One Serve application for each model, so that one can change without the others, and one for the routers.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from cluster import environment
from cluster.config import Config, ModelConfig
from cluster.placement import CONTROL_CALLS, Placement, PlacementError, place
from router.deployment import RouterServer
from serving import orphans
from serving.deployment import DEPLOYMENT, ModelServer, ReplicaSettings

ROUTER = "router"
"""The Serve application and deployment that hold the routers."""

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Next to nothing goes through Ray's object store: no token, no weight."""

ANNOUNCED_REPLICAS = "router.announced.AnnouncedReplicas"
"""What Serve hands the list of a model's replicas to, in every router."""

ROUTER_DRAIN_S = 60.0
"""Seconds that a router's answers may take to end when it is stopped."""

STATUS_S = 0.25
"""Seconds between two looks at Serve while it starts."""

Progress = Callable[[str], None]


class StartFailed(Exception):
    """The deployment could not be started, and why, in words for the person who tried."""


def check_port(host: str, port: int) -> None:
    """Raises StartFailed if something listens there already.

    A plain bind, before any router's: with SO_REUSEPORT a second server would silently share the port.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise StartFailed(f"listen: cannot listen on {host}:{port}: {error.strerror}") from None


@contextmanager
def ray_cluster(address: str, progress: Progress) -> Iterator[None]:
    """A connection to the Ray cluster at `address`; `local` starts one, and ends it afterwards.

    The process's environment must have been prepared, before this module was imported.
    """
    progress("starting Ray" if address == "local" else f"connecting to Ray at {address}")
    own: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    ray.init(
        address=address,
        namespace="trunkline",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(own if address == "local" else {}),
    )
    try:
        yield
    finally:
        ray.shutdown()
        orphans.end_orphans()


@contextmanager
def deployed(config: Config, log_dir: Path | None, progress: Progress) -> Iterator[None]:
    """The configuration's deployments, running and ready in the block, gone after it. Needs `ray_cluster`."""
    progress("starting the deployments")
    # Serve tells the terminal of every step; what matters of it is told here.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    secret = environment.trunk_secret()
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=LoggingConfig(log_level="WARNING"))
    try:
        deploy_models(config, secret, log_dir)
        deploy_routers(config, secret, log_dir)
        wait_ready(config, progress)
        yield
    finally:
        progress("stopping: running answers may end")
        delete(config)


def deploy_models(config: Config, secret: bytes, log_dir: Path | None) -> None:
    """One application for each model; returns at once. Raises StartFailed where there is no room."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    gpus_by_node = [int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]
    try:
        placements = place(config.models, gpus_by_node)
    except PlacementError as error:
        raise StartFailed(str(error)) from None
    local = config.ray.address == "local"
    targets = [
        _model_target(model, placement, config, secret, log_dir, loopback=local)
        for model, placement in zip(config.models, placements, strict=True)
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)


def _model_target(
    model: ModelConfig,
    placement: Placement,
    config: Config,
    secret: bytes,
    log_dir: Path | None,
    *,
    loopback: bool,
) -> RunTarget:
    settings = ReplicaSettings(
        model=model.name,
        engine=model.engine_settings.model_copy(update={"engine_args": placement.engine_args}),
        trunk=config.trunk,
        loopback=loopback,
        drain_s=model.drain_s,
        log_dir=log_dir,
    )
    deployment = serve.deployment(
        name=DEPLOYMENT,
        request_router_config={"request_router_class": ANNOUNCED_REPLICAS},
        **placement.options,
    )
    return RunTarget(
        deployment(ModelServer).bind(settings, secret), name=model.application, route_prefix=None
    )


def deploy_routers(config: Config, secret: bytes, log_dir: Path | None) -> None:
    """The routers' application; returns at once. The models' applications must exist."""
    deployment = serve.deployment(
        name=ROUTER,
        num_replicas=config.routers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=CONTROL_CALLS,
        health_check_period_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=ROUTER_DRAIN_S,
    )
    target = RunTarget(
        deployment(RouterServer).bind(config.router_settings, secret, log_dir), name=ROUTER, route_prefix=None
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)


def wait_ready(config: Config, progress: Progress) -> None:
    """Return when the routers and every model run. Raises StartFailed when one of them cannot."""
    began = time.monotonic()
    names = {model.application: f"model {model.name}" for model in config.models} | {ROUTER: "router"}
    waiting = set(names)
    while waiting:
        applications = serve.status().applications
        for application in sorted(waiting):
            overview = applications[application]
            if overview.status == ApplicationStatus.RUNNING:
                waiting.discard(application)
                ready = len(names) - len(waiting)
                progress(
                    f"{names[application]} ready, {time.monotonic() - began:.0f} s ({ready}/{len(names)})"
                )
            elif overview.status == ApplicationStatus.DEPLOY_FAILED:
                raise StartFailed(f"{names[application]} could not be started:\n{_why(overview)}")
        time.sleep(STATUS_S)


def delete(config: Config) -> None:
    """Take the routers down, then the models, each once its streams have ended or its time is up."""
    serve.delete(ROUTER)
    with ThreadPoolExecutor() as pool:
        list(pool.map(serve.delete, [model.application for model in config.models]))


def _why(overview: ApplicationStatusOverview) -> str:
    """What Serve says of an application that failed: its deployments' words, or its own."""
    messages = [deployment.message for deployment in overview.deployments.values() if deployment.message]
    return "\n".join(messages) or overview.message
