"""Real sweeps of a tiny model on a real Ray cluster, through the doors that users use: killed, interrupted, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from service import storage
from service.domain import RunState
from service.errors import NotFoundError
from service.runs import Run, list_runs
from service.settings import Settings
from service.sweep_config import METRICS
from tests.integration import small_runs
from tests.integration.drivers import checkpoints, driving
from tests.integration.place import Place, base, place, wait_until
from tune.directory import Sweep, TrialRecord, TrialRun, list_sweeps
from tune.sweep_file import load_sweep
from tune.trials import EARLY, ENDED, Trial, Trials, TrialState

__all__ = ["base", "place"]  # fixtures

pytest_plugins = ("tests.s3_endpoint",)
STEPS = 120
DEADLINE_S = 600.0  # of a sweep of a few trials, each of which starts a worker and the gate's process


@pytest.fixture
def sweep_file(place: Place, base: Path, tmp_path: Path) -> Path:
    """Two ranks and a rate that diverges; each run has one worker and takes some seconds."""
    small_runs.write_run_file(
        tmp_path / "run", base, publish="small", scale={"workers": 1},
        optim={"lr": 1e-2, "batch": {"rows": 6}, "epochs": STEPS / 4 + 0.01, "max_steps": STEPS},
        checkpoint={"every": {"steps": 10}}, evaluate={"every": {"steps": 20}},
    )  # fmt: skip
    return write(tmp_path, {"method.r": [2, 4], "optim.lr": [1e-2, 1e30]}, search="grid", stop="none")


def write(directory: Path, space: dict[str, Any], **blocks: Any) -> Path:
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": "run/run.yaml", "space": space, **blocks}, sort_keys=False))
    return file


@contextmanager
def sweeping(place: Place, *arguments: str) -> Iterator[tuple[Sweep, subprocess.Popen[str]]]:
    """A sweep's driver in a process of its own, ended at the end whatever happens."""
    with driving(place, "jobs.sweep", *arguments, found=lambda: list_sweeps(place.settings.home)) as process:
        yield list_sweeps(place.settings.home)[-1], process


def swept(place: Place, *arguments: str) -> str:
    """What a sweep's driver printed, to its good end."""
    with sweeping(place, *arguments) as (_, driver):
        output = driver.communicate(timeout=DEADLINE_S)[0]
    assert driver.returncode == 0, output[-3000:]
    return output


def look(sweep: Sweep) -> list[Trial]:
    return Trials(sweep, sweep.resolved()).look()


def states(sweep: Sweep) -> list[TrialState]:
    return [trial.state for trial in look(sweep)]


def newest_run_has_a_checkpoint(place: Place, num_runs: int) -> bool:
    runs = list_runs(place.settings.home)
    return len(runs) == num_runs and bool(checkpoints(runs[-1]))


@pytest.mark.long
def test_a_sweep_goes_on_after_its_driver_was_killed_and_after_ctrl_c_and_never_repeats_a_trial(
    place: Place, sweep_file: Path
) -> None:
    with sweeping(place, str(sweep_file), "--set", "search.parallel=1") as (sweep, driver):
        wait_until(lambda: newest_run_has_a_checkpoint(place, 3), "the third trial has a checkpoint")
        driver.send_signal(signal.SIGKILL)
    first, diverged, killed, waiting = look(sweep)
    assert (first.state, diverged.state, waiting.state) == (TrialState.FINISHED, TrialState.FAILED, TrialState.WAITING)
    assert "loss nan" in diverged.why or "gradient norm" in diverged.why  # alone: the others go on
    assert killed.run
    run = Run(place.settings.home, killed.run)
    ended = {one.run: Run(place.settings.home, str(one.run)).status() for one in (first, diverged)}

    with sweeping(place, "--resume", sweep.id) as (_, driver):
        wait_until(lambda: run.status().details.get("attempt") == 2 and bool(run.events()), "it goes on")
        wait_until(lambda: any(event["kind"] == "resumed" for event in run.events()), "from its checkpoint")
        driver.send_signal(signal.SIGINT)
        output = driver.communicate(timeout=DEADLINE_S)[0]
    assert driver.returncode == 0, output[-3000:]
    assert f"Go on: loray sweep --resume {sweep.id}" in output
    assert sweep.status().state is RunState.STOPPED

    output = place.run(sys.executable, "-m", "service.cli.app", "sweep", "--resume", "latest")
    assert states(sweep) == [TrialState.FINISHED, TrialState.FAILED, TrialState.FINISHED, TrialState.FAILED]
    assert {one: Run(place.settings.home, str(one)).status() for one in ended} == ended
    assert len(list_runs(place.settings.home)) == 4
    assert "ray" not in output.lower().replace(str(place.settings.cache), "")  # Tune's own noise stays away
    model = sweep.status().details["model"]
    assert model == "small@1" and f"published as {model}" in output
    names = storage.list_names(sweep.uri)
    assert {"leaderboard.md", "leaderboard.json", "metric.png", "parallel.png"} <= set(names)
    shown = json.loads(place.run(sys.executable, "-m", "service.cli.app", "sweep", "show", "latest", "--json"))
    assert shown["best"] in (1, 3) and [row["state"] for row in shown["trials"]].count("failed") == 2
    curve = [point["step"] for row in shown["trials"] if row["trial"] == 3 for point in row["curve"]]
    assert curve == list(range(20, STEPS + 1, 20))


