"""How a job ends: with its reason printed and an exit code and, in a RayJob's pod, not before the operator looks at it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from service import launcher
from service.errors import ClusterError, LorayError
from service.versions import skew

GIVEN_UP = 130  # what shells say of Ctrl-C
WORKER_PODS = "LORAY_WORKER_PODS"  # in the head of a RayJob: as many as the operator waits for
READY_S = 60.0  # from a node's start until its pod's probes have said so, with room
LOOK_EVERY_S = 2.0


def ended(work: Callable[[Console], None], *, rayjob: bool) -> int:
    """Do a job's work and print of it; the exit code. A failure's reason is printed last, unless an attempt of a RayJob waits."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if differing := skew():
        console.print(differing, highlight=False, soft_wrap=True, style="yellow")
    try:
        work(console)
        code = 0
    except (LorayError, KeyboardInterrupt) as error:
        code = exit_code(error, console)
    if rayjob and code != GIVEN_UP:
        stay_until_seen(console)
    return code


def exit_code(error: LorayError | KeyboardInterrupt, console: Console) -> int:
    """Print why; 2 where the input was wrong, 130 after a second Ctrl-C (who heard the first has said how to go on), else 1."""
    if isinstance(error, KeyboardInterrupt):
        return GIVEN_UP
    line = "\n".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"])
    console.print(line, markup=False, highlight=False, soft_wrap=True, style="red")
    return 2 if isinstance(error, ValueError | LookupError) else 1


def stay_until_seen(console: Console) -> None:
    """In a RayJob's pod, wait until all worker pods that were wanted at first have been ready; elsewhere nothing.

    Ray starts the driver as soon as the head is there, but the operator looks at it only once all pods were ready together. A
    driver that ends sooner takes the head's readiness along: however it ended, the job would stand in Initializing until
    preRunningDeadlineSeconds are over, when the operator ends this wait too.
    """
    if not (wanted := int(os.environ.get(WORKER_PODS, "0"))):
        return
    told = False
    try:
        for starts in _starts():
            if ready(starts, wanted, time.time()):
                return
            if not told:
                console.print(
                    "Waiting for the worker pods: before they are there the operator sees no end.", highlight=False
                )
                told = True
            time.sleep(LOOK_EVERY_S)
    except ClusterError as error:  # which must not change how the job ends
        console.print(f"The operator may not see this end: {error}", markup=False, highlight=False, soft_wrap=True)


def ready(starts: Sequence[float], wanted: int, now: float) -> bool:
    """Whether `wanted` nodes have ever been there for READY_S. `starts` of all that have joined, gone ones too, and `now` in
    seconds."""
    return len(starts) >= wanted and sorted(starts)[wanted - 1] <= now - READY_S


def _starts() -> Iterator[list[float]]:
    """When the nodes for work started that have joined so far, gone ones too, look by look."""
    launcher.connect()
    from ray.exceptions import RayError

    gcs = launcher.gcs_client()
    while True:
        try:
            nodes = gcs.get_all_node_info().values()
        except RayError as error:
            raise ClusterError(f"Ray does not tell of its nodes: {error}") from error
        yield [node.start_time_ms / 1000 for node in nodes if not node.is_head_node]
