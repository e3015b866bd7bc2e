"""The plan of a run: every row once an epoch, found in any order, packed, cut and shared without loss or repetition."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import pytest

from service.config import BatchBlock
from service.data.planner import MICRO_TOKENS, Plan, auto_micro, make_plan, micro_batches, share_of_rank
from service.errors import ConfigError

SIZES = random.Random(5)
CASES = [(SIZES.randint(1, 400), SIZES.randint(1, 50), SIZES.randint(0, 2**32 - 1)) for _ in range(60)]
PINNED = [[4, 6, 1], [2, 7, 5], [3, 0]]  # 10, 5 and 10 tokens of at most 10

Lengths = npt.NDArray[np.int64]


def _plan(num_rows: int, batch: int, epochs: float, seed: int, max_steps: int | None = None) -> Plan:
    lengths = np.ones(num_rows, dtype=np.int64)
    return make_plan(lengths, BatchBlock(rows=batch), capacity=8, epochs=epochs, seed=seed, max_steps=max_steps)


def _packed(lengths: Lengths, tokens: int, capacity: int, epochs: float = 1, seed: int = 0) -> Plan:
    return make_plan(lengths, BatchBlock(tokens=tokens), capacity=capacity, epochs=epochs, seed=seed, max_steps=None)


def _lengths(draw: random.Random, count: int, most: int = 2000) -> Lengths:
    return np.array([draw.randint(1, most) for _ in range(count)], dtype=np.int64)


def _chat_lengths(seed: int, count: int, capacity: int) -> Lengths:
    """Like conversations: many short ones, a long tail cut off at `capacity`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.lognormal(np.log(capacity * generator.uniform(0.05, 0.35)), generator.uniform(0.4, 0.9), count)
    return np.clip(drawn.astype(np.int64), 4, capacity)


def _rows(batches: list[list[list[int]]]) -> list[int]:
    return [row for batch in batches for pack in batch for row in pack]


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_row_is_drawn_exactly_once_in_every_epoch(epochs: int) -> None:
    for num_rows, batch, seed in CASES:
        plan = _plan(num_rows, batch, epochs, seed)
        steps = [plan.rows(step).tolist() for step in range(plan.num_steps)]
        assert all(0 < len(rows) <= batch for rows in steps)
        for epoch in range(epochs):
            drawn = chain.from_iterable(steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch])
            assert sorted(drawn) == list(range(num_rows))