@pytest.mark.longer
@pytest.mark.long
def test_weak_trials_are_stopped_with_a_checkpoint_and_say_why(place: Place, sweep_file: Path, tmp_path: Path) -> None:
    space = {"optim.lr": [1e-2, 1e-5, 1e-6]}  # the best one first, so that the others are worse than what was before
    file = write(tmp_path, space, search="grid", stop={"type": "asha", "factor": 2, "grace": 0.25})
    output = swept(place, str(file), "--set", "search.parallel=1")
    (sweep,) = list_sweeps(place.settings.home)
    best, *weak = look(sweep)
    assert best.state is TrialState.FINISHED
    for trial in weak:
        assert trial.state is TrialState.STOPPED and trial.why.startswith(EARLY)
        assert trial.run and STEPS > checkpoints(Run(place.settings.home, trial.run))[-1] >= STEPS / 4
        assert 0 < trial.tokens < best.tokens
    assert f"trial 2 stopped after step {weak[0].step}" in output
    processes = {event["text"] for trial in (best, *weak) for event in _worker_events(place, trial)}
    assert len(processes) == 1  # the workers stay
    rows = Run(place.settings.home, str(best.run)).metrics()
    assert {name for row in rows for name in row} - {"step"} <= set(METRICS)


@pytest.mark.long
def test_eight_trials_of_the_tickets_recipe_go_on_after_a_kill_and_are_ranked_and_drawn(
    place: Place, base: Path
) -> None:
    own = {
        "model": base,
        "search.trials": 8,
        "scale.workers": 1,
        "optim.max_steps": 32,
        "precision": "fp32",
        "search.parallel": 1,
    }
    sets = [part for key, value in own.items() for part in ("--set", f"{key}={value}")]
    with sweeping(place, "jobs/recipes/tickets-sweep.yaml", *sets) as (sweep, driver):
        wait_until(lambda: len(list_runs(place.settings.home)) >= 3, "two trials have ended, and the third has begun")
        driver.send_signal(signal.SIGKILL)
    ended = {trial.number: trial for trial in look(sweep) if trial.state in ENDED}
    output = swept(place, "--resume", sweep.id)
    trials = look(sweep)
    assert [trial.number for trial in trials] == list(range(1, 9))
    assert all(trial.state in (TrialState.FINISHED, TrialState.STOPPED) for trial in trials)
    assert {number: trials[number - 1] for number in ended} == ended
    assert any(trial.state is TrialState.STOPPED for trial in trials)
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED]
    best = min(finished, key=lambda trial: trial.value or 0.0)
    assert f"Best: trial {best.number}, published as tickets@1" in output
    shown = place.loray("sweep", "show", sweep.id)
    for name in ("leaderboard.md", "metric.png", "parallel.png", "importance.png"):
        assert sweep.path(name) in shown.replace("\n", "")
    assert storage.read_bytes(sweep.path("metric.png")).startswith(b"\x89PNG")
    for trial in trials:
        known = trial.number in ended or trial.number == 3
        assert (f"before this: trial {trial.number} " if known else f"trial {trial.number} begins") in output
        assert trial.changes["method.alpha"] in (trial.changes["method.r"], 2 * trial.changes["method.r"])


