"""The composition root: what a configuration becomes on Ray.

One Serve application for each model that runs here, so that one can change without the others, and one for
the routers.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from cluster import environment
from cluster.config import Config, ModelConfig
from cluster.placement import CLOSE_S, CONTROL_CALLS, Placement, PlacementError, place
from router.deployment import RouterServer, bound_socket
from router.settings import Listen
from serving import orphans
from serving.deployment import DEPLOYMENT, ModelServer, ReplicaSettings

ROUTER = "router"
"""The Serve application and deployment that hold the routers."""

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Next to nothing goes through Ray's object store: no token, no weight."""

ANNOUNCED_REPLICAS = "router.announced.AnnouncedReplicas"
"""What Serve hands the list of a model's replicas to, in every router."""

STATUS_S = 0.25
"""Seconds between two looks at Serve while it starts."""

Progress = Callable[[str], None]


class StartFailed(Exception):
    """The deployment could not be started, and why, in words for the person who tried."""


def check_port(listen: Listen) -> None:
    """Raises StartFailed if something listens there already, or nothing can.

    A plain bind, before any router's: with SO_REUSEPORT a second server would silently share the port.
    """
    try:
        bound_socket(listen, socket.SO_REUSEADDR).close()
    except OSError as error:
        raise StartFailed(f"listen: cannot listen on {listen.host}:{listen.port}: {error.strerror}") from None


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
    try:
        ray.init(
            address=address,
            namespace="trunkline",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
        )
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise StartFailed(f"ray.address: no Ray at {address}: {error}") from None
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
    refuse_second(config)
    try:
        targets = [*model_targets(config, secret, log_dir), router_target(config, secret, log_dir)]
        check_port(config.listen)  # again: getting here may have taken minutes
        # All at once: a router needs no model to start, and finds those that become ready.
        serve.run_many(
            targets, wait_for_ingress_deployment_creation=True, wait_for_applications_running=False
        )
        wait_ready(config, progress)
        yield
    finally:
        progress("stopping: running answers may end")
        delete(config)


def refuse_second(config: Config) -> None:
    """Raises StartFailed where this Ray cluster has a deployment of ours already: it would be replaced."""
    taken = serve.status().applications.keys() & {ROUTER, *(model.application for model in config.hosted)}
    if taken:
        raise StartFailed(
            f"ray.address: this Ray cluster runs Trunkline already (applications {', '.join(sorted(taken))});"
            " end that first, or remove it with `serve shutdown`"
        )


def model_targets(config: Config, secret: bytes, log_dir: Path | None) -> list[RunTarget]:
    """One application for each model that runs here. Raises StartFailed where there is no room."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    try:
        placements = place(
            config.hosted,
            [int(node.get("GPU", 0)) for node in resources],
            [float(node.get("CPU", 0)) for node in resources],
        )
    except PlacementError as error:
        raise StartFailed(str(error)) from None
    local = config.ray.address == "local"
    return [
        _model_target(model, placement, config, secret, log_dir, loopback=local)
        for model, placement in zip(config.hosted, placements, strict=True)
    ]


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


def router_target(config: Config, secret: bytes, log_dir: Path | None) -> RunTarget:
    """The routers' application."""
    deployment = serve.deployment(
        name=ROUTER,
        num_replicas=config.routers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=CONTROL_CALLS,
        health_check_period_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.drain_s + CLOSE_S,
    )
    return RunTarget(
        deployment(RouterServer).bind(config.router_settings, secret, log_dir), name=ROUTER, route_prefix=None
    )


def wait_ready(config: Config, progress: Progress) -> None:
    """Return when the routers and every model here run. Raises StartFailed when one of them cannot."""
    began = time.monotonic()
    names = {model.application: f"model {model.name}" for model in config.hosted} | {ROUTER: "router"}
    waiting = dict.fromkeys(names, "")
    while waiting:
        applications = serve.status().applications
        for application, said in list(waiting.items()):
            overview = applications[application]
            if overview.status == ApplicationStatus.RUNNING:
                del waiting[application]
                ready = len(names) - len(waiting)
                progress(
                    f"{names[application]} ready, {time.monotonic() - began:.0f} s ({ready}/{len(names)})"
                )
            elif overview.status == ApplicationStatus.DEPLOY_FAILED:
                reason = _in_a_line(_why(overview))
                raise StartFailed(f"{names[application]} could not be started: {reason}")
            elif (news := _in_a_line(_why(overview))) != said:
                waiting[application] = news
                progress(f"{names[application]}: {news}")
        time.sleep(STATUS_S)


def delete(config: Config) -> None:
    """Take the routers down, whose running answers may end, then the models."""
    timeout_s = config.drain_s + CLOSE_S
    _delete([ROUTER], timeout_s)
    _delete([model.application for model in config.hosted], timeout_s)


def _delete(applications: Sequence[str], timeout_s: float) -> None:
    # Serve's own waiting ends after a minute, whatever the deployments' time to drain.
    for application in applications:
        serve.delete(application, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while serve.status().applications.keys() & set(applications) and time.monotonic() < deadline:
        time.sleep(STATUS_S)


def _why(overview: ApplicationStatusOverview) -> str:
    """What Serve says of an application that failed: its deployments' words, or its own."""
    messages = [deployment.message for deployment in overview.deployments.values() if deployment.message]
    return "\n".join(messages) or overview.message


def _in_a_line(message: str) -> str:
    """A message's first line, or of a traceback the last, which names the error."""
    lines = message.strip().splitlines() or [""]
    return lines[-1] if "Traceback" in message else lines[0]
