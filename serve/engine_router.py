"""Ray Serve's router of the engine deployment: it lives in the gateway and sends each call to a replica.

A call that names its replica goes there (`engine_calls.py`). Requests go where `replica_choice.py` says, from what the
replicas report: `EngineReplica.record_routing_stats`, once a second, and the queue lengths that Serve knows.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.openai_api import Ask
from serve.replica_choice import Candidate, conversation_of, ranked
from serve.routing import Target

STATS_EVERY_S = 1.0


class EngineRouter(RequestRouter):  # type: ignore[misc]
    """Serve asks it again, with growing pauses, while all replicas that it names are full."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # Serve does not pause between tries without it
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        pinned, ask, target = _about(pending_request)
        if pinned is not None:  # one that is gone cannot be had: any other says so
            return [[by_name[pinned]] if pinned in by_name else candidate_replicas]
        if ask is None or target is None:
            return [candidate_replicas]
        candidates = [self._candidate(name, replica) for name, replica in by_name.items()]
        digest = None if target.is_base else target.digest
        return [[by_name[name]] for name in ranked(candidates, digest, conversation_of(ask))]

    def _candidate(self, name: str, replica: RunningReplica) -> Candidate:
        stats = replica.routing_stats  # empty until the first report
        num_requests = self.replica_queue_len_cache.get(replica.replica_id) or 0
        resident = frozenset(stats.get("resident", ()))
        return Candidate(name, num_requests, stats.get("slots", 1), resident, stats.get("taken", 0.0))


def _about(pending: PendingRequest) -> tuple[str | None, Ask | None, Target | None]:
    """The replica that a call of EngineReplica names, and what it asks of whom."""
    given = [*pending.args, *pending.kwargs.values()]
    if pending.metadata.call_method == "stream":
        return given[1], None, None
    if pending.metadata.call_method == "generate":
        _, _, ask, target, _, replica = given
        return replica, ask, target
    return None, None, None
