"""One attempt of the training loop under Ray Train: the only file that imports it. Which attempts are made: `attempts.py`.

Ray places the workers, makes the process group and carries metrics; checkpoints are the loop's own. Ray retries nothing
here, and its own limit is finite, because without one a run whose resources never come would wait for ever. Each attempt
has a Ray run name of its own, because Ray would silently resume its own snapshot under an old one.

Two roads: `fit` starts workers for one run; a `Crew` keeps them for the next, which is how the trials of a sweep follow
one another without starting processes.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service import launcher
from service.config import RunConfig, ScaleBlock
from service.errors import ClusterError, LorayError, TrainingError, WorkerLostError
from service.training import placement
from service.training.desk import Desk
from service.training.loop import Metrics, TrainJob, TrainResult, train
from service.training.placement import Resources
from service.training.strategy import World, is_lost_peer

LEAVES_WITHIN_S = 60.0


def fit(job: TrainJob, workers: int, resources: Resources) -> TrainResult:
    """Run the loop on `workers` Ray Train workers of so many `resources` each, which leave when it has ended.

    Raises the loop's own error, WorkerLostError when a worker was killed, ClusterError when Ray could not start them.
    """
    launcher.connect()
    with _errors_as_ours(job, workers):
        return _fit(job, workers, resources, desk=None)


class Crew:
    """Workers that stay when a run has ended well: the next one begins without starting processes and importing anew.

    One run at a time. A run that fails ends its crew, because its workers may be waiting for one another; the next run has
    another crew. `leave` when no run will come any more.
    """

    def __init__(self) -> None:
        self._desk: Any = None
        self._group: Future[TrainResult] | None = None
        self._standing: tuple[int, Resources] | None = None
        self._turn = 0

    def ready_for(self, scale: ScaleBlock) -> tuple[int, Resources] | None:
        """The workers that stand by and what each has, where this run would take just as many; others leave to make room.

        DeepSpeed, which has state in each process, gets processes of its own.
        """
        if self._standing and (self._standing[0] != scale.max_workers or scale.strategy != "ddp"):
            self.leave()
        return self._standing

    def fit(self, job: TrainJob, workers: int, resources: Resources) -> TrainResult:
        """As the function `fit`, by the workers that stand by, else by new ones, which then stay."""
        if RunConfig.model_validate(job.config).scale.strategy != "ddp":
            return fit(job, workers, resources)
        launcher.connect()
        try:
            with _errors_as_ours(job, workers):
                return self._fit(job, workers, resources)
        except BaseException:
            self._group = self._standing = None
            raise

    def leave(self) -> None:
        """Send the workers away and wait until they have gone."""
        group, self._group, self._standing = self._group, None, None
        if group is not None:
            self._desk.give.remote(self._turn + 1, None)
            wait([group], timeout=LEAVES_WITHIN_S)

    def _fit(self, job: TrainJob, workers: int, resources: Resources) -> TrainResult:
        import ray
        from ray.exceptions import RayActorError

        self._turn += 1
        if self._group is None:
            self._turn = 1
            self._desk = ray.remote(Desk).options(num_cpus=0).remote()
            self._group = _in_thread(lambda: _fit(job, workers, resources, self._desk))
        else:
            self._desk.give.remote(self._turn, pickle.dumps(job))
        answer = self._desk.result.remote(self._turn)
        try:
            while not ray.wait([answer], timeout=0.5)[0]:
                if self._group.done():
                    self._group.result()
                    raise WorkerLostError(f"the workers of {job.run_id} left before its end.")
            result: TrainResult = pickle.loads(ray.get(answer))  # noqa: S301 - our own worker's
        except RayActorError as error:
            wait([self._group])  # they end the run, and find nobody to tell
            raise WorkerLostError(f"the process that gives workers their runs was killed: {error}") from error
        self._standing = workers, resources
        return result


def _in_thread(work: Callable[[], TrainResult]) -> Future[TrainResult]:
    """A daemon thread, as `attempts.py` has one: whoever gives up waiting leaves it behind."""
    future: Future[TrainResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train-crew", daemon=True).start()
    return future


def _fit(job: TrainJob, workers: int, resources: Resources, desk: Any) -> TrainResult:
    """`job`, and all those that come over the desk after it; the first worker's last result."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": dataclasses.asdict(job), "desk": desk},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"{job.run_id}-a{job.attempt}",
            storage_path=str(Path(job.cache) / "ray_train"),
            worker_runtime_env={"env_vars": launcher.ALLOCATOR},
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=1, max_preemption_failures=0
            ),
        ),
    )
    result: TrainResult = trainer.fit().return_value
    return result


@contextmanager
def _errors_as_ours(job: TrainJob, workers: int) -> Iterator[None]:
    import ray.train

    try:
        yield
    except ray.train.WorkerGroupError as error:
        raise _cause(error.worker_failures, job) from error
    except ray.train.PreemptionError as error:
        raise WorkerLostError(f"a node of {job.run_id} was taken away: {error}") from error
    except ray.train.ControllerError as error:
        raise WorkerLostError(f"Ray Train could not start or keep {workers} worker(s): {error}") from error
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"Ray Train failed: {error}") from error


def _work(config: dict[str, Any]) -> TrainResult:
    """One worker's life: a run, and as many more as the desk has. Ray has made the process group before this is called."""
    import ray
    import torch

    job, desk, turn = TrainJob(**config["job"]), config["desk"], 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = World.current(placement.place_of(socket.gethostname(), ray.get_runtime_context().get_node_id()))
    while True:
        result = _one_run(job, world)
        if desk is None:
            return result
        if world.rank == 0:
            ray.get(desk.hand_in.remote(turn, pickle.dumps(result)))
        gc.collect()  # the model goes before the next one is loaded
        turn += 1
        given = ray.get(desk.job.remote(turn))
        if given is None:
            return result
        job = pickle.loads(given)  # noqa: S301 - our own driver's


def _one_run(job: TrainJob, world: World) -> TrainResult:
    import ray.train
    import torch

    def report(metrics: Metrics) -> None:
        # A barrier over all workers that was seen to take 1 to 2 s: not for every step. The run's own log has them all.
        if "eval/loss" in metrics:
            ray.train.report(metrics)

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        return train(job, world, report)
    except RuntimeError as error:
        if is_lost_peer(error):
            raise WorkerLostError(
                f"another worker of {job.run_id} was killed, or its node went away: {error}"
            ) from error
        raise


def _cause(failures: dict[int, Exception], job: TrainJob) -> LorayError:
    """What really happened, among the workers' failures: the loop's own error, a death, or else an error in the code."""
    chains = {rank: list(_chain(failure)) for rank, failure in failures.items()}
    ours = [error for chain in chains.values() for error in chain if isinstance(error, LorayError)]
    for error in sorted(ours, key=lambda error: isinstance(error, WorkerLostError)):  # who lost a peer knows least
        return error
    for rank, chain in sorted(chains.items()):
        if not any(
            hasattr(error, "_base_exc") for error in chain
        ):  # nothing that the loop has raised: it had no time to
            return WorkerLostError(f"worker {rank} of {job.run_id} was killed, or its node went away: {failures[rank]}")
    rank, failure = min(failures.items())
    return TrainingError(
        f"worker {rank} failed: {failure}. The run's checkpoints are whole: "
        f"go on with loray train --resume {job.run_id}."
    )


def _chain(failure: BaseException | None) -> Any:
    while failure is not None:
        yield failure
        failure = getattr(failure, "_base_exc", None) or failure.__cause__
