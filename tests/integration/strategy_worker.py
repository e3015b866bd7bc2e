"""One worker that trains tiny models under several strategies in turn: `python -m tests.integration.strategy_worker CASES.JSON`.

Starting a process and importing DeepSpeed takes longer than all the training, so one launch runs many cases. Each case
writes into its directory what came of it: the state after each step as `<step>.safetensors`, with `parameter/moment` as
names, `result.json`, and `memory-<rank>.json`. RANK and WORLD_SIZE say which worker of how many it is; without them it is
alone and has no process group. Warnings are errors, as they are in pytest.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from service.config import RunConfig
from service.training import strategy
from service.training.methods import load_model
from service.training.objectives.sft import SupervisedLoss, collate
from service.training.strategy import Strategy, World

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]

VOCABULARY = 97
ROWS = 5  # a step; odd, so that one of two workers runs a filler
LRS = (1e-2, 7e-3, 5e-3, 3e-3)  # one for each step: a rate that is not passed on shows


@dataclass(frozen=True)
class Case:
    """What to train: a run's config, from step `first` for `steps` steps, from the state in the file `load` if any."""

    config: dict[str, Any]
    directory: str
    first: int = 0
    steps: int = len(LRS)
    load: str | None = None
    abandon: bool = False  # before each step, one of other rows that is given up after its micro-batches
    poison: int | None = None  # the step whose first row has a loss of infinity


def rows_of_step(step: int) -> list[Row]:
    """Ids and what is trained of them, of different lengths: the rows of a step are no multiple of one another."""
    random = np.random.default_rng(step)
    lengths = random.integers(6, 14, ROWS)
    return [
        (random.integers(0, VOCABULARY, n, dtype=np.int32), (random.random(n) < 0.7).astype(np.uint8)) for n in lengths
    ]


def main() -> None:
    """Run the cases in order, and see after each that nothing of it is left in memory."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    world = World.current()
    for case in (Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())):
        before = _anonymous_bytes()
        session = _Session(case, world)
        session.run()
        alive = [weakref.ref(parameter) for parameter in session.objective.parameters()]
        load_bytes = session.load_bytes
        del session
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later belongs to nobody
        memory = {
            "load_bytes": load_bytes,
            "left_bytes": _anonymous_bytes() - before,
            "alive": sum(parameter() is not None for parameter in alive),
        }
        (Path(case.directory) / f"memory-{world.rank}.json").write_text(json.dumps(memory))
        world.wait_for_all()  # the next case may load what this one wrote
    if dist.is_initialized():
        dist.destroy_process_group()


class _Session:
    """One case: the model, the objective and the strategy, as the training loop has them."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        self.config = config = RunConfig.model_validate(case.config)
        self.directory = Path(case.directory)
        self.directory.mkdir(exist_ok=True)
        with _peak_of_anonymous_bytes() as peak, strategy.loading(config):
            model = load_model(Path(config.model.id), config, world.device, self.directory, str(self.directory))
        self.load_bytes = peak[0]
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.objective = SupervisedLoss(model)
        self.strategy: Strategy = strategy.build_strategy(config, self.objective, self.named, world)
        if case.load:
            self._load(case.load)

    def run(self) -> None:
        """Train as the case says; the first worker writes what came of it."""
        result: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "evaluated": []}
        for step in range(self.case.first, self.case.first + self.case.steps):
            if self.case.abandon:
                self.strategy.begin(7)
                self._micro_batches(step + 1, finished=False)
            self._step(step, result)
            result["evaluated"].append(self._evaluated())
            self._save(step + 1)
        result["dtypes"] = sorted({str(p.dtype) for _, p in self.named})
        with self.strategy.gathered():
            result["shapes"] = {name: list(p.shape) for name, p in self.named}
        if self.world.rank == 0:
            (self.directory / "result.json").write_text(json.dumps(result))

    def _step(self, step: int, result: dict[str, Any]) -> None:
        self.strategy.begin(sum(int(mask[1:].sum()) for _, mask in rows_of_step(step)))
        sums = self.strategy.finish(self._micro_batches(step, finished=True), stop=False)
        update = self.strategy.update(LRS[step])
        result["losses"].append(sums.loss)
        result["norms"].append(update.grad_norm)
        result["skipped"].append(update.skipped)

    def _micro_batches(self, step: int, *, finished: bool) -> float:
        """A row a micro-batch, in turn to each worker; one with fewer runs a filler where rounds must be equal."""
        rows, world = rows_of_step(step), self.world
        mine = [(row, 1.0) for row in rows[world.rank :: world.size]]
        if self.strategy.equal_rounds:
            mine += [(rows[0], 0.0)] * (math.ceil(len(rows) / world.size) - len(mine))
        if step == self.case.poison and world.rank == 0:
            mine[0] = (mine[0][0], math.inf)
        total = 0.0
        for turn, (row, weight) in enumerate(mine):
            with self._compute():
                loss = self.objective(collate([[row]], world.device)) * weight
            self.strategy.backward(loss, last=finished and turn == len(mine) - 1)
            total += float(loss.item())
        return total

    def _evaluated(self) -> float:
        """A log-probability between two steps, as the loop's evaluation asks for it."""
        self.objective.eval()
        with self._compute():
            log_probs = self.objective.log_probs(collate([[row] for row in rows_of_step(99)], self.world.device))
        self.objective.train()
        return float(log_probs.mean().item())

    def _compute(self) -> torch.autocast:
        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=self.config.precision != "fp32")

    def _save(self, step: int) -> None:
        tensors = {f"{name}/{key}": t.clone() for name, state in self.strategy.state() for key, t in state.items()}
        if self.world.rank == 0:
            save_file(tensors, self.directory / f"{step}.safetensors")

    def _load(self, path: str) -> None:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())

            def read(name: str) -> dict[str, torch.Tensor]:
                mine = [key for key in keys if key.rpartition("/")[0] == name]
                return {key.rpartition("/")[2]: file.get_tensor(key) for key in mine}

            self.strategy.load_state(read)


def _anonymous_bytes() -> int:
    """Memory that is this process's own: without mapped files such as the weights on disk."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@contextmanager
def _peak_of_anonymous_bytes() -> Iterator[list[int]]:
    """How far the process's memory rose above what it was, looked at every 2 ms; known at the end."""
    before, done = _anonymous_bytes(), threading.Event()
    peak = [0]

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous_bytes() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
