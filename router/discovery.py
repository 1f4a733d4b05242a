"""How a router learns which replicas there are: Serve pushes every change to whoever holds a handle.

A replica's address travels in the metadata that it records once it is ready. Serve hands the list to the
request router of the deployment's handle (router/announced.py), which passes it on to here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from router.replicas import Address
from serving.deployment import DEPLOYMENT, TRUNK

Listener = Callable[[Mapping[str, Address]], None]

_listeners: dict[str, Listener] = {}


def watch(application: str, listener: Listener) -> DeploymentHandle[Any]:
    """Call `listener` on this event loop with a model's replicas, now and at every change.

    Returns the deployment's handle, which has to be kept for as long as the changes are wanted. The
    application must exist.
    """
    loop = asyncio.get_running_loop()

    def hear(replicas: Mapping[str, Address]) -> None:
        # Serve calls from a loop of its own.
        loop.call_soon_threadsafe(listener, replicas)

    _listeners[application] = hear
    # Serve begins to tell a handle of replicas when its options are first given.
    return serve.get_deployment_handle(DEPLOYMENT, application).options(method_name="metrics")


def announce(application: str, metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """These are the replicas of an application, by id, with what each has recorded of itself."""
    if listener := _listeners.get(application):
        listener({replica: tuple(record[TRUNK]) for replica, record in metadata.items() if TRUNK in record})
