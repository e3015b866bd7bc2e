"""What a run asks of the cluster, and what the cluster has: pure decisions on Ray's own tables, and waiting with a message.

A run that can never be placed must say so: Ray itself would wait for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service import launcher
from service.config import ScaleBlock
from service.errors import ClusterError

GROW_AFTER_LOOKS = 3  # in a row that found room; 5 s lie between two, see attempts.py
GROW_AFTER_LOOKS_AT_MOST = 512  # 43 minutes: a run of days notices that the other one has ended
TELL_EVERY_S = 30.0
LOOK_EVERY_S = 1.0

Resources = dict[str, float]


@dataclass(frozen=True)
class Cluster:
    """The resources of each node that stays, and what is free on each, in the same order."""

    nodes: tuple[Resources, ...]
    free: tuple[Resources, ...]

    @classmethod
    def current(cls) -> Cluster:
        """As Ray sees it now."""
        import ray
        from ray._private.state import available_resources_per_node  # a DeveloperAPI; the public one gives only sums

        free, going = available_resources_per_node(), nodes_going_away()
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
        return cls(
            tuple(dict(node["Resources"]) for node in alive), tuple(dict(free.get(n["NodeID"], {})) for n in alive)
        )

    def total(self, kind: str) -> float:
        """Of one kind of resource, on all nodes."""
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def total_free(self, kind: str) -> float:
        """The same of what nobody has."""
        return sum(node.get(kind, 0.0) for node in self.free)


def share_of(cluster: Cluster, scale: ScaleBlock, runs: int = 1) -> Resources:
    """What one worker asks for: a GPU where the cluster has any, else an equal share of the CPUs, of the free ones if need be.

    `runs` of this scale are to fit at once. No share is larger than the smallest node's, or it could never be placed there.
    """
    if cluster.total("GPU"):
        return {"CPU": 1, "GPU": 1}
    smallest = min((int(node["CPU"]) for node in cluster.nodes if node.get("CPU")), default=1)
    for cpus in (cluster.total("CPU"), runs * cluster.total_free("CPU")):
        share: Resources = {"CPU": max(1, min(int(cpus // (runs * scale.max_workers)), smallest))}
        if room_for(cluster, share) >= scale.min_workers:
            break
    return share


def runs_that_fit(cluster: Cluster, scale: ScaleBlock) -> int:
    """How many runs of this scale the empty cluster can hold at once, on a GPU or a CPU a worker at least."""
    least: Resources = {"CPU": 1, "GPU": 1} if cluster.total("GPU") else {"CPU": 1}
    return room_for(Cluster(cluster.nodes, cluster.nodes), least) // scale.max_workers


def room_for(cluster: Cluster, share: Resources) -> int:
    """How many more workers could be placed, each whole on what one node has free."""
    return sum(min(int(node.get(kind, 0.0) // amount) for kind, amount in share.items()) for node in cluster.free)


@dataclass(frozen=True)
class Growth:
    """When an elastic run may stop to go on with more workers.

    Not as soon as there is room: a run that stops gives its own workers' places back, and two runs that see the same free
    place would stop each other for it again and again. So the room must have been there in `needed` looks in a row, and
    after an attempt to grow that brought no more workers, because another run was first, twice as many are needed.
    """

    needed: int = GROW_AFTER_LOOKS
    seen: int = 0  # in a row

    @property
    def due(self) -> bool:
        """Whether to stop for it now."""
        return self.seen >= self.needed

    def looked(self, room: int) -> Growth:
        """After a look that found room for so many more workers."""
        return Growth(self.needed, self.seen + 1 if room > 0 else 0)

    def tried(self, before: int, after: int) -> Growth:
        """After an attempt to grow, from so many workers to so many."""
        return Growth() if after > before else Growth(min(2 * self.needed, GROW_AFTER_LOOKS_AT_MOST))


def await_workers(
    scale: ScaleBlock,
    say: Callable[[str], None],
    stop: Callable[[], bool],
    runs: int = 1,
    standing: Callable[[], tuple[int, Resources] | None] = lambda: None,
) -> tuple[int, Resources] | None:
    """The number of workers to start now and what each gets; None once `stop`. Waits `scale.wait_s` at most; an autoscaler is
    asked. Workers that are `standing` by, which may come while this waits, are taken first.

    Raises ClusterError when the time is over, or at once where nothing can come: a Ray that this process has started.
    """
    started = time.monotonic()
    told = -TELL_EVERY_S
    asked = False
    try:
        while True:
            if found := standing():
                return found
            cluster = Cluster.current()
            share = share_of(cluster, scale, runs)
            room = room_for(cluster, share)
            if room >= scale.min_workers:
                return min(room, scale.max_workers), share
            waited = time.monotonic() - started
            missing = _missing(cluster, share, scale.min_workers, room)
            if waited >= scale.wait_s or (launcher.started_here() and _never(cluster, share, scale.min_workers)):
                raise ClusterError(f"{missing} Lower scale.workers, add nodes, or raise scale.wait_s.")
            if stop():
                return None
            if waited - told >= TELL_EVERY_S:
                say(f"{missing} Waiting, {scale.wait_s - waited:.0f} s more at most (--no-wait fails at once).")
                told = waited
            if not asked:
                _ask_autoscaler([share] * scale.max_workers)
                asked = True
            time.sleep(LOOK_EVERY_S)
    finally:
        if asked:
            _ask_autoscaler([])


def _missing(cluster: Cluster, share: Resources, workers: int, room: int) -> str:
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in share.items())
    have = ", ".join(f"{cluster.total_free(kind):g} of {cluster.total(kind):g} {kind} free" for kind in share)
    return f"{workers} worker(s) with {wanted} each are wanted, {room} can be placed: the cluster has {have}."


def _never(cluster: Cluster, share: Resources, workers: int) -> bool:
    """Whether even an empty cluster of these nodes could not hold the workers."""
    return room_for(Cluster(cluster.nodes, cluster.nodes), share) < workers


def _ask_autoscaler(bundles: Sequence[Resources]) -> None:
    """Tell an autoscaler, where there is one, what is waited for; an empty list takes it back."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles])


def nodes_going_away() -> set[str]:
    """Ids of nodes that Ray was told will be taken away soon (a preemption notice)."""
    from ray._private.state import state  # where Ray Train's own watcher asks; the public call is a barrier

    return set(state.get_draining_nodes())


def place_of(host: str, node_id: str) -> str:
    """What a worker says of where it is."""
    return f"{host}, Ray node {node_id[:8]}"


def is_at(place: str, node_id: str) -> bool:
    """Whether a worker that has said `place` is on this node."""
    return place.endswith(f"Ray node {node_id[:8]}")
