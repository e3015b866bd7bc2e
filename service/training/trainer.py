"""One attempt of the training loop under Ray Train: the only file that imports it. Which attempts are made: `attempts.py`.

Ray places the workers, makes the process group and carries metrics; checkpoints are the loop's own. Ray retries nothing
here, and its own limit is finite, because without one a run whose resources never come would wait for ever. Each attempt
has a Ray run name of its own, because Ray would silently resume its own snapshot under an old one.

Three roads: `fit` starts workers for one run; a `Crew` keeps them for the next, which is how the trials of a sweep follow
one another without starting processes; a `SharedCrew` has one worker for several runs at once.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from service import launcher
from service.config import RunConfig, ScaleBlock
from service.data import shards
from service.errors import ClusterError, LorayError, OutOfMemoryError, TrainingError, WorkerLostError
from service.training import placement
from service.training.batches import micro_sequences
from service.training.desk import Desk
from service.training.loop import Metrics, TrainJob, TrainResult, train
from service.training.placement import Resources
from service.training.strategy import World, is_lost_peer
from service.training.together import Together

LEAVES_WITHIN_S = 60.0


def fit(job: TrainJob, workers: int, resources: Resources) -> TrainResult:
    """Run the loop on `workers` Ray Train workers of so many `resources` each, which leave when it has ended.

    Raises the loop's own error, OutOfMemoryError also where Ray killed a worker because its node ran out of memory,
    WorkerLostError when a worker was killed otherwise, ClusterError when Ray could not start them.
    """
    launcher.connect()
    with _errors_as_ours(job, workers, resources):
        result: TrainResult = _fit(_one, dataclasses.asdict(job), job, workers, resources)
    return result


class Crew:
    """Workers that stay when a run has ended well: the next one begins without starting processes and importing anew.

    One run at a time. A run that fails ends its crew, because its workers may be waiting for one another; the next run has
    another crew. `leave` when no run will come any more.
    """

    def __init__(self) -> None:
        self._group: _Group | None = None

    def ready_for(self, scale: ScaleBlock) -> tuple[int, Resources] | None:
        """The workers that stand by and what each has, where this run would take just as many; others leave to make room.

        DeepSpeed, which has state in each process, gets processes of its own.
        """
        if self._group and (
            self._group.over or self._group.standing[0] != scale.max_workers or scale.strategy != "ddp"
        ):
            self.leave()
        return self._group.standing if self._group else None

    def fit(self, job: TrainJob, workers: int, resources: Resources) -> TrainResult:
        """As the function `fit`, by the workers that stand by, else by new ones, which then stay."""
        if RunConfig.model_validate(job.config).scale.strategy != "ddp":
            return fit(job, workers, resources)
        launcher.connect()
        group = self._group or _Group(_one_after_another, job, workers, resources)
        self._group = None  # unless it ends well
        with _errors_as_ours(job, workers, resources):
            result: TrainResult = group.do(job)
        self._group = group
        return result

    def leave(self) -> None:
        """Send the workers away and wait until they have gone."""
        group, self._group = self._group, None
        if group:
            group.leave()


class SharedCrew:
    """One worker in which several runs train at once on one copy of their frozen base (`together.py`).

    May be used by several threads. A run that fails leaves the others alone; the worker's death is one to each of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: _Group | None = None

    def ready_for(self, scale: ScaleBlock) -> tuple[int, Resources] | None:
        """The worker, where it lives."""
        with self._lock:
            return self._group.standing if self._group and not self._group.over else None

    def fit(self, job: TrainJob, workers: int, resources: Resources) -> TrainResult:
        """As the function `fit`, beside the runs that this crew has already."""
        launcher.connect()
        with self._lock:
            if self._group is None or self._group.over:
                self._group = _Group(_all_at_once, job, workers, resources)
            group = self._group
        with _errors_as_ours(job, workers, resources):
            answer = group.do(job)
        if isinstance(answer, LorayError):
            raise answer
        result: TrainResult = answer
        return result

    def leave(self) -> None:
        """Send the worker away when the runs that it has are over; the next run gets another."""
        with self._lock:
            group, self._group = self._group, None
        if group:
            group.leave()


