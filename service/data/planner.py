"""Which rows belong to which step, and how a step is cut into micro-batches: pure functions of lengths, seed and batch.

`make_plan` gives the steps. It does not know how far a run has come nor how many workers it has, so a step's rows are
found in O(1) once its epoch is drawn, a resumed run sees exactly the rows that an uninterrupted one would, and so does a
run on more workers. An epoch is every row once, or so many rows of each source (`Mixture`); in a new random order, or
from the lowest score up. `micro_batches` and `share_of_rank` cut a step for so many workers; the loss never depends on
them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from service.config import BatchBlock, RunConfig
from service.data import mixing
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
    """The steps of a run. Every epoch is drawn anew; its last step may be smaller.

    `draw` gives an epoch and keeps the last ones. `starts` has the first step of each, and may go on beyond the last.
    """

    def __init__(self, draw: Callable[[int], Epoch], starts: Sequence[int], num_steps: int) -> None:
        self.num_steps = num_steps
        self._starts, self._epoch = starts, draw

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch. Later ones differ by a few where other rows are packed."""
        return self._starts[1]

    def rows(self, step: int) -> Integers:
        """The rows of one step, counted from 0. Read-only."""
        number, position = self._place(step)
        epoch = self._epoch(number)
        rows = epoch.rows[epoch.bounds[position] : epoch.bounds[position + 1]]
        rows.flags.writeable = False
        return rows

    def epochs(self, num_steps: int) -> float:
        """How many epochs the first `num_steps` steps are."""
        number, position = self._place(num_steps - 1)
        return number + (position + 1) / (self._starts[number + 1] - self._starts[number])

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which of its steps it is."""
        number = bisect_right(self._starts, step) - 1
        return number, step - self._starts[number]


@dataclass(frozen=True)
class Mixture:
    """Several sources as one: of source i are the rows from `bounds[i]` to `bounds[i + 1]`, `per_epoch[i]` in an epoch.

    They are taken from permutation after permutation of the source, on from where the epoch before has ended: at any time
    no row of it was seen more than once more often than another. An epoch is found without drawing those before it.
    """

    bounds: tuple[int, ...]
    per_epoch: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether every epoch has every row exactly once."""
        return tuple(np.diff(self.bounds)) == self.per_epoch

    def draw(self, seed: int, epoch: int) -> Integers:
        """The rows of an epoch, source by source."""
        parts = [np.empty(0, dtype=np.int64)]
        for source, ((start, end), number) in enumerate(zip(pairwise(self.bounds), self.per_epoch, strict=True), 1):
            first, skipped = divmod(epoch * number, end - start)
            passes = range(first, first + math.ceil((skipped + number) / (end - start)))
            drawn = [_generator(seed, one, source).permutation(end - start) for one in passes]
            parts += [start + np.concatenate(drawn)[skipped : skipped + number]] if drawn else []
        return np.concatenate(parts)


def plan_of(
    config: RunConfig, lengths: Integers, bounds: Sequence[int], scores: npt.NDArray[np.float64] | None
) -> Plan:
    """The plan of a run over examples of so many tokens: of sources between `bounds`, with the scores of a curriculum."""
    per_epoch = mixing.shares(np.diff(bounds).tolist(), config.data.sources, config.data.mix)
    by_length = config.data.curriculum == "length"
    return make_plan(
        lengths,
        config.optim.batch,
        capacity=config.data.seq_len,
        epochs=config.optim.epochs,
        seed=config.seed,
        max_steps=config.optim.max_steps,
        mixture=Mixture(tuple(bounds), per_epoch),
        scores=lengths if by_length else scores,
    )


