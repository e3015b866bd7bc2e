"""How a job ends: with its reason printed and an exit code and, in a RayJob's pod, not before the operator looks at it."""

from __future__ import annotations

import os
import time

from rich.console import Console

from service import launcher
from service.errors import ClusterError, LorayError

GIVEN_UP = 130  # what shells say of Ctrl-C
OPERATORS = "RAY_USAGE_STATS_KUBERAY_IN_USE"  # the operator sets it in the pods that it makes
READY_S = 60.0  # from a node's start until its pod's probes have said so, with room
LOOK_EVERY_S = 2.0
MOST_S = 3600.0


def exit_code(error: LorayError | KeyboardInterrupt, console: Console) -> int:
    """Print why; 2 where the input was wrong, 130 after a second Ctrl-C (who heard the first has said how to go on), else 1."""
    if isinstance(error, KeyboardInterrupt):
        return GIVEN_UP
    line = "\n".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"])
    console.print(line, markup=False, highlight=False, soft_wrap=True, style="red")
    return 2 if isinstance(error, ValueError | LookupError) else 1


def stay_until_seen(console: Console) -> None:
    """In a RayJob's pod, wait until the cluster's worker pods have become ready, MOST_S at most; elsewhere nothing.

    Ray starts the driver as soon as the head is there, but the operator looks at it only once all pods were ready together. A
    driver that ends sooner takes the head's readiness along: however it ended, the job would stand in Initializing until
    preRunningDeadlineSeconds are over, and then have failed.
    """
    if not os.environ.get(OPERATORS):
        return
    deadline, told = time.monotonic() + MOST_S, False
    try:
        launcher.connect()
        while not _ready() and time.monotonic() < deadline:
            if not told:
                console.print(
                    "Waiting for the worker pods: before they are there the operator sees no end.", highlight=False
                )
                told = True
            time.sleep(LOOK_EVERY_S)
    except ClusterError as error:
        console.print(f"The operator may not see this end: {error}", markup=False, highlight=False, soft_wrap=True)


def _ready() -> bool:
    """Whether there are nodes for work, and all of them old enough."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made in Cython
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = GcsClient(address=ray.get_runtime_context().gcs_address).get_all_node_info().values()
    begun = [node.start_time_ms / 1000 for node in nodes if not node.is_head_node and node.state == GcsNodeInfo.ALIVE]
    return bool(begun) and max(begun) < time.time() - READY_S
