"""Sweep files: what is read, what becomes of it, and everything that is refused, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import load_run
from service.errors import ConfigError
from tune.sweep_file import ResolvedSweep, load_sweep, sweep_from_json

BASE: dict[str, Any] = {
    "model": "base",
    "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"},
    "method": {"type": "lora", "r": 8, "alpha": 16},
    "optim": {"lr": 1e-3, "batch": {"rows": 8}},
    "publish": "tickets",
}
SPACE: dict[str, Any] = {"optim.lr": {"log": [1e-5, 1e-3]}, "method.r": [4, 8]}
ROOT = Path(__file__).resolve().parents[2]


def load(directory: Path, *overrides: str, base: dict[str, Any] = BASE, **blocks: Any) -> ResolvedSweep:
    (directory / "run.yaml").write_text(yaml.safe_dump(base))
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": "run.yaml", "space": SPACE, **blocks}, sort_keys=False))
    return load_sweep(str(file), overrides)


def problems(directory: Path, **blocks: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, **blocks)
    return str(caught.value)


def test_every_trials_config_is_a_complete_run_file_of_its_own(tmp_path: Path) -> None:
    sweep = load(tmp_path, search={"trials": 3})
    assert sweep.known_draws is not None and len(sweep.known_draws) == 3
    for draw in sweep.known_draws:
        trial = sweep.trial("Trial 1", draw, {"evaluate.every.steps": 5})
        (tmp_path / "trial.yaml").write_text(trial.text)
        again = load_run(str(tmp_path / "trial.yaml"))
        assert again.config == trial.config
        assert (again.config.optim.lr, again.config.method.r) == (draw["optim.lr"], draw["method.r"])  # type: ignore[union-attr]
        assert again.config.evaluate.every.steps == 5
        assert again.config.publish is None  # the sweep publishes the best


def test_the_sweep_publishes_under_the_bases_name_or_its_own(tmp_path: Path) -> None:
    bases, own = load(tmp_path).config.publish, load(tmp_path, publish="other").config.publish
    assert bases and bases.name == "tickets"
    assert own and own.name == "other"


def test_a_range_in_a_plain_run_file_makes_it_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    optim = {"lr": {"log": [1e-5, 1e-3]}, "batch": {"rows": [4, 8]}}
    method = {"targets": ["q_proj"], "r": [4, 8]}  # a list of modules is no range
    file.write_text(yaml.safe_dump({**BASE, "optim": optim, "method": method, "search": {"trials": 2}}))
    sweep = load_sweep(str(file))
    assert set(sweep.space) == {"optim.lr", "optim.batch.rows", "method.r"}
    assert sweep.base["method"] == {"targets": ["q_proj"]}
    assert sweep.num_trials == 2


def test_overrides_are_of_the_sweep_or_else_of_its_base(tmp_path: Path) -> None:
    sweep = load(tmp_path, "search.trials=5", "stop=none", "method.r=16", "optim.epochs=3")
    assert (sweep.num_trials, sweep.config.stop.type) == (5, "none")
    assert list(sweep.space) == ["optim.lr"]
    assert sweep.known_draws
    config = sweep.trial("Trial 1", sweep.known_draws[0], {}).config
    assert (config.method.r, config.optim.epochs) == (16, 3)  # type: ignore[union-attr]


def test_another_stopping_rule_brings_its_own_fields(tmp_path: Path) -> None:
    assert load(tmp_path, "stop.type=none", stop={"type": "asha", "factor": 2}).config.stop.type == "none"


def test_what_is_kept_in_the_directory_is_the_same_sweep(tmp_path: Path) -> None:
    sweep = load(tmp_path, stop={"type": "pbt", "every": 0.5}, search={"trials": 2, "seed": 4})
    again = sweep_from_json(yaml.safe_load(yaml.safe_dump(sweep.as_json())))
    assert again == sweep and again.known_draws == sweep.known_draws


def test_a_condition_may_be_met_by_what_the_base_says_where_the_other_field_is_not_drawn(tmp_path: Path) -> None:
    space = {
        **SPACE,
        "method.r": {"choose": [4, 8], "when": {"optim.lr": 1e-4}},
        "method.dropout": {"choose": [0.1], "when": {"method.r": 16}},
    }
    base = {**BASE, "method": {"type": "lora", "r": 16, "alpha": 16}}
    assert list(load(tmp_path, base=base, space=space).space) == list(space)
    assert "method.r is 4 or 8, never 16" in problems(tmp_path, space=space)


def test_all_problems_of_a_sweep_are_told_at_once(tmp_path: Path) -> None:
    space = {
        "optim.lrr": {"log": [1e-5, 1e-2]},
        "optim.lr": {"log": [1e-2, 1e-3]},
        "method.r": [],
        "scale.strategy": {"uniform": [0, 1]},
        "method.dropout": {"uniform": [0, 2]},
        "method.alpha": {"ratio_of": "method.rr", "choose": [1]},
        "optim.batch": [1],
    }
    search = {"algorithm": "tpe", "metric": "eval/accuracy", "paralel": 3}
    text = problems(tmp_path, space=space, search=search, stop="pbt", publsh="x")
    for part in (
        "space.optim.lrr: unknown key. Did you mean optim.lr?",
        "space.optim.lr: log [0.01, 0.001] is empty",
        "space.method.r: choose: must have at least 1 item",
        "space.scale.strategy: takes no numbers",
        "space.method.dropout: must be less than 1, not 2.0",
        "ratio_of: method.rr: unknown key. Did you mean method.r?",
        "space.optim.batch: is a block of fields",
        "search.paralel: unknown key. Did you mean search.parallel?",
        "search.metric: no run reports 'eval/accuracy'",
        "the two cannot go together",
        "publsh: unknown key. Did you mean publish?",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"space": {}}, "space: nothing varies"),
        ({"search": "grid"}, "space.optim.lr: a grid goes through values, and this is a range"),
        ({"search": {"algorithm": "grid", "trials": 3}}, "search.trials: 3, and a grid tries all its values"),
        ({"stop": "pbt", "space": {"method.r": [4, 8]}}, "stop: pbt has nothing to change"),
        ({"stop": "pbt", "space": {**SPACE, "optim.batch.rows": [4, 8]}}, "space.optim.batch.rows: under stop: pbt"),
        (
            {"space": {"method.alpha": {"ratio_of": "method.r", "choose": [1]}, "method.r": [4]}},
            "drawn after method.alpha",
        ),
        (
            {"space": {"method.r": [4, 8], "method.dropout": {"choose": [0.1], "when": {"method.r": [16, 32]}}}},
            "space.method.dropout.when: method.r is 4 or 8, never [16, 32], so method.dropout is never searched",
        ),
        (
            {"space": {**SPACE, "method.r": {"choose": [4, 8], "when": {"optim.lr": 2}}}},
            "so method.r is never searched",
        ),
        (
            {"search": {"share_base": True, "algorithm": "tpe"}},
            "search.share_base: has a runner of its own, which knows no search: tpe",
        ),
        (
            {"search": {"share_base": True}, "space": {**SPACE, "optim.batch.rows": [4, 8]}},
            "space.optim.batch.rows: trials that share a base differ in optim.lr, method.r, method.alpha only",
        ),
        (
            {"search": {"share_base": True}, "base": {**BASE, "scale": {"strategy": "zero3"}}},
            "scale.strategy: zero3, and with search.share_base all trials train in one worker. Set ddp.",
        ),
        (
            {
                "space": {
                    **SPACE,
                    "method.r": {"choose": [4, 8], "when": {"optim.lr": 1e-4}},
                    "method.alpha": {"ratio_of": "method.r", "choose": [1, 2]},
                },
                "base": {**BASE, "method": "lora"},
            },
            "space.method.alpha.ratio_of: method.r has no value in trials that do not meet its own condition",
        ),
        (
            {
                "search": "tpe",
                "space": {"method.r": [4, 16], "method.dropout": {"choose": [0.1, 5.0], "when": {"method.r": 16}}},
            },
            "space.method.dropout: must be less than 1",
        ),
        ({"base": {**BASE, "run": {"seeds": 3}}}, "base: run.seeds: asks for several trainings, and a trial is one"),
        (
            {"search": "grid", "space": {"seed": {"integer": [0, 200_000_000]}}},
            "a grid of 200,000,001 combinations, and 10,000 is the most",
        ),
        ({"search": {"trials": 100_000_000}}, "search.trials: must be less than or equal to 10000"),
        ({"search": {"trials": 8, "parallel": 2}, "stop": "pbt"}, "search.parallel: 2, and stop: pbt trains all"),
        ({"space": {1: [2]}}, "space.1: unknown key"),
        ({"schema": 2}, "schema: must be 1"),
        ({"space": {**SPACE, "data.eval": ["held-out.jsonl", None]}}, "without rows to evaluate on"),
        ({"space": {**SPACE, "publish.name": ["a", "b"]}}, "space.publish.name: cannot vary"),
        ({"stop": {"type": "asha", "quantile": 0.1}}, "stop.quantile: is no key of stop.type asha; it belongs to pbt"),
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path: Path, blocks: dict[str, Any], problem: str) -> None:
    assert problem in problems(tmp_path, **blocks)


def test_a_metric_of_evaluation_needs_rows_to_evaluate_on(tmp_path: Path) -> None:
    for there in ({"data": {"train": "rows.jsonl", "split": {"eval": 0.1}}},
                  {"data": {"train": "rows.jsonl"}, "run": {"folds": 5, "fold": 1}}):  # fmt: skip
        assert load(tmp_path, base={**BASE, **there}).config.search.metric == "eval/loss"
    without = {**BASE, "data": {"train": "rows.jsonl"}}
    assert "without rows to evaluate on" in problems(tmp_path, base=without)
    assert load(tmp_path, base=without, search={"metric": "train/loss"}).config.search.metric == "train/loss"


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"method": {"type": "full"}}, "method.type: full changes the base"),
        ({"method": {"type": "lora", "bias": "all"}}, "method.bias: all changes the base"),
        ({"scale": {"workers": 2}}, "scale.workers: 2, and with search.share_base all trials train in one"),
    ],
)
def test_only_a_base_that_stays_as_it_is_can_be_shared(tmp_path: Path, block: dict[str, Any], problem: str) -> None:
    space = {"optim.lr": [1e-4, 1e-3]}
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, base={**BASE, **block}, space=space, search={"share_base": True})
    assert load(tmp_path, space=space, search={"share_base": True}).config.search.share_base


def test_the_recipe_is_a_sweep() -> None:
    sweep = load_sweep(str(ROOT / "jobs" / "recipes" / "tickets-sweep.yaml"))
    assert set(sweep.space) == {"optim.lr", "method.r", "method.alpha"}
    assert sweep.config.publish and sweep.config.publish.name == "tickets"