def test_a_batch_of_tokens_draws_every_row_once_an_epoch_and_is_never_overfull() -> None:
    draw = random.Random(12)
    for num_rows, _, seed in CASES:
        capacity = draw.randint(20, 3000)
        lengths = _lengths(draw, num_rows, most=draw.randint(1, capacity))
        tokens = draw.randint(max(8, int(lengths.max())), 4 * capacity + 8)
        plan = _packed(lengths, tokens, capacity, epochs=3, seed=seed)
        assert plan.num_steps == 3 * plan.steps_per_epoch
        for epoch in range(3):
            steps = [plan.rows(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
            assert all(0 < lengths[rows].sum() <= tokens for rows in steps)
            assert sorted(chain.from_iterable(rows.tolist() for rows in steps)) == list(range(num_rows))


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_tokens_is_over_97_percent_full_on_ordinary_data(seed: int) -> None:
    lengths = _chat_lengths(seed, 5000, 1024)
    plan = _packed(lengths, 8 * 1024, 1024, seed=seed)
    assert lengths.sum() / (plan.steps_per_epoch * 8 * 1024) > 0.97


@pytest.mark.parametrize(("tokens", "width"), [(1500, 750), (300, 300), (2048, 1024), (2500, 833)])
def test_a_batch_that_is_no_multiple_of_the_capacity_is_used_up_by_shorter_sequences(tokens: int, width: int) -> None:
    lengths = _chat_lengths(1, 5000, 1024) % 100 + 4
    plan = _packed(lengths, tokens, 1024)
    per_step = tokens // width
    assert lengths.sum() / (plan.steps_per_epoch * per_step * width) > 0.97


def test_a_batch_smaller_than_the_longest_row_is_refused_with_both_figures() -> None:
    lengths = np.array([10, 700, 30])
    with pytest.raises(ConfigError, match=r"optim\.batch\.tokens is 512.*700 tokens.*Set optim\.batch\.tokens to 700"):
        _packed(lengths, 512, 1024)
    assert sorted(chain.from_iterable(_packed(lengths, 700, 1024).rows(i).tolist() for i in (0, 1))) == [0, 1, 2]


def test_packed_epochs_are_all_drawn_anew_and_alike_on_every_machine() -> None:
    lengths = _chat_lengths(2, 3000, 512)
    plan, again, other = (_packed(lengths, 2048, 512, epochs=2, seed=seed) for seed in (7, 7, 8))
    first, second = plan.rows(0).tolist(), plan.rows(plan.steps_per_epoch).tolist()
    assert first == again.rows(0).tolist()
    assert set(first) != set(second) and set(first) != set(other.rows(0).tolist())
    small = _packed(np.array([5, 3, 2, 5, 4, 1, 3, 2]), 10, 10, seed=0)
    assert [small.rows(step).tolist() for step in range(3)] == PINNED


def test_packed_steps_are_random_in_row_and_in_length() -> None:
    """Of 4,000 rows: neither a row's number nor its length says when in the epoch it comes (5 standard deviations)."""
    lengths = _chat_lengths(3, 4000, 1024)
    plan = _packed(lengths, 4096, 1024, seed=3)
    steps = np.concatenate([np.full(len(plan.rows(step)), step) for step in range(plan.num_steps)])
    rows = np.concatenate([plan.rows(step) for step in range(plan.num_steps)])
    for figure in (rows, lengths[rows]):
        assert abs(np.corrcoef(steps, figure)[0, 1]) < 5 / np.sqrt(len(rows))


def test_rows_of_equal_length_change_company_from_epoch_to_epoch() -> None:
    lengths = np.repeat([100, 60, 40], 40).astype(np.int64)
    plan = _packed(lengths, 100, 100, epochs=2)
    company = [
        {tuple(sorted(plan.rows(epoch * plan.steps_per_epoch + i).tolist())) for i in range(plan.steps_per_epoch)}
        for epoch in (0, 1)
    ]
    pairs = [{group for group in groups if len(group) == 2} for groups in company]
    assert len(pairs[0]) == len(pairs[1]) == 40
    assert len(pairs[0] & pairs[1]) < 12  # 1 is expected; 12 or more by chance once in 10^9


def test_a_step_has_the_same_rows_when_steps_are_asked_out_of_order() -> None:
    draw = random.Random(6)
    for num_rows, batch, seed in CASES[:20]:
        for make in (_plan, lambda n, b, e, s: _packed(np.arange(1, n + 1), max(n, 8 * b), n, e, s)):
            plan, again = make(num_rows, batch, 4, seed), make(num_rows, batch, 4, seed)
            in_order = [plan.rows(step).tolist() for step in range(plan.num_steps)]
            shuffled = list(range(len(in_order)))
            draw.shuffle(shuffled)
            assert all(again.rows(step).tolist() == in_order[step] for step in shuffled)


def test_a_far_step_is_found_without_walking_there() -> None:
    plan = _plan(50, 8, epochs=10**12, seed=1)
    assert len(plan.rows(plan.num_steps - 1)) == 2  # 50 = 6 x 8 + 2
    packed = _packed(np.full(50, 10), 80, 40, epochs=10**12)
    assert len(packed.rows(packed.num_steps - 1)) in (2, 4)  # the 13th sequence: a full one, or that of the rest


def test_a_step_cannot_be_changed_by_who_reads_it() -> None:
    plan = _plan(20, 5, 1, 0)
    with pytest.raises(ValueError, match="read-only"):
        plan.rows(1)[0] = 3


def test_epochs_and_seeds_give_other_orders() -> None:
    plan = _plan(64, 64, epochs=2, seed=1)
    assert plan.rows(0).tolist() != plan.rows(1).tolist()  # equal by chance once in 64! orders
    assert plan.rows(0).tolist() != _plan(64, 64, 2, seed=2).rows(0).tolist()


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert _plan(10, 10, epochs=1, seed=0).rows(0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


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
    assert _plan(num_rows, batch, epochs, 0, max_steps).num_steps == wanted
    packed = BatchBlock(tokens=8 * batch)  # rows of 8 tokens: a row is a sequence
    lengths = np.full(num_rows, 8)
    plan = make_plan(lengths, packed, capacity=8, epochs=epochs, seed=0, max_steps=max_steps)
    assert plan.num_steps == wanted


def test_more_epochs_never_mean_fewer_steps() -> None:
    for num_rows, batch, _ in CASES:
        counts = [_plan(num_rows, batch, quarter / 4, 0).num_steps for quarter in range(1, 25)]
        assert all(fewer <= more for fewer, more in pairwise(counts)), (num_rows, batch, counts)


def test_a_million_rows_are_packed_without_losing_one() -> None:
    lengths = _chat_lengths(4, 10**6, 1024)
    plan = _packed(lengths, 65536, 1024)
    steps = [plan.rows(step) for step in range(plan.num_steps)]
    assert (np.bincount(np.concatenate(steps), minlength=10**6) == 1).all()
    assert max(int(lengths[rows].sum()) for rows in steps) <= 65536


def test_micro_batches_of_single_rows_partition_a_step_and_pad_little() -> None:
    draw = random.Random(7)
    for num_rows, batch, seed in CASES:
        lengths, micro, world = _lengths(draw, num_rows), draw.randint(1, 12), draw.randint(1, 5)
        rows = _plan(num_rows, batch, 1, seed).rows(0)
        cut = micro_batches(rows, lengths, micro=micro, capacity=None, world_size=world)
        assert sorted(_rows(cut)) == sorted(rows.tolist())
        assert all(0 < len(part) <= micro and all(len(pack) == 1 for pack in part) for part in cut)
        ranges = [(lengths[part[0][0]], lengths[part[-1][0]]) for part in cut]
        assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def test_packs_hold_every_row_once_and_never_more_than_the_capacity() -> None:
    draw = random.Random(13)
    for num_rows, _, _ in CASES:
        capacity, micro, world = draw.randint(10, 6000), draw.randint(1, 6), draw.randint(1, 5)
        lengths = _lengths(draw, num_rows, most=draw.randint(1, capacity))
        cut = micro_batches(range(num_rows), lengths, micro=micro, capacity=capacity, world_size=world)
        packs = [pack for part in cut for pack in part]
        most = min(capacity, max(MICRO_TOKENS, int(lengths.max())))
        assert sorted(_rows(cut)) == list(range(num_rows))
        assert all(0 < lengths[pack].sum() <= most for pack in packs)
        assert all(0 < len(part) <= micro for part in cut)
        for number in (len(packs), len(cut)):  # both a multiple of the workers, but where there is nothing left to cut
            assert number % world == 0 or number in (num_rows, len(packs))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_get_equal_work_of_an_ordinary_packed_step(world: int) -> None:
    for seed in range(10):
        lengths = _chat_lengths(seed, 64, 1024)
        cut = micro_batches(range(64), lengths, micro=2, capacity=1024, world_size=world)
        shares = [share_of_rank(cut, lengths, rank, world) for rank in range(world)]
        work = [sum(int(lengths[pack].sum()) for i in share if i is not None for pack in cut[i]) for share in shares]
        assert max(work) < 1.1 * min(work)
        assert None not in chain.from_iterable(shares)


def test_packs_are_as_few_as_the_plan_made_sequences() -> None:
    for seed in range(6):
        lengths = _chat_lengths(seed, 3000, 1024)
        plan = _packed(lengths, 8 * 1024, 1024, seed=seed)
        for step in range(plan.num_steps - 1):
            cut = micro_batches(plan.rows(step), lengths, micro=4, capacity=1024, world_size=2)
            assert sum(map(len, cut)) <= 8


def test_packs_in_a_micro_batch_are_nearly_of_one_size() -> None:
    for seed in range(10):
        lengths = _chat_lengths(seed, 400, 1024)
        cut = micro_batches(range(400), lengths, micro=4, capacity=1024, world_size=2)
        tokens = [[int(lengths[pack].sum()) for pack in part] for part in cut]
        assert int(lengths.sum()) / sum(len(part) * max(part) for part in tokens) > 0.97


def test_ranks_partition_the_micro_batches_whatever_their_number() -> None:
    draw = random.Random(8)
    for capacity in (None, 4000):
        for world in (1, 2, 3, 7, 64):
            lengths = _lengths(draw, 50)
            cut = micro_batches(range(50), lengths, micro=4, capacity=capacity, world_size=2)
            shares = [share_of_rank(cut, lengths, rank, world) for rank in range(world)]
            dealt = [index for share in shares for index in share if index is not None]
            assert sorted(dealt) == list(range(len(cut)))


def test_every_rank_has_as_many_turns_and_fillers_come_last() -> None:
    lengths = _lengths(random.Random(14), 50)
    cut = micro_batches(range(50), lengths, micro=8, capacity=None, world_size=1)
    shares = [share_of_rank(cut, lengths, rank, 5) for rank in range(5)]
    assert len({len(share) for share in shares}) == 1
    assert any(None in share for share in shares)  # 7 micro-batches on 5 workers
    assert all(None not in share[: len(share) - share.count(None)] for share in shares)


def test_the_busiest_rank_has_at_most_one_micro_batch_more_work_than_the_idlest() -> None:
    draw = random.Random(9)
    for world in (2, 3, 5):
        lengths = _lengths(draw, 90)
        cut = micro_batches(range(90), lengths, micro=3, capacity=None, world_size=world)
        sizes = [len(part) * int(lengths[list(chain.from_iterable(part))].max()) for part in cut]
        shares = [share_of_rank(cut, lengths, rank, world) for rank in range(world)]
        load = [sum(sizes[i] for i in share if i is not None) for share in shares]
        assert max(load) - min(load) <= max(sizes)


@pytest.mark.parametrize("batch", [BatchBlock(rows=16), BatchBlock(tokens=16_000)])
@pytest.mark.parametrize("capacity", [None, 2000])
def test_the_rows_of_a_step_do_not_depend_on_workers_or_micro_batch(batch: BatchBlock, capacity: int | None) -> None:
    lengths = _lengths(random.Random(10), 40)
    rows = make_plan(lengths, batch, capacity=2000, epochs=1, seed=3, max_steps=None).rows(1)
    for world, micro in ((1, 16), (2, 4), (5, 1)):
        cut = micro_batches(rows, lengths, micro=micro, capacity=capacity, world_size=world)
        shares = [share_of_rank(cut, lengths, rank, world) for rank in range(world)]
        computed = [row for share in shares for i in share if i is not None for pack in cut[i] for row in pack]
        assert sorted(computed) == sorted(rows.tolist())


def test_cutting_a_step_is_the_same_every_time() -> None:
    lengths = _lengths(random.Random(15), 200, most=500)
    cuts = [micro_batches(range(200), lengths, micro=3, capacity=1024, world_size=2) for _ in range(2)]
    assert cuts[0] == cuts[1]


def test_the_automatic_micro_batch_keeps_to_the_step_and_to_the_token_budget() -> None:
    draw = random.Random(11)
    for _ in range(200):
        lengths = np.full(5, draw.randint(1, 8192))
        rows, workers, longest = draw.randint(1, 512), draw.randint(1, 16), int(lengths[0])
        for batch in (BatchBlock(rows=rows), BatchBlock(tokens=max(8, rows * longest))):
            micro = auto_micro(batch, lengths, None, workers)
            assert 1 <= micro <= max(1, 8 // longest, rows)
            assert micro == 1 or micro * longest <= MICRO_TOKENS


def test_packed_sequences_go_one_by_one_on_a_cpu_and_up_to_the_token_budget_on_a_gpu() -> None:
    lengths = np.full(100, 200)
    assert auto_micro(BatchBlock(rows=64), lengths, 1024, 2) == 1
    assert auto_micro(BatchBlock(rows=64), lengths, 1024, 2, gpu=True) == 4  # 4,096 tokens
    assert auto_micro(BatchBlock(rows=4), lengths, 1024, 2, gpu=True) == 1  # 400 tokens a worker
    assert auto_micro(BatchBlock(tokens=65536), lengths, 8192, 1, gpu=True) == 1
