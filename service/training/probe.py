"""Two real steps in a process of their own: seconds a token, and the memory that they took.

    python -m service.training.probe < job.json

The model, the objective, the optimizer and the strategy are the run's, in one worker with the share of the work that the
first of its workers would have, the largest micro-batch first. Nothing is saved and no run is made. What several workers
cost each other is not in the figures: the time to sum gradients, and processors that they share.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service import launcher
from service.errors import LorayError, TrainingError

STEPS = 2
LITTLE = 1e-3  # of the rate: the steps must not lead the weights astray
SAMPLE_EVERY_S = 0.005


@dataclass(frozen=True)
class ProbeJob:
    """What the process needs, in plain values."""

    home: str
    cache: str
    config: dict[str, Any]  # RunConfig, as `model_dump(by_alias=True)` gives it
    base: str  # directory
    train_digest: str
    threads: int  # of a worker; on a GPU it does not matter


@dataclass(frozen=True)
class ProbeResult:
    """Times in seconds, tokens without padding, bytes above what the process took with its libraries."""

    steps: int
    load_s: float
    seconds_per_token: float  # forward and backward
    forward_s_per_token: float
    update_s: float
    peak_bytes: int
    libraries_bytes: int


def run_probe(job: ProbeJob) -> ProbeResult:
    """Make the steps in a fresh process. Raises TrainingError with what went wrong there."""
    done = subprocess.run(
        [sys.executable, "-m", "service.training.probe"],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **launcher.ALLOCATOR, "OMP_NUM_THREADS": str(job.threads)},
    )
    if done.returncode < 0:
        raise TrainingError(
            f"the probe's process was ended by signal {-done.returncode}, most likely for want of memory. Lower memory.micro, "
            "set memory.checkpoint_activations: true, or look at the plan without --probe."
        )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        result = ProbeResult(**answer["result"])
    except (IndexError, KeyError, ValueError):
        raise TrainingError(f"the probe failed: {(done.stderr.strip() or done.stdout.strip())[-1500:]}") from None
    return result


def probe(job: ProbeJob) -> ProbeResult:
    """The same in this process, which ought to be fresh: its memory is measured."""
    import torch

    torch.set_num_threads(job.threads)
    with _measured_memory() as memory:
        began = time.monotonic()
        trial = _Trial(job)
        load_s = time.monotonic() - began
        trial.warm_up()
        steps = min(STEPS, trial.plan.num_steps)
        tokens, computing_s, updating_s = (sum(parts) for parts in zip(*map(trial.step, range(steps)), strict=True))
        forward_s = trial.forward_s_per_token()
    return ProbeResult(
        steps=steps,
        load_s=load_s,
        seconds_per_token=computing_s / tokens,
        forward_s_per_token=forward_s,
        update_s=updating_s / steps,
        peak_bytes=memory.peak - memory.before + trial.mapped_bytes,
        libraries_bytes=memory.before,
    )


class _Trial:
    """The run's parts in one worker, and its steps without anything around them."""

    def __init__(self, job: ProbeJob) -> None:
        import numpy as np

        from service.config import RunConfig
        from service.data import shards
        from service.training import methods, strategy
        from service.training.batches import Batches, make_plan, micro_sequences
        from service.training.objectives.sft import SupervisedLoss
        from service.training.strategy import World

        self._config = config = RunConfig.model_validate(job.config)
        world, workers = World.current(), config.scale.max_workers
        self._rows = rows = shards.load(job.train_digest, home=job.home, cache=Path(job.cache))
        self.plan = make_plan(config, rows)
        order = np.argsort(-rows.lengths, kind="stable")
        self._micro = partial(micro_sequences, config, rows.lengths, workers, gpu=world.device.type == "cuda")
        micro = self._micro()
        self._alone = Batches(config, world, order, micro)
        self._batches = Batches(config, World(0, workers, world.device), order, micro)
        with strategy.loading(config):
            model = methods.load_model(Path(job.base), config, world.device, Path(job.cache), job.home)
        self.mapped_bytes = mapped_bytes(model) if world.device.type == "cpu" else 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._objective = SupervisedLoss(model)
        self._strategy = strategy.build_strategy(config, self._objective, named, world)

    def warm_up(self) -> None:
        """Choose how heads and packs are computed, as the loop does, then make a step of the largest micro-batch."""
        from service.training import start_checks

        config, first = self._config, [int(row) for row in self.plan.rows(0)]
        start_checks.check_head(self._objective, self._alone, self._rows, first, config.precision)
        if config.data.pack == "auto":
            start_checks.check_packing(self._objective, self._alone, self._rows, first, config.data.seq_len)
            if self._alone.capacity is None:
                self._alone.micro = self._batches.micro = self._micro(packed=False)
        self._batches.capacity = self._alone.capacity
        self._make([self._alone.largest(self._rows)])

    def step(self, step: int) -> tuple[int, float, float]:
        """Tokens of the first worker's share of a step, and the seconds for computing and for updating."""
        batches = self._batches.of(self.plan.rows(step), self._rows)
        share = [batches[turn] for turn in self._batches.mine(batches, self._rows) if turn is not None]
        self._last = share[0]
        computing_s, updating_s = self._make(share)
        return sum(map(self._tokens, share)), computing_s, updating_s

    def forward_s_per_token(self) -> float:
        """Of a micro-batch of the last step, as in an evaluation."""
        batch = self._batches.tensors(self._last, self._rows)
        self._objective.eval()
        began = self._now()
        with self._batches.compute():
            self._objective.log_probs(batch)
        return (self._now() - began) / self._tokens(self._last)

    def _tokens(self, batch: list[list[int]]) -> int:
        return sum(int(self._rows.lengths[pack].sum()) for pack in batch)

    def _make(self, share: list[list[list[int]]]) -> tuple[float, float]:
        began = self._now()
        self._strategy.begin(1)
        loss_sum = 0.0
        for turn, sequences in enumerate(share):
            with self._batches.compute():
                loss = self._objective(self._batches.tensors(sequences, self._rows))
            loss_sum += float(loss.item())
            self._strategy.backward(loss, last=turn == len(share) - 1)
        computed = self._now()
        self._strategy.finish(loss_sum, stop=False)
        self._strategy.update(self._config.optim.lr * LITTLE)
        return computed - began, self._now() - computed

    def _now(self) -> float:
        import torch

        if self._batches.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()


