"""The attempts that make up one run: after a lost worker, an out-of-memory or a change of the cluster, the next begins.

Each attempt goes on from the newest whole checkpoint, with the same global batches, on as many workers as there are. Its
number is in the names of its logs. Errors of the run itself are never repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial

from service import logs
from service.config import RunConfig, ScaleBlock
from service.errors import OutOfMemoryError, StorageError, WorkerLostError
from service.runs import Run
from service.training import placement, trainer
from service.training.checkpoint import newest_step
from service.training.loop import TrainJob, TrainResult
from service.training.patience import Patience
from service.training.placement import Growth, Resources
from service.training.stop_channel import GROW, LEAVE, MOVES, StopChannel
from service.training.trainer import Crew, SharedCrew

LOOK_AT_CLUSTER_EVERY_S = 5.0

Say = Callable[[str], None]


def train_to_the_end(
    job: TrainJob,
    run: Run,
    stop: StopChannel,
    say: Say,
    poll: Callable[[], None],
    crew: Crew | SharedCrew | None = None,
) -> TrainResult:
    """Attempt after attempt, until the run has finished, was asked to stop, or cannot go on.

    `poll` is called about twice a second from this thread. A `crew` keeps its workers for the next run. Raises the loop's own error, WorkerLostError after
    `scale.max_failures` losses in a row without a new checkpoint, ClusterError when no workers can be had, StorageError
    when storage stayed away for `checkpoint.retry_s`.
    """
    config = RunConfig.model_validate(job.config)
    scale = config.scale
    retry_s = config.checkpoint.retry_s
    insist = Patience([run.uri], retry_s, "the run's directory", lambda kind, text: say(text)).insist
    failures, newest = 0, insist(lambda: newest_step(run.uri))
    growth, grown_from = Growth(), 0
    while True:
        standing = partial(crew.ready_for, scale) if crew else lambda: None
        found = placement.await_workers(scale, say, lambda: insist(stop.wanted) is not None, job.sharing, standing)
        if found is None:
            return TrainResult(newest or 0, {}, stopped=insist(stop.wanted))
        workers, share = found
        growth = growth.tried(grown_from, workers) if grown_from else growth.looked(0)
        grown_from = 0
        gpus = workers * share.get("GPU", 0)
        insist(lambda: run.heartbeat(attempt=job.attempt, workers=workers, gpus=gpus))  # noqa: B023 - called at once
        try:
            fit = partial(crew.fit if crew else trainer.fit, job, workers, share)
            result, growth = _attempt(fit, job, run, workers, share, scale, growth, stop, poll)
        except OutOfMemoryError as error:
            if error.micro <= 1:
                raise
            job = replace(job, micro=error.micro // 2)
            why = f"{error} Trying {job.micro}; the global batch stays."
        except WorkerLostError as error:
            before, newest = newest, insist(lambda: newest_step(run.uri))
            failures = failures + 1 if newest == before else 1
            if failures > scale.max_failures:
                raise
            why = f"{error} Failure {failures} of {scale.max_failures} allowed in a row."
        else:
            reason = stop.asked or insist(run.stop_requested)
            if result.stopped is None or reason not in MOVES:
                return replace(result, stopped=result.stopped and (reason or result.stopped))
            why = reason
            grown_from = workers if reason == GROW else 0
            if crew:
                crew.leave()
        insist(stop.forget_moves)
        newest = insist(lambda: newest_step(run.uri))
        job = replace(job, attempt=job.attempt + 1)
        say(f"Attempt {job.attempt} begins, from the checkpoint of step {newest or 0}: {why}")


def _attempt(
    fit: Callable[[], TrainResult],
    job: TrainJob,
    run: Run,
    workers: int,
    share: Resources,
    scale: ScaleBlock,
    growth: Growth,
    stop: StopChannel,
    poll: Callable[[], None],
) -> tuple[TrainResult, Growth]:
    """One attempt, in a thread, because this one shows progress, passes signals on and looks at the cluster.

    A daemon thread: whoever gives up waiting (a second Ctrl-C) leaves it behind, and the workers end with this process.
    """
    future: Future[TrainResult] = Future()

    def work() -> None:
        try:
            future.set_result(fit())
        except BaseException as error:
            future.set_exception(error)

    look_at = time.monotonic() + LOOK_AT_CLUSTER_EVERY_S
    places: list[str] = []
    threading.Thread(target=work, name="ray-train", daemon=True).start()
    while not future.done():
        wait([future], timeout=0.5)
        stop.deliver()
        poll()
        if time.monotonic() >= look_at:
            # Until all workers have spoken, what Ray calls free may be what they are about to take.
            places = places if len(places) == workers else _places(run, job.attempt)
            if len(places) == workers:
                reason, growth = _reason_to_move(places, share, scale, growth)
                if reason and not future.done():
                    stop.move(reason)
            look_at = time.monotonic() + LOOK_AT_CLUSTER_EVERY_S
    return future.result(), growth


def _places(run: Run, attempt: int) -> list[str]:
    """Where the workers of this attempt are, as each has said in its first event; fewer while some have not."""
    try:
        rows = logs.read_rows(run.path("events"))
    except StorageError:
        return []  # asked for again
    return [row["place"] for writer, row in rows if writer.startswith(f"a{attempt}-r") and row["kind"] == "worker"]


def _reason_to_move(
    places: list[str], share: Resources, scale: ScaleBlock, growth: Growth
) -> tuple[str | None, Growth]:
    from ray.exceptions import RayError

    try:
        going = placement.nodes_going_away()
        room = placement.room_for(placement.Cluster.current(), share) if len(places) < scale.max_workers else 0
    except (RayError, RuntimeError, OSError):
        return None, growth  # the head may be restarting, and the workers train on: asked again in a few seconds
    growth = growth.looked(room)
    if any(placement.is_at(place, node) for place in places for node in going):
        return LEAVE, growth
    return GROW if growth.due else None, growth
