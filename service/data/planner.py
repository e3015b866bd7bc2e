"""Which rows belong to which step, and how a step is cut into micro-batches: pure functions of lengths, seed and batch.

Nothing here knows how far a run has come or how many workers it has, so a step's rows are found in O(1) after its epoch's
order is drawn, a resumed run sees exactly the rows that an uninterrupted one would, and so does a run on more workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

# Tokens of one micro-batch: past this a CPU gains nothing and a GPU is near its matrix rate on small models.
MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `num_rows` rows: every epoch is a new permutation, its last step may be smaller."""

    num_rows: int
    batch_rows: int
    epochs: float
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one whole epoch."""
        return math.ceil(self.num_rows / self.batch_rows)

    @property
    def num_steps(self) -> int:
        """Steps of the run, at least one. A share of an epoch is rounded up to whole steps."""
        whole = int(self.epochs)
        share = math.ceil(round((self.epochs - whole) * self.num_rows / self.batch_rows, 6))
        steps = max(1, whole * self.steps_per_epoch + share)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows(self, step: int) -> list[int]:
        """The rows of one step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_rows, self.seed, epoch)
        start = position * self.batch_rows
        return [int(row) for row in order[start : start + self.batch_rows]]


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of an epoch: PCG64 seeded with (seed, epoch), the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_rows)


def micro_batches(rows: Sequence[int], lengths: Sequence[int], micro_rows: int) -> list[list[int]]:
    """Cut a step into micro-batches of at most `micro_rows`, rows of like length together so that little is padded."""
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    return [ordered[i : i + micro_rows] for i in range(0, len(ordered), micro_rows)]


def share_of_rank(batches: Sequence[Sequence[int]], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Indices of the micro-batches that a rank computes: dealt out by padded size, the largest first, to the least busy."""
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    load = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(batches)), key=lambda i: (-sizes[i], i)):
        least = min(range(world_size), key=lambda r: (load[r], r))
        load[least] += sizes[index]
        shares[least].append(index)
    return sorted(shares[rank])


def auto_micro_rows(batch_rows: int, workers: int, longest: int) -> int:
    """Rows of a micro-batch by itself: two micro-batches a worker where they keep 2 rows, within MICRO_TOKENS tokens.

    Rows of like length stand together, so one micro-batch a worker would give one the short rows and another the long.
    """
    share = math.ceil(batch_rows / workers)
    if share >= 4:
        share = math.ceil(share / 2)
    return max(1, min(share, MICRO_TOKENS // max(1, longest)))
