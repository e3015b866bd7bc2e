"""What drives one trial: what was decided of its run before still holds, and what hindered it is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from service.domain import RunState
from service.errors import ConfigError
from service.runs import Run
from service.sweep_config import SearchBlock, SweepConfig
from service.training import driver
from tune import trial as trial_module
from tune.directory import Sweep, TrialRecord, TrialRun
from tune.sweep_file import ResolvedSweep
from tune.trial import TrialJob, TrialThread
from tune.trials import EARLY, Trial, Trials, TrialState

WITHIN_S = 20.0
BASE: dict[str, Any] = {"model": "base", "data": {"train": "rows.jsonl"}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A trial's, whose driver was killed."""
    monkeypatch.setattr(trial_module, "LOOK_FOR_STOP_EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)
    resolved = ResolvedSweep(SweepConfig(search=SearchBlock(metric="train/loss")), {}, BASE, "")
    sweep = Sweep.create(str(tmp_path / "home"), "tickets", resolved)
    run = Run.create(sweep.home, "trial-1", "", {})
    run.set_state(RunState.RUNNING, num_steps=4)
    run.declare_dead()
    sweep.write_record(TrialRecord(number=1, draw={}, runs=(TrialRun(run=run.id, draw={}),)))
    return run


def _gone_on(run: Run, tmp_path: Path) -> Trial:
    """The trial after another driver has gone on with it."""
    sweep = Sweep.open(run.home, "latest")
    job = TrialJob(run.home, str(tmp_path / "cache"), str(tmp_path), sweep.id, "train/loss", 4, 1)
    thread = TrialThread(job, 1, {}, None, None, replay=True)  # type: ignore[arg-type]  # nobody trains
    end = time.monotonic() + WITHIN_S
    while thread.alive and time.monotonic() < end:
        thread.new_reports()
        time.sleep(0.02)
    assert not thread.alive
    (found,) = Trials(sweep, sweep.resolved()).look()
    return found


def test_a_stopping_rules_decision_outlives_its_driver(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, *_: Any, resume: Run, **others: Any) -> None:
        driver.begin(resume)
        end = time.monotonic() + WITHIN_S / 2
        while not (reason := resume.stop_requested()) and time.monotonic() < end:
            time.sleep(0.02)
        resume.set_state(RunState.STOPPED if reason else RunState.SUCCEEDED, reason or "")

    monkeypatch.setattr(driver, "train_run", train)
    run.propose_stop(f"{EARLY}not among the best")
    found = _gone_on(run, tmp_path)
    assert (found.state, found.why) == (TrialState.STOPPED, f"{EARLY}not among the best")


def test_what_keeps_a_trial_from_going_on_is_told_until_it_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hindered(*_: Any, **others: Any) -> None:
        raise ConfigError("the base model is another one by now.")

    def train(config: Any, *_: Any, resume: Run, **others: Any) -> None:
        driver.begin(resume)
        resume.set_state(RunState.SUCCEEDED)

    monkeypatch.setattr(driver, "train_run", hindered)
    found = _gone_on(run, tmp_path)
    assert (found.state, found.why) == (
        TrialState.INTERRUPTED,
        "ConfigError: the base model is another one by now.",
    )
    monkeypatch.setattr(driver, "train_run", train)
    found = _gone_on(run, tmp_path)
    assert (found.state, found.why) == (TrialState.FINISHED, "")
