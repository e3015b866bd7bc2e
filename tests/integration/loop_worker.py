"""One worker of a training loop without Ray, its rank from the environment.

python -m tests.integration.loop_worker JOB.JSON [STEPS]      # after so many, somebody asks the run to stop
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from service.runs import Run
from service.training.loop import Metrics, TrainJob, train
from service.training.strategy import World


def main() -> None:
    """Join the process group that MASTER_ADDR, RANK and WORLD_SIZE describe, train, print the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = TrainJob(**json.loads(Path(sys.argv[1]).read_text()))
    run, steps = Run.open(job.home, job.run_id), itertools.count(1)
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else None

    def report(metrics: Metrics) -> None:
        if next(steps) == wanted and dist.get_rank() == 0:
            run.request_stop("after so many steps")

    result = train(job, World.current(), report)
    if dist.get_rank() == 0:
        print(json.dumps(asdict(result)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
