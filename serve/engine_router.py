"""Ray Serve's router of the engine deployment: it lives in the gateway and sends each call to a replica.

A stream goes to the replica that it names, a request that has found one tries it first, and one that was lost with its last
(`engine_calls.py`). Others go
where `replica_choice.py` says, from what the replicas report (`EngineReplica.record_routing_stats`, once a second) and
the queue lengths that Serve knows.
"""

from __future__ import annotations

from collections import Counter

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.replica_choice import Candidate, conversation_of, ranked

STATS_EVERY_S = 1.0


class EngineRouter(RequestRouter):  # type: ignore[misc]
    """Serve asks it again, with growing pauses, while all replicas that it names are full."""

    def initialize_state(self) -> None:
        """Called by Serve after construction."""
        self._sent: Counter[ReplicaID] = Counter()  # calls from here that have not ended

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for each call that is sent."""
        self._sent[replica_id] += 1
        super().on_send_request(replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve for each call that has ended, or was rejected."""
        if self._sent[replica_id] > 1:
            self._sent[replica_id] -= 1
        else:
            del self._sent[replica_id]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # Serve does not pause between tries without it
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        args = pending_request.args
        if pending_request.metadata.call_method == "stream":  # a replica that is gone: any other says so
            return [[by_name[args[1]]] if args[1] in by_name else candidate_replicas]
        if pending_request.metadata.call_method != "generate" or len(by_name) == 1:
            return [candidate_replicas]
        ask, target, wanted, lost = args[2], args[3], args[5], args[6]
        candidates = [self._candidate(name, replica) for name, replica in by_name.items()]
        names = ranked(candidates, None if target.is_base else target.digest, conversation_of(ask))
        return [[by_name[name]] for name in sorted(names, key=lambda name: (name in lost, name != wanted))]

    def _candidate(self, name: str, replica: RunningReplica) -> Candidate:
        stats = replica.routing_stats  # empty until the first report
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0  # of all gateways, for some seconds
        num_requests = max(known, self._sent.get(replica.replica_id, 0))
        resident = frozenset(stats.get("resident", ()))
        return Candidate(name, num_requests, stats.get("slots", 1), resident, stats.get("taken", 0.0))
