"""The request router that Serve gives each handle of a model's deployment.

It stands in a module of its own because Serve copies this module, by value, into every process that holds a
handle: module state kept here would be a copy too. What is imported from elsewhere stays shared.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from router.discovery import announce


class AnnouncedReplicas(RequestRouter):
    """Announces a deployment's replicas to this process at every change; routes control calls only."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        announce(
            self.app_name, {replica.replica_id.unique_id: replica.replica_metadata for replica in replicas}
        )

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]
