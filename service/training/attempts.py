"""The attempts that make up one run: after a lost worker, an out-of-memory or a change of the cluster, the next begins.

Each attempt goes on from the newest whole checkpoint, with the same global batches, on as many workers as there are. Its
number is in the names of its logs. Errors of the run itself are never repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace

from service.config import RunConfig, ScaleBlock
from service.errors import OutOfMemoryError, StorageError, WorkerLostError
from service.runs import Run
from service.training import placement, trainer
from service.training.checkpoint import newest_step
from service.training.loop import TrainJob, TrainResult
from service.training.placement import Resources

LOOK_AT_CLUSTER_EVERY_S = 5.0
GROW = "more workers can be had: going on with them"
LEAVE = "a node is about to be taken away: going on without it"

Say = Callable[[str], None]


def train_to_the_end(job: TrainJob, run: Run, say: Say, poll: Callable[[], None]) -> TrainResult:
    """Attempt after attempt, until the run has finished, was asked to stop, or cannot go on.

    `poll` is called about twice a second from this thread. Raises the loop's own error, WorkerLostError after
    `scale.max_failures` losses in a row without a new checkpoint, ClusterError when no workers can be had.
    """
    scale = RunConfig.model_validate(job.config).scale
    failures, newest = 0, newest_step(run.uri)
    while True:
        workers, share = placement.await_workers(scale, say, lambda: run.stop_requested() is not None)
        run.heartbeat(attempt=job.attempt, workers=workers)
        try:
            result = _attempt(job, run, workers, share, scale, poll)
        except OutOfMemoryError as error:
            if error.micro <= 1:
                raise
            job = replace(job, micro=error.micro // 2)
            why = f"{error} Trying {job.micro}; the global batch stays."
        except WorkerLostError as error:
            before, newest = newest, newest_step(run.uri)
            failures = failures + 1 if newest == before else 1
            if failures > scale.max_failures:
                raise
            why = f"{error} Failure {failures} of {scale.max_failures} allowed in a row."
        else:
            if result.stopped not in (GROW, LEAVE):
                return result
            why = result.stopped
            if run.stop_requested() == why:  # and not somebody else's request meanwhile
                run.clear_stop()
        job = replace(job, attempt=job.attempt + 1)
        say(f"Attempt {job.attempt} begins, from the checkpoint of step {newest_step(run.uri) or 0}: {why}")


def _attempt(
    job: TrainJob, run: Run, workers: int, share: Resources, scale: ScaleBlock, poll: Callable[[], None]
) -> TrainResult:
    """One attempt, in a thread, because this one shows progress, takes the signals and looks at the cluster.

    A daemon thread: whoever gives up waiting (a second Ctrl-C) leaves it behind, and the workers end with this process.
    """
    future: Future[TrainResult] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit(job, workers, share))
        except BaseException as error:
            future.set_exception(error)

    leaving = placement.nodes_going_away()
    look_at = time.monotonic() + LOOK_AT_CLUSTER_EVERY_S
    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    while not future.done():
        wait([future], timeout=0.5)
        poll()
        if time.monotonic() >= look_at:
            reason = _reason_to_move(workers, share, scale, leaving)
            if reason and not future.done():
                with suppress(StorageError):  # asked for again; storage that stays away is the workers' to tell
                    _ask_to_move(run, reason)
            look_at = time.monotonic() + LOOK_AT_CLUSTER_EVERY_S
    return future.result()


def _ask_to_move(run: Run, reason: str) -> None:
    if run.stop_requested() is None:
        run.request_stop(reason)


def _reason_to_move(workers: int, share: Resources, scale: ScaleBlock, leaving: set[str]) -> str | None:
    if placement.nodes_going_away() - leaving:
        return LEAVE
    if workers < scale.max_workers and placement.room_for(placement.Cluster.current(), share) > 0:
        return GROW
    return None