class _Group:
    """Workers that take their runs from a desk."""

    def __init__(
        self, work: Callable[[dict[str, Any]], Any], first: TrainJob, workers: int, resources: Resources
    ) -> None:
        import ray

        self.standing = workers, resources
        self._turns = itertools.count(1)
        self._desk: Any = ray.remote(Desk).options(num_cpus=0).remote()
        self._fit = _in_thread(lambda: _fit(work, {"desk": self._desk}, first, workers, resources))

    @property
    def over(self) -> bool:
        """Whether its workers have gone."""
        return self._fit.done()

    def do(self, job: TrainJob) -> Any:
        """What the workers make of this job. Raises what Ray Train says where they end before."""
        import ray

        turn = next(self._turns)
        self._desk.give.remote(turn, pickle.dumps(job))
        answer = self._desk.result.remote(turn)
        try:
            while not ray.wait([answer], timeout=0.5)[0]:
                if self.over:
                    self._fit.result()
                    raise WorkerLostError(f"the workers of {job.run_id} left before its end.")
            return pickle.loads(ray.get(answer))  # noqa: S301 - our own worker's
        except _deaths() as error:
            wait([self._fit])  # they end the run, and find nobody to tell
            raise WorkerLostError(f"the process that gives workers their runs was killed: {error}") from error

    def leave(self) -> None:
        """Send them away when they have done what they have, and wait until they have gone."""
        self._desk.give.remote(next(self._turns), None)
        wait([self._fit], timeout=LEAVES_WITHIN_S)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """A daemon thread, as `attempts.py` has one: whoever gives up waiting leaves it behind."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train-crew", daemon=True).start()
    return future


def _fit(
    work: Callable[[dict[str, Any]], Any], config: dict[str, Any], job: TrainJob, workers: int, resources: Resources
) -> Any:
    """What the first worker's `work` returns. `job` lends its names only."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        work,
        train_loop_config=config,
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
    return trainer.fit().return_value


@contextmanager
def _errors_as_ours(job: TrainJob, workers: int, resources: Resources) -> Iterator[None]:
    import ray.train

    try:
        yield
    except _deaths() as error:
        said = str(error).strip().splitlines()[0]
        raise WorkerLostError(
            f"a process of Ray Train that leads {job.run_id} was killed, or its node went away: {said} Such processes are on the "
            "driver's node: where that is short of memory, give it more."
        ) from error
    except ray.train.WorkerGroupError as error:
        micro = partial(_micro, job, workers, gpu="GPU" in resources)
        raise cause_of(error.worker_failures, job.run_id, micro) from error
    except ray.train.PreemptionError as error:
        raise WorkerLostError(f"a node of {job.run_id} was taken away: {error}") from error
    except ray.train.ControllerError as error:
        raise WorkerLostError(f"Ray Train could not start or keep {workers} worker(s): {error}") from error
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"Ray Train failed: {error}") from error


