"""One attempt of the training loop under Ray Train: the only file that imports it. Which attempts are made: `attempts.py`.

Ray places the workers, makes the process group and carries metrics; checkpoints are the loop's own. Ray retries nothing
here, and its own limit is finite, because without one a run whose resources never come would wait for ever. Each attempt
has a Ray run name of its own, because Ray would silently resume its own snapshot under an old one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from service import launcher
from service.config import RunConfig
from service.data import shards
from service.errors import ClusterError, LorayError, OutOfMemoryError, TrainingError, WorkerLostError
from service.training import placement
from service.training.batches import micro_sequences
from service.training.loop import Metrics, TrainJob, TrainResult, train
from service.training.strategy import World, is_lost_peer


def fit(job: TrainJob, workers: int, resources: dict[str, float]) -> TrainResult:
    """Run the loop on `workers` Ray Train workers of so many `resources` each.

    Raises the loop's own error, OutOfMemoryError also where Ray killed a worker because its node ran out of memory,
    WorkerLostError when a worker was killed otherwise, ClusterError when Ray could not start them.
    """
    launcher.connect()
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config=dataclasses.asdict(job),
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
    try:
        result: TrainResult = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        micro = partial(_micro, job, workers, gpu="GPU" in resources)
        raise cause_of(error.worker_failures, job.run_id, micro) from error
    except ray.train.PreemptionError as error:
        raise WorkerLostError(f"a node of {job.run_id} was taken away: {error}") from error
    except ray.train.ControllerError as error:
        raise WorkerLostError(f"Ray Train could not start or keep {workers} worker(s): {error}") from error
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"Ray Train failed: {error}") from error
    return result


def _work(config: dict[str, Any]) -> TrainResult:
    """One worker's life. Ray has made the process group before this is called."""
    import ray
    import ray.train
    import torch

    job = TrainJob(**config)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def report(metrics: Metrics) -> None:
        # A barrier over all workers that was seen to take 1 to 2 s: not for every step. The run's own log has them all.
        if "eval/loss" in metrics:
            ray.train.report(metrics)

    place = placement.place_of(socket.gethostname(), ray.get_runtime_context().get_node_id())
    try:
        return train(job, World.current(place), report)
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
