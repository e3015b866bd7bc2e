"""The training loop under Ray Train: the only file that imports it.

Ray places the workers, makes the process group and carries metrics; checkpoints are the loop's own. A finite controller
limit ends a run whose resources never come. Each attempt has a Ray run name of its own, because Ray would silently
resume its own snapshot under an old one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from service import launcher
from service.errors import ClusterError, LorayError, TrainingError
from service.training.loop import Metrics, TrainJob, TrainResult, train
from service.training.strategy import World


def fit(job: TrainJob, workers: int) -> TrainResult:
    """Run the loop on `workers` Ray Train workers. Raises the loop's own error, or ClusterError when Ray failed."""
    launcher.connect()
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    resources = _resources(workers)
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
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=2),
        ),
    )
    try:
        result: TrainResult = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        raise _cause(error.worker_failures, job) from error
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"Ray Train could not run the workers: {error}") from error
    return result


def _resources(workers: int) -> dict[str, float]:
    """What one worker asks for: a GPU where every worker can have one, else an equal share of the CPUs that are free.

    No share may be larger than the smallest node, or it could never be placed. Raises ClusterError when there are too few.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    if workers > cpus:
        raise ClusterError(f"scale.workers is {workers}, the cluster has {cpus} CPUs. Lower it or add nodes.")
    if 0 < gpus < workers:
        raise ClusterError(f"scale.workers is {workers}, the cluster has {gpus} GPUs. Lower it or add GPUs.")
    if gpus:
        return {"CPU": 1, "GPU": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    smallest = min(count for count in nodes if count)
    free = ray.available_resources().get("CPU", 0)
    return {"CPU": max(1, int(min(free // workers, smallest)))}


def _work(config: dict[str, Any]) -> TrainResult:
    """One worker's life. Ray has made the process group before this is called."""
    import ray.train
    import torch

    job = TrainJob(**config)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def report(metrics: Metrics) -> None:
        # A barrier over all workers that was seen to take 1 to 2 s: not for every step. The run's own log has them all.
        if "eval/loss" in metrics:
            ray.train.report(metrics)

    return train(job, World.current(), report)


def _cause(failures: dict[int, Exception], job: TrainJob) -> LorayError:
    """The loop's own error among the workers' failures: the others only lost their peer."""
    for failure in failures.values():
        error: BaseException | None = failure
        while error is not None:
            if isinstance(error, LorayError):
                return error
            error = getattr(error, "_base_exc", None) or error.__cause__
    rank, failure = min(failures.items())
    return TrainingError(
        f"worker {rank} of {len(failures)} failed: {failure}. The run's checkpoints are whole: "
        f"go on with loray train --resume {job.run_id}."
    )
