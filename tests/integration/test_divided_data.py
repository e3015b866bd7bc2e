"""Runs over data that is mixed, ordered and divided by the config, in one process without Ray: what they draw and measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.config import load_run
from service.data import shards
from service.domain import RunState
from service.errors import NotFoundError
from service.settings import Settings
from service.training.batches import make_plan
from service.training.ledger import check_ledger
from service.training.loop import train
from service.training.strategy import World
from tests.integration import small_runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "home"), tmp_path / "cache")


def test_the_test_rows_are_opened_after_the_last_step_only_and_measure_the_model_that_is_saved(
    base: Path, settings: Settings, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    test = small_runs.write_rows(tmp_path / "test.jsonl", 6, seed=1)  # the rows of the evaluation, so its loss too
    file = small_runs.write_run_file(
        directory, base,
        data={"train": str(directory / "train.jsonl"), "eval": str(directory / "eval.jsonl"), "test": str(test)},
        optim={"lr": 1.0, "schedule": "constant", "warmup": 0, "batch": {"rows": 6}, "epochs": 2, "max_steps": 6},
        evaluate={"every": {"steps": 1}}, checkpoint={"keep_best": 1},
    )  # fmt: skip
    run, job = small_runs.make_job(file, settings)
    with pytest.raises(NotFoundError, match="absent"):
        train(replace(job, test_digest="absent"), World.current())
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 7)) and not any("test/loss" in row for row in rows)
    train(replace(job, attempt=2), World.current())
    rows = run.metrics()
    best = min(rows, key=lambda row: row["eval/loss"])
    assert best["step"] < 6  # at such a rate the last step is not the best
    assert [row["step"] for row in rows if "test/loss" in row] == [best["step"]]
    assert best["test/loss"] == pytest.approx(best["eval/loss"], rel=1e-6)
    assert {"train/loss", "test/perplexity"} <= set(best)


def test_a_run_draws_the_shares_of_its_sources_by_their_scores_and_no_row_that_is_held_out(
    base: Path, settings: Settings, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    old = small_runs.write_rows(tmp_path / "old.jsonl", 12, seed=2)
    data = {
        "train": [{"uri": str(directory / "train.jsonl"), "weight": 3.0}, {"uri": str(old)}],
        "mix": {"by": "weights"},
        "curriculum": "length",
        "split": {"eval": 0.2, "test": 0.1},
        "augment": {"copies": 2, "swap": 0.5},
    }
    optim = {"lr": 1e-2, "batch": {"rows": 12}, "epochs": 1}
    file = small_runs.write_run_file(directory, base, num_rows=40, data=data, optim=optim)
    run, job = small_runs.make_job(file, settings)
    run.set_state(RunState.RUNNING, train_digest=job.train_digest)
    with pytest.raises(NotFoundError, match="absent"):  # after the last step: what comes then is not this test's
        train(replace(job, test_digest="absent"), World.current())
    run.set_state(RunState.SUCCEEDED)
    rows, *held_out = (
        shards.load(digest, home=settings.home, cache=settings.cache)
        for digest in (job.train_digest, job.eval_digest, job.test_digest)
        if digest
    )
    sides = [set(rows.row_numbers.tolist()), *(set(side.row_numbers.tolist()) for side in held_out)]
    assert len(sides) == 3 and sum(map(len, sides)) == len(set().union(*sides)) == 52
    assert len(rows) == 3 * len(sides[0])  # each row and two copies
    new = rows.card.bounds[1]
    plan = make_plan(load_run(str(directory / "run.yaml")).config, rows)
    per_epoch = np.concatenate([plan.rows(step) for step in range(plan.steps_per_epoch)])
    assert abs((per_epoch < new).sum() - 0.75 * len(rows)) < 1
    assert (np.diff(rows.lengths[per_epoch]) >= 0).all()
    assert check_ledger(run, settings.cache).ok  # drawn as planned