@dataclass
class _Memory:
    before: int = 0
    peak: int = 0


@contextmanager
def _measured_memory() -> Iterator[_Memory]:
    """The most that was in use inside: allocated on the GPU, or resident in the process and no file's."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        memory = _Memory()
        torch.cuda.reset_peak_memory_stats()
        yield memory
        memory.peak = int(torch.cuda.max_memory_allocated())
        return
    memory = _Memory(before=own_bytes(), peak=own_bytes())
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            memory.peak = max(memory.peak, own_bytes())

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def own_bytes(process: str = "self") -> int:
    """Resident memory of a process that no file backs (Linux, proc_pid_status(5))."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it is ending


def mapped_bytes(model: Any) -> int:
    """Weights that lie in the pages of their safetensors file: in memory too, and shared between this host's workers."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in span.split("-")] for span, *_, name in maps if name.endswith(".safetensors")]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(size for place, size in storages.items() if any(first <= place < last for first, last in spans))


def main() -> None:
    """Read the job from standard input; print `{"result": ...}` as the last line of standard output."""
    # Imported before memory is measured: they are there in every worker, whatever it trains.
    import peft  # noqa: F401
    import transformers  # noqa: F401

    result = probe(ProbeJob(**json.load(sys.stdin)))
    print(json.dumps({"result": asdict(result)}))


if __name__ == "__main__":
    try:
        main()
    except LorayError as error:
        sys.exit(f"{type(error).__name__}: {error}")