def _deaths() -> tuple[type[Exception], ...]:
    """What Ray raises for an actor whose process is gone; by its memory monitor's hand it is no RayActorError."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError


def _one(config: dict[str, Any]) -> TrainResult:
    """The life of a worker that trains one run."""
    return _run(TrainJob(**config), _world())


def _one_after_another(config: dict[str, Any]) -> None:
    """The life of a worker that stays."""
    import ray

    world, desk = _world(), config["desk"]
    for turn, job in _jobs(desk):
        result = _run(job, world)
        if world.rank == 0:
            ray.get(desk.hand_in.remote(turn, pickle.dumps(result)))
        gc.collect()  # the model goes before the next one is loaded


def _all_at_once(config: dict[str, Any]) -> None:
    """The life of a worker that has several runs, each in a thread."""
    world, desk, together = _world(), config["desk"], Together()
    guests = []
    for turn, job in _jobs(desk):
        guest = threading.Thread(target=_guest, args=(desk, turn, job, world, together), name=job.run_id)
        guest.start()
        guests.append(guest)
    for guest in guests:
        guest.join()


def _guest(desk: Any, turn: int, job: TrainJob, world: World, together: Together) -> None:
    import ray
    import torch

    answer: TrainResult | LorayError
    try:
        answer = train(job, world, None, together)
    except LorayError as error:
        answer = error
    except Exception as error:
        answer = TrainingError(f"worker 0 failed: {type(error).__name__}: {error}")
    said = pickle.dumps(answer)
    del answer  # an error keeps what failed in memory
    gc.collect()  # its adapters go before another guest comes
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    ray.get(desk.hand_in.remote(turn, said))


def _jobs(desk: Any) -> Iterator[tuple[int, TrainJob]]:
    import ray

    for turn in itertools.count(1):
        given = ray.get(desk.job.remote(turn))
        if given is None:
            return
        yield turn, pickle.loads(given)  # noqa: S301 - our own driver's


def _world() -> World:
    """Ray has made the process group before."""
    import ray
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return World.current(placement.place_of(socket.gethostname(), ray.get_runtime_context().get_node_id()))


def _run(job: TrainJob, world: World) -> TrainResult:
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


def cause_of(failures: dict[int, Exception], run_id: str, micro: Callable[[], int]) -> LorayError:
    """What really happened, among the workers' failures by rank: the loop's own error, a death, or else an error in the code.

    A death that Ray itself puts down to memory is an OutOfMemoryError of `micro()`, as in the process, while that can be
    halved. With a micro-batch of 1 it is a lost worker: something else on the node may have taken the memory.
    """
    chains = {rank: list(_chain(failure)) for rank, failure in failures.items()}
    ours = [error for chain in chains.values() for error in chain if isinstance(error, LorayError)]
    lost = [error for error in ours if isinstance(error, WorkerLostError)]  # who lost a peer knows least
    for error in ours:
        if error not in lost:
            return error
    for rank, chain in sorted(chains.items()):
        if (said := _out_of_memory(chain)) and (size := micro()) > 1:
            what = (
                f"a micro-batch of {size} sequence(s) does not fit the node of worker {rank}, which Ray killed: {said}"
            )
            return OutOfMemoryError(what, size)
    for error in lost:
        return error
    for rank, chain in sorted(chains.items()):
        if not any(
            hasattr(error, "_base_exc") for error in chain
        ):  # nothing that the loop has raised: it had no time to
            return WorkerLostError(f"worker {rank} of {run_id} was killed, or its node went away: {failures[rank]}")
    rank, failure = min(failures.items())
    return TrainingError(
        f"worker {rank} failed: {failure}. The run's checkpoints are whole: go on with loray train --resume {run_id}."
    )


def _out_of_memory(chain: list[BaseException]) -> str | None:
    """What Ray's memory monitor says of a worker that it killed. A kill by the kernel looks to Ray like any other death."""
    import ray.exceptions

    said = [str(error) for error in chain if isinstance(error, ray.exceptions.OutOfMemoryError)]
    return said[0].strip().splitlines()[0][:300] if said else None


def _micro(job: TrainJob, workers: int, *, gpu: bool) -> int:
    """The sequences of a micro-batch, as the workers chose them; of a model that cannot be packed at most as many."""
    if job.micro:
        return job.micro
    lengths = shards.load(job.train_digest, home=job.home, cache=Path(job.cache)).lengths
    return micro_sequences(RunConfig.model_validate(job.config), lengths, workers, gpu=gpu)


def _chain(failure: BaseException | None) -> Any:
    """A failure and what it was raised from: Ray Train keeps that in attributes of its own."""
    while failure is not None:
        yield failure
        wrapped = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None)
        failure = wrapped or failure.__cause__