@pytest.mark.longer
@pytest.mark.long
def test_a_weak_member_of_a_population_takes_over_a_strong_ones_checkpoint(
    place: Place, sweep_file: Path, tmp_path: Path
) -> None:
    file = write(
        tmp_path, {"optim.lr": {"log": [1e-6, 1e-2]}}, search={"trials": 2, "seed": 1},
        stop={"type": "pbt", "every": 0.4, "quantile": 0.5},
    )  # fmt: skip
    longer = ("--set", "optim.max_steps=240", "--set", "optim.epochs=61")  # so that both train at the same time
    swept(place, str(file), *longer)
    (sweep,) = list_sweeps(place.settings.home)
    assert states(sweep) == [TrialState.FINISHED] * 2
    taken = [one for record in sweep.records() for one in record.runs if one.source]
    assert taken, "no member took over another's checkpoint"
    for one in taken:
        donor, run = Run(place.settings.home, one.source), Run(place.settings.home, one.run)
        ratio = one.draw["optim.lr"] / donor.resolved()["config"]["optim"]["lr"]
        assert (
            ratio == pytest.approx(0.8, rel=1e-3)
            or ratio == pytest.approx(1.25, rel=1e-3)
            or one.draw["optim.lr"] == 1e-2
        )
        before = [row for row in donor.metrics() if row["step"] <= one.source_step]
        assert [row["train/loss"] for row in run.metrics()[: one.source_step]] == [row["train/loss"] for row in before]
    place.loray("runs", "ledger", taken[-1].run, "--check")


