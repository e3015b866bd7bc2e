"""Which rows belong to which step, and how a step is cut into micro-batches: pure functions of lengths, seed and batch.

`make_plan` gives the steps. It does not know how far a run has come nor how many workers it has, so a step's rows are
found in O(1) once its epoch is drawn, a resumed run sees exactly the rows that an uninterrupted one would, and so does a
run on more workers. `micro_batches` and `share_of_rank` cut a step for so many workers; the loss never depends on them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from service.config import BatchBlock
from service.errors import ConfigError

# Tokens of one micro-batch: past this a CPU gains nothing and a GPU is near its matrix rate on small models.
MICRO_TOKENS = 4096

Integers = npt.NDArray[np.int64]
Rows = Sequence[int] | Integers


@dataclass(frozen=True)
class Epoch:
    """The rows of an epoch in order; step i of it has `rows[bounds[i]:bounds[i + 1]]`."""

    rows: Integers
    bounds: Integers


class Plan:
    """The steps of a run. Every epoch is drawn anew and holds every row exactly once; its last step may be smaller."""

    def __init__(self, draw: Callable[[int], Epoch], steps_per_epoch: int, num_steps: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = num_steps
        self._epoch = lru_cache(maxsize=2)(draw)

    def rows(self, step: int) -> Integers:
        """The rows of one step, counted from 0. Read-only."""
        number, position = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        rows = epoch.rows[epoch.bounds[position] : epoch.bounds[position + 1]]
        rows.flags.writeable = False
        return rows


def make_plan(
    lengths: npt.ArrayLike, batch: BatchBlock, *, capacity: int, epochs: float, seed: int, max_steps: int | None
) -> Plan:
    """The steps over rows of so many tokens; no row is longer than `capacity`, the tokens of a sequence.

    `batch.rows`: so many rows of a new permutation each step. `batch.tokens`: a step is as many sequences as fit, and rows
    are packed into sequences over the whole epoch: see `_Sequences`. A share of an epoch is rounded up to whole steps.
    Raises ConfigError where the batch is smaller than the longest row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size and sizes.min() > 0 and sizes.max() <= capacity, "rows have 1 to `capacity` tokens"
    if batch.tokens is None:
        assert batch.rows is not None, "a batch is in rows or in tokens"
        units, per_step = len(sizes), batch.rows
        draw: Callable[[int], Epoch] = partial(_draw_rows, len(sizes), batch.rows, seed)
    else:
        width, per_step = _sequences_of_step(batch.tokens, capacity, int(sizes.max()))
        sequences = _Sequences(sizes, width)
        units = sequences.number
        draw = partial(sequences.draw, per_step, seed)
    steps_per_epoch = math.ceil(units / per_step)
    whole = int(epochs)
    share = math.ceil(round((epochs - whole) * units / per_step, 6))
    num_steps = max(1, whole * steps_per_epoch + share)
    return Plan(draw, steps_per_epoch, num_steps if max_steps is None else min(num_steps, max_steps))


