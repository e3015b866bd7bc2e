"""From rows to what a worker computes: the run's steps, their micro-batches, and the precision they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.config import RunConfig
from service.data import planner
from service.data.shards import TokenRows
from service.training.objectives.sft import Batch, collate
from service.training.strategy import World

COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

MicroBatch = list[list[int]]  # sequences, each of one or several rows


class Batches:
    """The micro-batches of a run on this worker. `capacity` is set once it is known whether rows may share a sequence."""

    def __init__(self, config: RunConfig, world: World, longest_first: npt.NDArray[np.int64], micro: int) -> None:
        self.world, self.micro = world, micro
        self.capacity: int | None = None  # tokens of a sequence that rows share; None: a row each
        self.precision = config.precision
        self._dtype = COMPUTE[config.precision]
        self._longest_first = longest_first

    def of(self, rows: Sequence[int] | npt.NDArray[np.int64], source: TokenRows) -> list[MicroBatch]:
        """All workers' micro-batches of these rows."""
        return planner.micro_batches(
            rows, source.lengths, micro=self.micro, capacity=self.capacity, world_size=self.world.size
        )

    def mine(self, batches: list[MicroBatch], source: TokenRows) -> list[int | None]:
        """Which of them are this worker's, in turns; None where another has one more."""
        return planner.share_of_rank(batches, source.lengths, self.world.rank, self.world.size)

    def tensors(self, sequences: MicroBatch, source: TokenRows) -> Batch:
        """A micro-batch on the device."""
        return self.on_host(sequences, source).to(self.world.device)

    def on_host(self, sequences: MicroBatch, source: TokenRows) -> Batch:
        """A micro-batch in this machine's memory, from where it goes to the device fastest."""
        examples = iter(source.take([row for pack in sequences for row in pack]))
        batch = collate([list(islice(examples, len(pack))) for pack in sequences], torch.device("cpu"))
        return batch.pinned() if self.world.device.type == "cuda" else batch

    def largest(self, source: TokenRows) -> MicroBatch:
        """One as large as any in the run: of the longest rows."""
        tokens = self.micro * (self.capacity or int(source.lengths.max()))
        count = int(np.searchsorted(np.cumsum(source.lengths[self._longest_first]), tokens))
        batches = self.of(self._longest_first[: max(self.micro, count)], source)
        return max(batches, key=lambda batch: len(batch) * max(int(source.lengths[pack].sum()) for pack in batch))

    def compute(self) -> AbstractContextManager[Any]:
        """The run's precision."""
        return torch.autocast(self.world.device.type, dtype=self._dtype, enabled=self._dtype is not torch.float32)


def make_plan(config: RunConfig, rows: TokenRows) -> planner.Plan:
    """The steps of a run over prepared examples."""
    return planner.plan_of(config, rows.lengths, rows.card.bounds, rows.scores)


def micro_sequences(
    config: RunConfig, lengths: npt.NDArray[np.int64], world_size: int, *, gpu: bool, packed: bool = True
) -> int:
    """Sequences of a micro-batch: as the config says, or by itself. Not `packed`: the model cannot keep rows apart."""
    if config.memory.micro == "auto":
        capacity = config.data.seq_len if packed and config.data.pack == "auto" else None
        return planner.auto_micro(config.optim.batch, lengths, capacity, world_size, gpu=gpu)
    return config.memory.micro
