"""Several trainings as one run: which they are, and what is said of them together. How they are trained, the jobs show."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from service.runs import Run
from service.training.repeats import Outcome, summary, variants
from tests.unit.run_files import SMALL, load


def test_a_run_of_one_training_has_no_variants(tmp_path: Path) -> None:
    assert variants(load(tmp_path, SMALL)) == []
    assert variants(load(tmp_path, f"{SMALL}run: {{folds: 5, fold: 2}}\n")) == []


def test_folds_differ_in_what_they_hold_out_alone(tmp_path: Path) -> None:
    resolved = load(tmp_path, f"{SMALL}run: {{folds: 3}}\n", "optim.epochs=2")
    trainings = variants(resolved)
    assert [training.name for training in trainings] == ["fold 1 of 3", "fold 2 of 3", "fold 3 of 3"]
    assert [training.resolved.config.run.held_out for training in trainings] == [(1, 3), (2, 3), (3, 3)]
    for training in trainings:
        same = training.resolved.config.model_copy(update={"run": resolved.config.run})
        assert same == resolved.config
        assert training.resolved.sources["run.fold"] == "--set"
        assert training.resolved.overrides[0] == "optim.epochs=2"
        assert variants(training.resolved) == []


def test_seeds_count_up_from_the_configs_and_do_not_publish_each(tmp_path: Path) -> None:
    text = SMALL.replace("}", ", eval: held.jsonl}") + "run: {seeds: 3}\nseed: 40\npublish: tickets\n"
    resolved = load(tmp_path, text)
    trainings = variants(resolved)
    assert [training.resolved.config.seed for training in trainings] == [40, 41, 42]
    assert [training.run_name for training in trainings] == [f"tickets-seed-{i}" for i in (40, 41, 42)]
    for training in trainings:
        config = training.resolved.config
        assert config.publish is None and config.run.seeds == 1
        assert config.model_copy(
            update={"seed": 40, "run": resolved.config.run, "publish": resolved.config.publish}
        ) == (resolved.config)


def test_the_longest_name_still_makes_a_run_id(tmp_path: Path) -> None:
    text = SMALL.replace("}", ", eval: held.jsonl}") + f"run: {{seeds: 2}}\nseed: {2**32 - 2}\npublish: {'x' * 64}\n"
    last = variants(load(tmp_path, text))[-1]
    assert f"-{last.run_name}-" in Run.create(str(tmp_path), last.run_name, "", {}).id


def test_mean_and_spread_are_of_the_metrics_that_all_trainings_have(tmp_path: Path) -> None:
    resolved = load(tmp_path, SMALL)
    measured = [
        {"train/loss": 1.0, "eval/loss": 2.0, "test/loss": 4.0, "optim/lr": 0.1},
        {"train/loss": 2.0, "eval/loss": 4.0, "test/loss": 4.5, "optim/lr": 0.1, "optim/loss_scale": 8.0},
        {"train/loss": 6.0, "eval/loss": 9.0, "test/loss": 3.5, "optim/lr": 0.1},
    ]
    outcomes = [
        Outcome(f"seed {i}", Run(str(tmp_path), f"run-{i}"), resolved, 10 + i, metrics)
        for i, metrics in enumerate(measured)
    ]
    found = summary(outcomes)
    assert [*found["mean"]] == ["eval/loss", "test/loss", "train/loss", "optim/lr"]
    assert found["mean"]["eval/loss"] == 5.0
    assert found["std"]["eval/loss"] == pytest.approx(statistics.stdev([2.0, 4.0, 9.0])) == pytest.approx(13**0.5)
    assert found["std"]["optim/lr"] == 0
    assert found["children"][1] == {"name": "seed 1", "run": "run-1", "step": 11, "metrics": measured[1]}