def make_plan(
    lengths: npt.ArrayLike,
    batch: BatchBlock,
    *,
    capacity: int,
    epochs: float,
    seed: int,
    max_steps: int | None,
    mixture: Mixture | None = None,
    scores: npt.NDArray[Any] | None = None,
) -> Plan:
    """The steps over rows of so many tokens; no row is longer than `capacity`, the tokens of a sequence.

    `batch.rows`: so many rows each step. `batch.tokens`: a step is as many sequences as fit, and rows are packed into
    sequences over the whole epoch: see `_Sequences`; with `scores`, as many rows as come next and fit. Scores order every
    epoch, the lowest first, and equal ones are shuffled. A share of an epoch is rounded up to whole steps. Raises
    ConfigError where the batch is smaller than the longest row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size and sizes.min() > 0 and sizes.max() <= capacity, "rows have 1 to `capacity` tokens"
    mixture = None if mixture is None or mixture.even else mixture
    order = partial(_order, len(sizes), mixture, None if scores is None else _small(scores), seed)
    if batch.tokens is None:
        assert batch.rows is not None, "a batch is in rows or in tokens"
        num_rows = sum(mixture.per_epoch) if mixture else len(sizes)
        return _even_plan(partial(_draw_rows, order, batch.rows), num_rows, batch.rows, epochs, max_steps)
    width, per_step = _sequences_of_step(batch.tokens, capacity, int(sizes.max()))
    if scores is not None:
        return _counted_plan(partial(_draw_tokens, order, sizes, batch.tokens), epochs, max_steps)
    if mixture is not None:
        return _counted_plan(partial(_draw_packed, mixture, sizes, width, per_step, seed), epochs, max_steps)
    sequences = _Sequences(sizes, width)
    return _even_plan(partial(sequences.draw, per_step, seed), sequences.number, per_step, epochs, max_steps)


def _even_plan(draw: Callable[[int], Epoch], units: int, per_step: int, epochs: float, max_steps: int | None) -> Plan:
    """Of epochs of so many rows or sequences each, so many a step."""
    steps_per_epoch = math.ceil(units / per_step)
    whole = int(epochs)
    share = math.ceil(round((epochs - whole) * units / per_step, 6))
    num_steps = max(1, whole * steps_per_epoch + share)
    starts = range(0, 2**62, steps_per_epoch)
    return Plan(lru_cache(maxsize=2)(draw), starts, num_steps if max_steps is None else min(num_steps, max_steps))


def _counted_plan(draw: Callable[[int], Epoch], epochs: float, max_steps: int | None) -> Plan:
    """Of epochs that are drawn to know how many steps each has: seconds for each, at 10^7 rows."""
    starts, drawn = [0], lru_cache(maxsize=2)(draw)
    for number in range(math.ceil(epochs)):
        starts.append(starts[-1] + len(drawn(number).bounds) - 1)
        if max_steps is not None and starts[-1] >= max_steps:
            return Plan(drawn, starts, max_steps)
    whole = int(epochs)
    share = math.ceil(round((epochs - whole) * (starts[-1] - starts[whole]), 6))
    return Plan(drawn, starts, starts[whole] + share)


def _generator(*numbers: int) -> np.random.Generator:
    """PCG64 seeded with (seed, epoch) or (seed, pass, source from 1): the same draws on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def _small(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Whole numbers from 0 in their smallest type: numpy sorts 16-bit integers by radix, 10^7 in a tenth of the time."""
    return scores.astype(np.min_scalar_type(scores.max())) if scores.dtype.kind == "i" and scores.min() >= 0 else scores


def _order(num_rows: int, mixture: Mixture | None, scores: npt.NDArray[Any] | None, seed: int, epoch: int) -> Integers:
    """The rows of an epoch, shuffled, and then by their scores."""
    rows = _generator(seed, epoch).permutation(mixture.draw(seed, epoch) if mixture else num_rows)
    return rows if scores is None else rows[np.argsort(scores[rows], kind="stable")]


def _draw_rows(order: Callable[[int], Integers], batch_rows: int, epoch: int) -> Epoch:
    rows = order(epoch)
    return Epoch(rows, np.minimum(np.arange(0, len(rows) + batch_rows, batch_rows), len(rows)))


def _draw_tokens(order: Callable[[int], Integers], sizes: Integers, tokens: int, epoch: int) -> Epoch:
    """In order, as many rows each step as fit into `tokens`."""
    rows = order(epoch)
    ends = np.cumsum(sizes[rows])
    bounds = [0]
    while bounds[-1] < len(rows):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + tokens, side="right")))
    return Epoch(rows, np.asarray(bounds))


def _draw_packed(mixture: Mixture, sizes: Integers, width: int, per_step: int, seed: int, epoch: int) -> Epoch:
    """Packed anew each epoch, because each has other rows."""
    rows = mixture.draw(seed, epoch)
    packed = _Sequences(sizes[rows], width).draw(per_step, seed, epoch)
    return Epoch(rows[packed.rows], packed.bounds)


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