def _generator(seed: int, epoch: int) -> np.random.Generator:
    """PCG64 seeded with (seed, epoch): the same draws on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))


def _draw_rows(num_rows: int, batch_rows: int, seed: int, epoch: int) -> Epoch:
    bounds = np.minimum(np.arange(0, num_rows + batch_rows, batch_rows), num_rows)
    return Epoch(_generator(seed, epoch).permutation(num_rows), bounds)


def _sequences_of_step(tokens: int, capacity: int, longest: int) -> tuple[int, int]:
    """Tokens of a sequence and sequences of a step, so that their product uses up `tokens` where the longest row allows."""
    if tokens < longest:
        raise ConfigError(
            f"optim.batch.tokens is {tokens}, and the longest row has {longest} tokens: a step must hold one whole row. "
            f"Set optim.batch.tokens to {longest} or more, or lower data.seq_len with data.over_long: drop."
        )
    number = math.ceil(tokens / capacity)
    if tokens // number >= longest:
        return tokens // number, number
    return capacity, tokens // capacity


class _Sequences:
    """Rows packed into sequences of at most `width` tokens, the best fit for the longest rows first.

    Packed once, by length alone: 'two of 300 tokens and one of 400', so many times. Each epoch then draws which rows of
    300 tokens these are, and the order of the sequences. So every epoch has the same number of steps, which a first fit
    along a shuffled order has not, and sequences are over 99 % full where that gave 97 %. The price is that a row whose
    length no other row has keeps its company; a step still draws its sequences at random. The cost is that of the
    different lengths, not of the rows (as in arXiv:2107.02027), and of a permutation each epoch: 10^7 rows take 3 s.
    """

    def __init__(self, lengths: Integers, width: int) -> None:
        contents = _best_fit_decreasing(lengths, width)
        self._lengths = lengths.astype(np.min_scalar_type(width))  # numpy sorts 16-bit integers by radix
        self._counts = np.concatenate([np.full(number, len(content)) for content, number in contents])
        self._starts = np.cumsum(self._counts) - self._counts
        slots = np.concatenate([np.tile(content, number) for content, number in contents])
        self._slots_by_length = np.argsort(slots.astype(self._lengths.dtype), kind="stable")
        self.number = len(self._counts)

    def draw(self, per_step: int, seed: int, epoch: int) -> Epoch:
        """Rows of equal length change places among themselves, sequences change places; rows come sequence by sequence."""
        generator = _generator(seed, epoch)
        shuffled = generator.permutation(len(self._lengths))
        rows = np.empty_like(shuffled)
        rows[self._slots_by_length] = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]
        order = generator.permutation(self.number)
        counts = self._counts[order]
        ends = np.cumsum(counts)
        from_slots = np.arange(len(rows)) + np.repeat(self._starts[order] - (ends - counts), counts)
        return Epoch(rows[from_slots], np.concatenate([[0], ends[per_step - 1 : -1 : per_step], [len(rows)]]))


def _best_fit_decreasing(lengths: Integers, width: int) -> list[tuple[list[int], int]]:
    """Sequences as the lengths in them and how many of that kind: rows of equal length are placed together."""
    values, numbers = np.unique(lengths, return_counts=True)
    room: dict[int, list[tuple[list[int], int]]] = {width: [([], len(lengths))]}  # by tokens left; plenty of empty ones
    sizes = [width]  # of the rooms, in order
    for length, count in zip(values[::-1].tolist(), numbers[::-1].tolist(), strict=True):
        left = count
        while left:
            smallest = bisect_left(sizes, length)
            size = sizes[smallest]
            content, number = room[size].pop()
            each = min(size // length, left)
            used = min(number, left // each)
            if used < number:
                room[size].append((content, number - used))
            if not room[size]:
                sizes.pop(smallest)
            rest = size - each * length
            if not room.get(rest):
                insort(sizes, rest)
            room.setdefault(rest, []).append(([*content, *[length] * each], used))
            left -= each * used
    return [(content, number) for kinds in room.values() for content, number in kinds if content]


def micro_batches(
    rows: Rows, lengths: npt.ArrayLike, *, micro: int, capacity: int | None, world_size: int
) -> list[list[list[int]]]:
    """The rows of a step as micro-batches of at most `micro` sequences of rows, alike in length within a micro-batch.

    Without `capacity`, each row is a sequence. With it, rows share sequences of at most so many tokens (and of no more
    than MICRO_TOKENS, unless a row is longer): as few as can be, balanced, and a multiple of `world_size` where there are
    rows enough. So are the micro-batches, to keep workers equal.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    index = np.asarray(rows, dtype=np.int64)
    packs = _packs(index, sizes[index], capacity, world_size) if capacity else [[int(row)] for row in index]
    ordered = sorted((int(sizes[pack].sum()), pack) for pack in packs)
    number = _multiple(math.ceil(len(packs) / micro), world_size, at_most=len(packs))
    bounds = [len(packs) * i // number for i in range(number + 1)]
    return [[pack for _, pack in ordered[a:b]] for a, b in pairwise(bounds)]


def _multiple(number: int, of: int, *, at_most: int) -> int:
    """`number` rounded up, or `at_most` where that would be more."""
    return min(math.ceil(number / of) * of, at_most)


def _packs(rows: Integers, sizes: Integers, capacity: int, world_size: int) -> list[list[int]]:
    """Balanced where that fits; else as the plan has packed them, where that takes no more; else in a few more packs."""
    longest = int(sizes.max())
    assert longest <= capacity, f"a row of {longest} tokens cannot stand in a sequence of {capacity}"
    capacity = min(capacity, max(longest, MICRO_TOKENS))
    in_order = _cut_in_order(rows, sizes, capacity)
    number = _multiple(math.ceil(int(sizes.sum()) / capacity), world_size, at_most=len(rows))
    while True:
        packs, largest = _longest_first(rows, sizes, number)
        if largest <= capacity:
            return packs
        if len(in_order) == number:
            return in_order
        number = _multiple(number + max(1, number // 50), world_size, at_most=len(rows))


def _longest_first(rows: Integers, sizes: Integers, number: int) -> tuple[list[list[int]], int]:
    """`number` packs, each row onto the smallest so far, the longest row first (Graham 1969); tokens of the largest."""
    packs: list[list[int]] = [[] for _ in range(number)]
    load = [(0, i) for i in range(number)]
    for place in np.argsort(-sizes, kind="stable").tolist():
        tokens, smallest = load[0]
        packs[smallest].append(int(rows[place]))
        heapq.heapreplace(load, (tokens + int(sizes[place]), smallest))
    return packs, max(load)[0]


def _cut_in_order(rows: Integers, sizes: Integers, capacity: int) -> list[list[int]]:
    """Packs of neighbours, each as large as it can be: no more of them than the plan made sequences."""
    packs: list[list[int]] = []
    room = 0
    for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
        if size > room:
            packs.append([])
            room = capacity
        packs[-1].append(row)
        room -= size
    return packs


def share_of_rank(
    batches: Sequence[Sequence[Sequence[int]]], lengths: npt.ArrayLike, rank: int, world_size: int
) -> list[int | None]:
    """Indices of the micro-batches that a rank computes: dealt out by padded size, the largest first, to the least busy.

    Every rank gets a list of the same length: where it has fewer micro-batches, None stands for a turn of no weight.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    padded = [len(batch) * max(int(sizes[list(pack)].sum()) for pack in batch) for batch in batches]
    load = [(0, r) for r in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(batches)), key=lambda i: (-padded[i], i)):
        busy, least = load[0]
        shares[least].append(index)
        heapq.heapreplace(load, (busy + padded[index], least))
    turns = max(map(len, shares))
    return [*sorted(shares[rank]), *[None] * (turns - len(shares[rank]))]


def auto_micro(
    batch: BatchBlock, lengths: npt.ArrayLike, capacity: int | None, world_size: int, *, gpu: bool = False
) -> int:
    """Sequences of a micro-batch by itself, within MICRO_TOKENS tokens.

    Of single rows (no `capacity`): two micro-batches a worker where they keep 2 rows. Rows of like length stand together,
    so one micro-batch a worker would give one the short rows and another the long. Of packed rows: one sequence on a CPU,
    which then has no padding at all; on a GPU as many as a worker has in a step.
    """
    sizes: npt.NDArray[Any] = np.asarray(lengths)
    mean = float(sizes.mean())
    if capacity:
        if not gpu:
            return 1
        tokens = batch.tokens or (batch.rows or 1) * mean
        return max(1, min(math.ceil(tokens / capacity / world_size), MICRO_TOKENS // capacity))
    rows = batch.rows or max(1, round((batch.tokens or 1) / mean))
    share = math.ceil(rows / world_size)
    if share >= 4:
        share = math.ceil(share / 2)
    return max(1, min(share, MICRO_TOKENS // int(sizes.max())))
