"""One attempt of the training loop under Ray Train: the only file that imports it. Which attempts are made: `attempts.py`.

Ray places the workers, makes the process group and carries metrics; checkpoints are the loop's own. Ray retries nothing
here, and its own limit is finite, because without one a run whose resources never come would wait for ever. Each attempt
has a Ray run name of its own, because Ray would silently resume its own snapshot under an old one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

from service import launcher
from service.errors import ClusterError, LorayError, TrainingError, WorkerLostError
from service.training import placement
from service.training.loop import Metrics, TrainJob, TrainResult, train
from service.training.strategy import World, is_lost_peer


def fit(job: TrainJob, workers: int, resources: dict[str, float]) -> TrainResult:
    """Run the loop on `workers` Ray Train workers of so many `resources` each.

    Raises the loop's own error, WorkerLostError when a worker was killed, ClusterError when Ray could not start them.
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
        raise _cause(error.worker_failures, job) from error
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
