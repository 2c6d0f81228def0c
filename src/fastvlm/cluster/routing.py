"""Ray Serve's router for requests that prefer a replica.

Ray Serve pickles this module by value: what others compare with or look at is in another one.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from fastvlm.cluster.affinity import Route, RunningReplicas, ranked


class AffinityRouter(RequestRouter):
    """Sends each request to the replica that its key prefers, or to the next that has room."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas run."""
        super().update_replicas(replicas)
        RunningReplicas.names = tuple(name_of(replica) for replica in replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order of preference, each a rank of its own."""
        arguments: list[Any] = [] if pending_request is None else pending_request.args
        route = arguments[0] if arguments and isinstance(arguments[0], Route) else Route()
        by_name = {name_of(replica): replica for replica in candidate_replicas}
        if route.replica:
            return [[by_name[route.replica]]] if route.replica in by_name else []
        if not route.key:
            shuffled = random.sample(candidate_replicas, len(candidate_replicas))
            return [shuffled[:2], *([one] for one in shuffled[2:])]
        return [[by_name[name]] for name in ranked(route.key, by_name)]


def name_of(replica: RunningReplica) -> str:
    """Return a replica's name, which no other has before or after it."""
    return str(replica.replica_id.unique_id)
