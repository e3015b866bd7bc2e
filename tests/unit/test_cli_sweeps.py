"""`loray sweep` as a user types it: what it shows of a sweep's directory, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.domain import RunState
from service.logs import LogWriter
from service.runs import Run
from service.sweep_config import SearchBlock, SweepConfig
from tests.unit.console import Loray, home, loray
from tune import space as spaces
from tune.directory import Sweep, TrialRecord, TrialRun, list_sweeps
from tune.sweep_file import load_sweep
from tune.trials import EARLY

__all__ = ["home", "loray"]  # fixtures
BASE: dict[str, Any] = {
    "model": "base",
    "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"},
    "method": {"type": "lora", "r": 8, "alpha": 16},
    "optim": {"lr": 1e-3, "batch": {"rows": 8}},
}


def write(**blocks: Any) -> str:
    """A sweep file and its base in the working directory."""
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    sweep = {"base": "run.yaml", "space": {"optim.lr": [1e-4, 1e-3]}, "search": "grid", **blocks}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return "sweep.yaml"


def swept(home: str, *states: RunState) -> Sweep:
    """A sweep of a trial for each of these states, with two measurements each: the later trial is the better."""
    resolved = load_sweep(write(search={"trials": len(states)}))
    sweep = Sweep.create(home, "tickets", resolved)
    for number, state in enumerate(states, start=1):
        draw = spaces.draw(resolved.space, 0, number)
        run = Run.create(home, f"trial-{number}", "model: base\n", {})
        run.set_state(RunState.RUNNING, num_steps=4, attempt=1)
        with LogWriter(run.path("metrics"), "a1-r0") as log:
            for step in (2, 4):
                log.append({"step": step, "eval/loss": 10.0 / number - step, "train/tokens": 50.0})
        if state is not RunState.RUNNING:
            run.set_state(state, f"{EARLY}not among the best" if state is RunState.STOPPED else "")
        sweep.write_record(TrialRecord(number=number, draw=draw, runs=(TrialRun(run=run.id, draw=draw),)))
    return sweep


def test_a_sweep_file_or_a_sweep_to_go_on_with_is_asked_for(loray: Loray) -> None:
    assert "SWEEP.YAML" in loray("sweep", "--help").out
    for arguments in (("run",), (write(), "--resume", "latest")):
        done = loray("sweep", *arguments)
        assert done.code == 2
        assert "takes a sweep file or --resume SWEEP, one of the two" in done.err


def test_everything_wrong_with_a_sweep_file_is_told_before_there_is_a_sweep(loray: Loray, home: str) -> None:
    file = write(space={"optim.lrr": [1, 2], "method.r": {"uniform": [8, 4]}})
    done = loray("sweep", file, "--set", "search.metric=eval/accuracy")
    assert done.code == 2
    for part in (
        "optim.lrr: unknown key. Did you mean optim.lr?",
        "space.method.r: uniform [8, 4] is empty",
        "no run reports 'eval/accuracy'",
    ):
        assert part in done.err
    assert list_sweeps(home) == []


def test_share_base_is_a_flag_of_a_new_sweep(loray: Loray, home: str) -> None:
    done = loray("sweep", write(search="tpe"), "--share-base")
    assert done.code == 2 and "knows no search: tpe" in done.err


def test_list_shows_each_sweep_and_its_best_trial(loray: Loray, home: str) -> None:
    assert "No sweeps yet. Start one: loray sweep SWEEP.YAML" in loray("sweep", "list").out
    sweep = swept(home, RunState.SUCCEEDED)
    sweep.set_state(RunState.RUNNING)
    sweep.set_state(RunState.SUCCEEDED, best=1, model="tickets@1")
    (row,) = json.loads(loray("sweep", "list", "--json").out)
    assert (row["sweep"], row["state"], row["details"]["model"]) == (sweep.id, "succeeded", "tickets@1")
    assert "succeeded" in loray("sweep", "list").out


def test_show_ranks_the_trials_and_says_why_one_ended_early(loray: Loray, home: str) -> None:
    sweep = swept(home, RunState.SUCCEEDED, RunState.SUCCEEDED, RunState.STOPPED, RunState.RUNNING)
    done = loray("sweep", "show", "latest")
    assert done.code == 0
    assert done.out.startswith(f"{sweep.id}  created")
    assert "best so far: trial 4, eval/loss -1.5 at step 4" in done.out
    assert "400 tokens read" in done.out
    assert f"trial 3: {EARLY}not among the best" in done.out
    shown = json.loads(loray("sweep", "show", sweep.id, "--json").out)
    assert shown["best"] == 2  # of those that have finished
    assert [row["trial"] for row in shown["trials"]] == [2, 1, 4, 3]
    assert shown["trials"][0]["curve"] == [{"step": 2, "value": 3.0}, {"step": 4, "value": 1.0}]


def test_a_sweep_that_is_not_there_is_told_with_the_nearest(loray: Loray, home: str) -> None:
    sweep = swept(home, RunState.SUCCEEDED)
    done = loray("sweep", "show", sweep.id[:-1])
    assert done.code != 0 and f"the nearest is {sweep.id}. List them with `loray sweep list`" in done.err


def test_only_a_running_sweep_is_asked_to_stop(loray: Loray, home: str) -> None:
    sweep = swept(home, RunState.RUNNING)
    done = loray("sweep", "stop", sweep.id)
    assert done.code != 0 and "is created, so there is nothing to stop" in done.err
    sweep.set_state(RunState.RUNNING)
    done = loray("sweep", "stop", "latest", "--reason", "enough")
    assert done.code == 0 and f"loray sweep --resume {sweep.id}" in done.out
    assert sweep.stop_requested() == "enough"


def test_a_model_is_published_only_of_a_finished_trial_and_under_a_bare_name(loray: Loray, home: str) -> None:
    sweep = swept(home, RunState.STOPPED, RunState.FAILED)
    done = loray("sweep", "publish", sweep.id, "tickets@3")
    assert done.code == 2 and "must be a bare name" in done.err
    done = loray("sweep", "publish", sweep.id, "tickets")
    assert done.code != 0 and "has no finished trial, so it has no model yet" in done.err


def test_a_sweep_that_is_over_or_running_is_not_gone_on_with(loray: Loray, home: str) -> None:
    sweep = swept(home, RunState.SUCCEEDED)
    sweep.set_state(RunState.RUNNING, host="another")
    done = loray("sweep", "--resume", sweep.id)
    assert done.code != 0 and "is running (heartbeat " in done.err
    sweep.set_state(RunState.SUCCEEDED)
    done = loray("sweep", "--resume", sweep.id)
    assert done.code != 0 and f"is over: there is nothing to resume. loray sweep show {sweep.id}" in done.err


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search.share_base=true", "search.share_base: a sweep that goes on keeps it"),
        ("optim.lr=0.1", "optim.lr: a sweep that goes on keeps it. Changeable are search.trials"),
        ("search.trials=0", "search.trials: must be greater than or equal to 1, not 0"),
    ],
)
def test_a_sweep_that_goes_on_keeps_its_space_and_its_rules(
    loray: Loray, home: str, override: str, problem: str
) -> None:
    sweep = swept(home, RunState.SUCCEEDED)
    sweep.set_state(RunState.RUNNING)
    sweep.set_state(RunState.STOPPED, "enough")
    before = sweep.resolved()
    done = loray("sweep", "--resume", sweep.id, "--set", override)
    assert done.code == 2 and problem in done.err
    assert sweep.resolved() == before and before.config == SweepConfig(search=SearchBlock(trials=1))
