"""Epochs of several sources, and epochs from the lowest score up: what each takes, evenly, and in which order."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from service.config import BatchBlock, RunConfig
from service.data.planner import Mixture, Plan, make_plan, plan_of
from service.errors import ConfigError

MIXTURE = Mixture((0, 70, 100, 400), (25, 95, 280))  # a part of a source, all of one three times, a part
BATCHES = [BatchBlock(rows=16), BatchBlock(tokens=256)]
LENGTHS = np.random.Generator(np.random.PCG64(0)).integers(1, 65, 400)


def _plan(
    batch: BatchBlock,
    mixture: Mixture | None = MIXTURE,
    scores: npt.NDArray[np.float64] | None = None,
    epochs: float = 4,
    seed: int = 3,
    max_steps: int | None = None,
) -> Plan:
    return make_plan(
        LENGTHS, batch, capacity=64, epochs=epochs, seed=seed, max_steps=max_steps, mixture=mixture, scores=scores
    )


def _epochs(plan: Plan) -> list[list[int]]:
    """The rows of epoch after epoch, in order; `Plan.epochs` says where one ends."""
    found: list[list[int]] = [[]]
    for step in range(plan.num_steps):
        found[-1] += plan.rows(step).tolist()
        if plan.epochs(step + 1) % 1 == 0:
            found.append([])
    return [rows for rows in found if rows]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scored", [False, True])
def test_every_epoch_takes_so_many_rows_of_each_source(batch: BatchBlock, scored: bool) -> None:
    epochs = _epochs(_plan(batch, scores=LENGTHS.astype(float) if scored else None))
    assert len(epochs) == 4
    for rows in epochs:
        counts = [sum(start <= row < end for row in rows) for start, end in pairwise(MIXTURE.bounds)]
        assert tuple(counts) == MIXTURE.per_epoch


@pytest.mark.parametrize("batch", BATCHES)
def test_after_any_epoch_no_row_of_a_source_was_seen_more_than_once_more_often_than_another(batch: BatchBlock) -> None:
    draw = random.Random(4)
    for seed in range(10):
        bounds = np.cumsum([0, *(draw.randint(1, 120) for _ in range(3))])
        mixture = Mixture(tuple(bounds.tolist()), tuple(draw.randint(0, 300) for _ in range(3)))
        seen = np.zeros(int(bounds[-1]), dtype=np.int64)
        lengths = LENGTHS[: len(seen)]
        plan = make_plan(lengths, batch, capacity=64, epochs=5, seed=seed, max_steps=None, mixture=mixture)
        for rows in _epochs(plan):
            np.add.at(seen, rows, 1)
            for start, end in pairwise(mixture.bounds):
                assert seen[start:end].max() - seen[start:end].min() <= 1


def test_sources_are_mixed_within_an_epoch() -> None:
    """Where in the epoch its rows come does not say of which source they are (5 standard deviations, once in 10^6 seeds)."""
    (rows,) = _epochs(_plan(BATCHES[0], epochs=1))
    source = np.searchsorted(MIXTURE.bounds, rows, side="right")
    assert abs(np.corrcoef(np.arange(len(rows)), source)[0, 1]) < 5 / np.sqrt(len(rows))


def test_a_mixture_of_every_row_once_is_as_if_there_were_one_source() -> None:
    for batch in BATCHES:
        alone, mixed = _plan(batch, None), _plan(batch, Mixture((0, 70, 400), (70, 330)))
        assert _epochs(alone) == _epochs(mixed)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scored", [False, True])
def test_a_step_is_the_same_in_any_order_of_asking_and_after_a_resume(batch: BatchBlock, scored: bool) -> None:
    scores = (LENGTHS % 7).astype(float) if scored else None
    plan, again = _plan(batch, scores=scores), _plan(batch, scores=scores)
    in_order = [plan.rows(step).tolist() for step in range(plan.num_steps)]
    assert all(again.rows(step).tolist() == in_order[step] for step in reversed(range(plan.num_steps)))
    assert _plan(batch, scores=scores, seed=4).rows(0).tolist() != in_order[0]


def test_a_mixture_is_the_same_on_every_machine_and_version() -> None:
    assert Mixture((0, 3, 8), (4, 2)).draw(seed=0, epoch=1).tolist() == [1, 2, 0, 1, 7, 6]


@pytest.mark.parametrize("mixture", [None, MIXTURE])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_curriculum_goes_from_the_lowest_score_up_in_every_epoch(batch: BatchBlock, mixture: Mixture | None) -> None:
    scores = (LENGTHS % 10) / 10 - 0.5
    epochs = _epochs(_plan(batch, mixture, scores))
    assert len(epochs) == 4
    assert all((np.diff(scores[rows]) >= 0).all() for rows in epochs)
    assert epochs[0] != epochs[1]  # equal scores are shuffled: about 40 rows of each


def test_a_curriculum_fills_steps_of_tokens_and_never_over() -> None:
    plan = _plan(BATCHES[1], None, LENGTHS.astype(float))
    sizes = [int(LENGTHS[plan.rows(step)].sum()) for step in range(plan.num_steps)]
    assert max(sizes) <= 256
    assert all(size > 256 - 64 for step, size in enumerate(sizes) if plan.epochs(step + 1) % 1)
    with pytest.raises(ConfigError, match=r"optim\.batch\.tokens is 60"):
        _plan(BatchBlock(tokens=60), None, LENGTHS.astype(float))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_number_of_steps_follows_epochs_and_max_steps(batch: BatchBlock) -> None:
    one, two, more = (_plan(batch, epochs=epochs).num_steps for epochs in (1, 2, 2.5))
    assert one == _plan(batch).steps_per_epoch
    assert 0.45 * one <= more - two <= 0.6 * one
    assert _plan(batch, epochs=0.0001).num_steps == 1
    assert _plan(batch, max_steps=one + 2).num_steps == one + 2
    assert _plan(batch, epochs=1, max_steps=one + 2).num_steps == one
    assert _plan(batch).epochs(one) == 1 and 1 < _plan(batch).epochs(one + 1) < 1.2


def test_a_run_of_several_sources_draws_as_its_config_says() -> None:
    data = {
        "train": [{"uri": "new.jsonl", "weight": 9.0}, {"uri": "old.jsonl"}],
        "mix": {"by": "weights"},
        "curriculum": "length",
        "seq_len": 64,
    }
    config = RunConfig.model_validate({"model": {"id": "m"}, "data": data, "optim": {"epochs": 2.0}})
    plan = plan_of(config, LENGTHS, (0, 50, 400), None)
    for rows in _epochs(plan):
        assert sum(row < 50 for row in rows) == 360  # of 400 rows nine tenths, each seven times or eight
        assert (np.diff(LENGTHS[rows]) >= 0).all()
    scores = np.arange(400.0)[::-1].copy()
    named = config.model_copy(update={"data": config.data.model_copy(update={"curriculum": "hardness"})})
    for rows in _epochs(plan_of(named, LENGTHS, (0, 50, 400), scores)):
        assert (np.diff(scores[rows]) >= 0).all()


def test_a_million_rows_of_three_sources_are_planned_without_losing_one() -> None:
    lengths = np.random.Generator(np.random.PCG64(1)).integers(1, 1025, 10**6)
    mixture = Mixture((0, 100_000, 700_000, 10**6), (300_000, 600_000, 100_000))
    for batch in (BatchBlock(rows=512), BatchBlock(tokens=65536)):
        plan = make_plan(lengths, batch, capacity=1024, epochs=1, seed=0, max_steps=None, mixture=mixture)
        times = np.bincount(np.concatenate([plan.rows(step) for step in range(plan.num_steps)]), minlength=10**6)
        assert (times[:100_000] == 3).all() and (times[100_000:700_000] == 1).all() and times[700_000:].sum() == 100_000
