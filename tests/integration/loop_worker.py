"""One worker of a training loop without Ray: `python -m tests.integration.loop_worker JOB.JSON`, rank from the environment."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from service.training.loop import TrainJob, train
from service.training.strategy import World


def main() -> None:
    """Join the process group that MASTER_ADDR, RANK and WORLD_SIZE describe, train, print the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = TrainJob(**json.loads(Path(sys.argv[1]).read_text()))
    result = train(job, World.current())
    if dist.get_rank() == 0:
        print(json.dumps(asdict(result)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
