"""The plan of a run: every row once an epoch, found in any order, cut and shared without loss or repetition."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest

from service.data.planner import MICRO_TOKENS, Plan, auto_micro_rows, micro_batches, share_of_rank

SIZES = random.Random(5)
CASES = [(SIZES.randint(1, 400), SIZES.randint(1, 50), SIZES.randint(0, 2**32 - 1)) for _ in range(60)]


def _lengths(draw: random.Random, count: int) -> list[int]:
    return [draw.randint(1, 2000) for _ in range(count)]


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_row_is_drawn_exactly_once_in_every_epoch(epochs: int) -> None:
    for num_rows, batch, seed in CASES:
        plan = Plan(num_rows, batch, epochs, seed)
        steps = [plan.rows(step) for step in range(plan.num_steps)]
        assert all(0 < len(rows) <= batch for rows in steps)
        for epoch in range(epochs):
            drawn = chain.from_iterable(steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch])
            assert sorted(drawn) == list(range(num_rows))


def test_a_step_has_the_same_rows_when_steps_are_asked_out_of_order() -> None:
    draw = random.Random(6)
    for num_rows, batch, seed in CASES[:20]:
        in_order = [
            Plan(num_rows, batch, 4, seed).rows(step) for step in range(Plan(num_rows, batch, 4, seed).num_steps)
        ]
        shuffled = list(range(len(in_order)))
        draw.shuffle(shuffled)
        again = Plan(num_rows, batch, 4, seed)
        assert all(again.rows(step) == in_order[step] for step in shuffled)


def test_a_far_step_is_found_without_walking_there() -> None:
    plan = Plan(num_rows=50, batch_rows=8, epochs=10**12, seed=1)
    assert len(plan.rows(plan.num_steps - 1)) == 2  # 50 = 6 x 8 + 2


def test_epochs_and_seeds_give_other_orders() -> None:
    plan = Plan(num_rows=64, batch_rows=64, epochs=2, seed=1)
    assert plan.rows(0) != plan.rows(1)  # equal by chance once in 64! orders
    assert plan.rows(0) != Plan(64, 64, 2, seed=2).rows(0)


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert Plan(num_rows=10, batch_rows=10, epochs=1, seed=0).rows(0) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs", "max_steps", "wanted"),
    [
        (10, 4, 1, None, 3),
        (10, 4, 2, None, 6),
        (10, 4, 0.5, None, 2),
        (10, 4, 2, 5, 5),
        (10, 4, 1, 9, 3),
        (3, 8, 0.01, None, 1),
    ],
)
def test_the_number_of_steps(num_rows: int, batch: int, epochs: float, max_steps: int | None, wanted: int) -> None:
    assert Plan(num_rows, batch, epochs, 0, max_steps).num_steps == wanted


def test_more_epochs_never_mean_fewer_steps() -> None:
    for num_rows, batch, _ in CASES:
        counts = [Plan(num_rows, batch, quarter / 4, 0).num_steps for quarter in range(1, 25)]
        assert all(fewer <= more for fewer, more in pairwise(counts)), (num_rows, batch, counts)


def test_micro_batches_partition_a_step_and_pad_little() -> None:
    draw = random.Random(7)
    for num_rows, batch, seed in CASES:
        lengths, micro = _lengths(draw, num_rows), draw.randint(1, 12)
        rows = Plan(num_rows, batch, 1, seed).rows(0)
        cut = micro_batches(rows, lengths, micro)
        assert sorted(chain.from_iterable(cut)) == sorted(rows)
        assert all(0 < len(part) <= micro for part in cut)
        ranges = [(min(lengths[r] for r in part), max(lengths[r] for r in part)) for part in cut]
        assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def test_ranks_partition_the_micro_batches_whatever_their_number() -> None:
    draw = random.Random(8)
    for world in (1, 2, 3, 7, 64):
        lengths = _lengths(draw, 50)
        cut = micro_batches(range(50), lengths, 4)
        shares = [share_of_rank(cut, lengths, rank, world) for rank in range(world)]
        assert sorted(chain.from_iterable(shares)) == list(range(len(cut)))


def test_the_busiest_rank_has_at_most_one_micro_batch_more_work_than_the_idlest() -> None:
    draw = random.Random(9)
    for world in (2, 3, 5):
        lengths = _lengths(draw, 90)
        cut = micro_batches(range(90), lengths, 3)
        sizes = [len(part) * max(lengths[row] for row in part) for part in cut]
        load = [sum(sizes[i] for i in share_of_rank(cut, lengths, rank, world)) for rank in range(world)]
        assert max(load) - min(load) <= max(sizes)


def test_the_rows_of_a_step_do_not_depend_on_workers_or_micro_batch() -> None:
    lengths = _lengths(random.Random(10), 40)
    rows = Plan(40, 16, 1, 3).rows(1)
    for world, micro in ((1, 16), (2, 4), (5, 1)):
        cut = micro_batches(rows, lengths, micro)
        computed = [row for rank in range(world) for i in share_of_rank(cut, lengths, rank, world) for row in cut[i]]
        assert sorted(computed) == sorted(rows)


def test_the_automatic_micro_batch_keeps_to_the_step_and_to_the_token_budget() -> None:
    draw = random.Random(11)
    for _ in range(200):
        batch, workers, longest = draw.randint(1, 512), draw.randint(1, 16), draw.randint(1, 8192)
        micro = auto_micro_rows(batch, workers, longest)
        assert 1 <= micro <= batch
        assert micro == 1 or micro * longest <= MICRO_TOKENS
