"""What a worker pod does before it goes: tells Ray that its node will be taken away, and waits until nobody works on it.

    python -m jobs.leave --within 120

A preStop hook: the kubelet sends SIGTERM when this has ended. Runs save a checkpoint and go on without the node, Ray Serve
starts replicas elsewhere and lets streams end. Exits with 0 once the node is idle or the time is over, with 1 where Ray cannot
be reached any more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from service import launcher
from service.errors import ClusterError

LOOK_EVERY_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line above, for the node that this process is on; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.leave", description="Leave a Ray cluster in order.")
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS", help="before the pod is killed")
    given = parser.parse_args(arguments)
    try:
        if launcher.started_here():
            raise ClusterError("RAY_ADDRESS is not set, so this is no node of a cluster. The operator sets it in pods.")
        launcher.connect()
        left = leave(_this_node(), given.within)
    except ClusterError as error:
        print(f"ClusterError: {error}", file=sys.stderr)
        return 1
    print("The node is idle." if left else f"The node still has work after {given.within:g} s.")
    return 0


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def leave(node_id: str, within_s: float) -> bool:
    """Announce that a node of the connected cluster goes in `within_s` seconds; whether its actors have ended by then.

    Raises ClusterError where the head does not take it.
    """
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.exceptions import RpcError

    deadline = time.time() + within_s
    gcs = launcher.gcs_client()
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        accepted, why_not = gcs.drain_node(node_id, reason, "its pod is being stopped", int(deadline * 1000))
    except RpcError as error:
        raise ClusterError(f"the head does not answer that node {node_id} may go: {error}") from error
    if not accepted:
        raise ClusterError(f"Ray does not let node {node_id} go: {why_not}")
    while num_actors(node_id) and time.time() < deadline:
        time.sleep(LOOK_EVERY_S)
    return not num_actors(node_id)


def num_actors(node_id: str) -> int:
    """Actors that live on a node: workers of runs, replicas, proxies."""
    from ray._private.state import actors  # the public list goes through the dashboard, which may be unreachable by now

    return sum(1 for actor in actors(actor_state_name="ALIVE").values() if actor["Address"]["NodeID"] == node_id)


if __name__ == "__main__":
    sys.exit(main())