@pytest.mark.longer
@pytest.mark.long
def test_a_search_that_learns_ends_with_its_budget(place: Place, sweep_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = {"algorithm": "tpe", "trials": 8, "budget": {"tokens": 20_000}, "parallel": 2}
    file = write(tmp_path, {"optim.lr": {"log": [1e-4, 1e-1]}, "method.r": [2, 4]}, search=search, stop="none")
    output = swept(place, str(file), "--set", f"optim.max_steps={STEPS}")
    (sweep,) = list_sweeps(place.settings.home)
    assert "the budget of 20,000 tokens is spent" in output
    begun, trials = len(sweep.records()), look(sweep)
    assert begun < 8 and sum(trial.tokens for trial in trials) >= 20_000
    assert sweep.status().state is RunState.STOPPED, "it may go on"
    more = ("--set", "search.budget=null", "--set", f"search.trials={begun + 1}")
    swept(place, "--resume", sweep.id, *more)
    assert states(sweep) == [TrialState.FINISHED] * (begun + 1) and sweep.status().state is RunState.SUCCEEDED


@pytest.mark.longer
@pytest.mark.long
def test_on_s3_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(
    place: Place, sweep_file: Path, tmp_path: Path, s3_home: str
) -> None:
    environment = {name: value for name, value in place.environment.items() if name != "RAY_ADDRESS"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    on_s3 = Place("", Settings(s3_home, place.settings.cache), {**environment, "LORAY_HOME": s3_home}, place.run_file)
    file = write(tmp_path, {"method.r": [2, 4]}, search="grid", stop="none")
    longer = ("--set", "optim.max_steps=300", "--set", "optim.epochs=76", "--set", "checkpoint.every.steps=50")
    with sweeping(on_s3, str(file), "--set", "search.parallel=1", *longer) as (sweep, driver):
        wait_until(lambda: newest_run_has_a_checkpoint(on_s3, 1), "the first trial has a checkpoint")
        own = psutil.Process(driver.pid).children(recursive=True)
        (worker,) = [process for process in own if "RayTrainWorker" in " ".join(process.cmdline())]
        worker.send_signal(signal.SIGKILL)
        output = driver.communicate(timeout=DEADLINE_S)[0]
    assert driver.returncode == 0, output[-3000:]
    first, second = look(sweep)
    assert (first.state, second.state) == (TrialState.FINISHED, TrialState.FINISHED)
    run = Run(s3_home, str(first.run))
    assert any(event["kind"] == "resumed" for event in run.events())
    assert run.status().details["attempt"] == 2
    assert sweep.status().details["model"] == "small@1"
    assert "leaderboard.md" in storage.list_names(sweep.uri)


@pytest.mark.long
def test_trials_on_one_copy_of_the_base_are_runs_like_others_and_a_stopped_one_makes_room(
    place: Place, sweep_file: Path, tmp_path: Path
) -> None:
    space = {"optim.lr": [1e-2, 1e-5, 1e30]}
    file = write(tmp_path, space, search={"algorithm": "grid", "parallel": 2}, stop={"factor": 2, "grace": 0.25})
    output = swept(place, str(file), "--set", "search.share_base=true")
    (sweep,) = list_sweeps(place.settings.home)
    best, weak, diverged = look(sweep)
    assert "2 at a time on one copy of the base" in output
    assert (best.state, diverged.state) == (TrialState.FINISHED, TrialState.FAILED)
    assert weak.state in (TrialState.STOPPED, TrialState.FINISHED)  # whether it was measured first is chance
    processes = {event["text"].split("process ")[1] for trial in look(sweep) for event in _worker_events(place, trial)}
    assert len(processes) == 1
    assert sweep.status().details["model"] == "small@1"


@pytest.mark.longer
@pytest.mark.long
def test_trials_on_one_base_go_on_after_their_worker_was_killed_and_after_ctrl_c(
    place: Place, sweep_file: Path, tmp_path: Path
) -> None:
    file = write(tmp_path, {"optim.lr": [1e-2, 5e-3]}, search="grid", stop="none")
    with sweeping(place, str(file), "--set", "search.share_base=true") as (sweep, driver):
        runs = _runs_with_checkpoints(place, 2)
        (pid,) = {event["text"].split("process ")[1] for trial in look(sweep) for event in _worker_events(place, trial)}
        os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: all(run.status().details.get("attempt") == 2 for run in runs), "both have lost their worker")
        wait_until(lambda: all(any(e["kind"] == "resumed" for e in run.events()) for run in runs), "and go on")
        driver.send_signal(signal.SIGINT)
        output = driver.communicate(timeout=DEADLINE_S)[0]
    assert driver.returncode == 0 and f"Go on: loray sweep --resume {sweep.id}" in output, output[-3000:]
    swept(place, "--resume", sweep.id)
    assert states(sweep) == [TrialState.FINISHED, TrialState.FINISHED]
    assert [run.id for run in list_runs(place.settings.home)] == [run.id for run in runs]
    for run in runs:
        place.loray("runs", "ledger", run.id, "--check")


def _runs_with_checkpoints(place: Place, count: int) -> list[Run]:
    home = place.settings.home
    wait_until(lambda: len([run for run in list_runs(home) if checkpoints(run)]) == count, f"{count} have checkpoints")
    return list_runs(home)


def _worker_events(place: Place, trial: Trial) -> list[dict[str, Any]]:
    events = Run(place.settings.home, str(trial.run)).events()
    return [event for event in events if event["kind"] == "worker"]


def test_bad_input_is_told_before_a_sweep_exists(place: Place, sweep_file: Path) -> None:
    output = place.run(
        sys.executable, "-m", "jobs.sweep", str(sweep_file), "--set", "search.metric=eval/accuracy", expect=2
    )
    assert "no run reports 'eval/accuracy'" in output
    with pytest.raises(NotFoundError):
        Sweep.open(place.settings.home, "latest")


def test_earlier_measurements_decide_for_new_trials_and_nothing_twice(place: Place, sweep_file: Path) -> None:
    from tune.tuner import _Asha

    resolved = load_sweep(str(sweep_file), ["stop=asha"])
    sweep = Sweep.create(place.settings.home, "small", resolved)
    asha = _Asha(sweep, resolved, resolved.config.stop)  # type: ignore[arg-type]
    curve = ((0.1, 1.0), (0.5, 0.5))
    asha.remember([Trial(1, {}, TrialState.FINISHED, "", "run", 60, STEPS, 0, curve, (12, 60), None)])
    run = Run.create(place.settings.home, "trial-2", "", {})
    sweep.write_record(TrialRecord(number=2, draw={}, runs=(TrialRun(run=run.id, draw={}),)))
    asha.on_trial_add(None, (trial := _StandIn("new")))
    replayed = {"progress": 0.1, "value": 9.0, "replayed": True}
    assert asha.on_trial_result(None, trial, replayed) == "CONTINUE"
    assert run.stop_requested() is None  # an earlier driver has let it go on
    assert asha.on_trial_result(None, trial, {"progress": 0.5, "value": 9.0, "replayed": False}) == "CONTINUE"
    reason = run.stop_requested()
    assert reason and reason.startswith(EARLY) and "eval/loss 9 after 50%" in reason


@dataclass
class _StandIn:
    """What the scheduler needs of Tune's trial: an id, and its name, which is the number."""

    trial_id: str

    def __str__(self) -> str:
        return "2"
