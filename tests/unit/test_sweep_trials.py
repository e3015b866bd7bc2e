"""How trials stand, which is best, what mattered, what is shown: from runs' directories and from plain values."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from service.config_blocks import RunConfig
from service.domain import RunState
from service.errors import ConfigError
from service.logs import LogWriter
from service.runs import DRIVER_KILLED, Run, RunStatus
from service.sweep_config import AshaBlock, Budget, Dimension, NoStopBlock, PbtBlock, SearchBlock, SweepConfig
from tune import leaderboard, plots
from tune.directory import Sweep, TrialRecord, TrialRun
from tune.sweep import over_budget, reopen, trials_at_once
from tune.sweep_file import ResolvedSweep
from tune.table import SweepView, best_so_far, news, seconds_left
from tune.trial import _came_from, never_stops, set_in_trials
from tune.trials import EARLY, Trial, Trials, TrialState, trial_state

pytest_plugins = ("tests.s3_endpoint",)
PNG = b"\x89PNG\r\n\x1a\n"


def trial(
    number: int, values: list[float], state: TrialState = TrialState.FINISHED, changes: dict[str, Any] | None = None
) -> Trial:
    """A trial of ten steps with so many measurements, one a step."""
    steps = tuple(range(1, len(values) + 1))
    curve = tuple((step / 10, value) for step, value in zip(steps, values, strict=True))
    return Trial(
        number, changes or {}, state, "", f"run-{number}", len(values), 10, 100 * len(values), curve, steps, 1.0
    )


def status(state: RunState, message: str = "", **details: Any) -> RunStatus:
    return RunStatus(state=state, created_at="", updated_at="", message=message, details=details)


@pytest.mark.parametrize(
    ("run", "state"),
    [
        (None, TrialState.WAITING),
        (status(RunState.RUNNING), TrialState.RUNNING),
        (status(RunState.LOST), TrialState.INTERRUPTED),
        (status(RunState.SUCCEEDED), TrialState.FINISHED),
        (status(RunState.STOPPED, f"{EARLY}not among the best"), TrialState.STOPPED),
        (status(RunState.STOPPED, "SIGINT at the driver"), TrialState.INTERRUPTED),
        (status(RunState.FAILED, "loss nan", error="TrainingError"), TrialState.FAILED),
        (status(RunState.FAILED, "gone", error="WorkerLostError"), TrialState.INTERRUPTED),
        (status(RunState.FAILED, "gone", error=DRIVER_KILLED), TrialState.INTERRUPTED),
    ],
)
def test_only_what_a_trial_itself_came_to_is_its_end(run: RunStatus | None, state: TrialState) -> None:
    assert trial_state("", run) is state
    assert trial_state("ConfigError: no such thing", run) is TrialState.FAILED


def test_a_trial_is_read_from_its_runs(home: str) -> None:
    resolved = ResolvedSweep(SweepConfig(), {}, {"model": "base"}, "base: run.yaml\n")
    sweep = Sweep.create(home, "tickets", resolved)
    first, second = (Run.create(home, "trial-1", "", {}) for _ in range(2))
    rows = {  # the second began at step 2 of another trial's run: those rows have no tokens of its own
        first: [("a1-r0", {"step": 1, "eval/loss": 3.0, "train/tokens": 10.0})],
        second: [
            ("a0-r0", {"step": 2, "eval/loss": 2.5}),
            ("a1-r0", {"step": 3, "eval/loss": 9.0, "train/tokens": 10.0}),
            ("a2-r0", {"step": 3, "eval/loss": 2.0, "train/tokens": 10.0}),
        ],
    }
    for run, written in rows.items():
        for writer, row in written:
            with LogWriter(run.path("metrics"), writer) as log:
                log.append(row)
    second.set_state(RunState.RUNNING, num_steps=4)
    runs = tuple(TrialRun(run=run.id, draw={}) for run in (first, second))
    sweep.write_record(TrialRecord(number=1, draw={}, runs=runs))
    sweep.write_record(TrialRecord(number=2, draw={}))
    found = Trials(Sweep.open(home, "latest"), sweep.resolved()).look()
    assert [one.state for one in found] == [TrialState.RUNNING, TrialState.WAITING]
    assert found[0].curve == ((0.5, 2.5), (0.75, 2.0))  # of two attempts at a step the later stands
    assert (found[0].tokens, found[0].step, found[0].run) == (30, 3, second.id)  # what was read again was read twice
    assert found[0].value == 2.0
    second.set_state(RunState.SUCCEEDED, step=2)
    (finished, _) = Trials(sweep, sweep.resolved()).look()
    assert finished.value == 2.5, "its model is that of step 2, and so is what it is ranked by"


def test_an_early_stop_that_a_run_did_not_hear_is_asked_for_again(home: str) -> None:
    from tune import tuner
    from tune.shared import _Name

    resolved = ResolvedSweep(SweepConfig(stop=AshaBlock(factor=2, grace=0.25)), {}, {"model": "base"}, "")
    sweep = Sweep.create(home, "tickets", resolved)
    runs, names = [Run.create(home, "trial", "", {}) for _ in range(2)], [_Name("1"), _Name("2")]
    rule = tuner.scheduler(sweep, resolved, [])
    for number, run in enumerate(runs, start=1):
        run.set_state(RunState.RUNNING)
        sweep.write_record(TrialRecord(number=number, draw={}, runs=(TrialRun(run=run.id, draw={}),)))
        rule.on_trial_add(None, names[number - 1])
    runs[1].request_stop("another node has room")
    for name, value in zip(names, (1.0, 9.0), strict=True):
        rule.on_trial_result(None, name, {"progress": 0.25, "value": value, "replayed": False})
    assert runs[1].stop_requested() == "another node has room"
    runs[1].clear_stop()
    rule.on_trial_result(None, names[0], {"progress": 0.5, "value": 0.9, "replayed": False})
    assert str(runs[1].stop_requested()).startswith(EARLY) and runs[0].stop_requested() is None


def test_a_measurement_at_the_very_share_of_a_rung_is_judged(home: str) -> None:
    """0.1 * 3 is a little more than 3 / 10."""
    from tune import tuner
    from tune.shared import _Name

    resolved = ResolvedSweep(SweepConfig(stop=AshaBlock(factor=3, grace=0.1)), {}, {"model": "base"}, "")
    sweep = Sweep.create(home, "tickets", resolved)
    rule = tuner.scheduler(sweep, resolved, [])
    for number, value in enumerate((1.0, 1.1, 9.0), start=1):
        run = Run.create(home, "trial", "", {})
        run.set_state(RunState.RUNNING)
        sweep.write_record(TrialRecord(number=number, draw={}, runs=(TrialRun(run=run.id, draw={}),)))
        rule.on_trial_add(None, _Name(str(number)))
        for progress, measured in ((0.1, 1.0 / number), (3 / 10, value)):
            result = {"progress": progress, "value": measured, "replayed": False}
            rule.on_trial_result(None, _Name(str(number)), result)
    assert str(run.stop_requested()).startswith(EARLY)


def test_a_grid_that_goes_on_takes_no_other_number_of_trials(home: str) -> None:
    config = SweepConfig(search=SearchBlock(algorithm="grid"))
    sweep = Sweep.create(home, "tickets", ResolvedSweep(config, {}, {"model": "base"}, ""))
    with pytest.raises(ConfigError, match=r"search.trials: 2, and a grid tries all its values"):
        reopen(home, sweep.id, ["search.trials=2"])


def test_a_budget_is_taken_away_with_null(home: str) -> None:
    config = SweepConfig(search=SearchBlock(budget=Budget(tokens=100)))
    base = {"model": "base", "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"}}
    sweep = Sweep.create(home, "tickets", ResolvedSweep(config, {}, base, ""))
    _, resolved = reopen(home, sweep.id, ["search.budget=null"])
    assert resolved.config.search.budget == Budget() and sweep.resolved() == resolved


def test_a_search_that_goes_on_suggests_what_it_has_not_suggested_yet(home: str) -> None:
    """Optuna draws at random until it has measurements enough: the same seed again would be the same draws again."""
    pytest.importorskip("optuna")
    from tune import tuner

    def suggested(sweep: Sweep, count: int) -> list[float]:
        first = len(sweep.records()) + 1
        search = tuner._search(sweep, resolved, tuner.Queue((), range(first, first + count)), [])
        assert search
        return [search.suggest(str(n))["trial"]["draw"]["optim.lr"] for n in range(count)]  # type: ignore[index, misc]

    space = {"optim.lr": Dimension(log=(1e-5, 1e-2))}
    resolved = ResolvedSweep(SweepConfig(search=SearchBlock(algorithm="tpe", seed=3)), space, {"model": "base"}, "")
    sweep, again = (Sweep.create(home, "tickets", resolved) for _ in range(2))
    first = suggested(sweep, 3)
    assert suggested(again, 3) == first, "a seed makes a sweep repeatable"
    assert len({*first, *suggested(sweep, 3)}) == 6
    assert [record.number for record in sweep.records()] == [1, 2, 3, 4, 5, 6]


def test_a_stop_keeps_its_first_reason_until_it_is_forgotten(home: str) -> None:
    sweep = Sweep.create(home, "tickets", ResolvedSweep(SweepConfig(), {}, {"model": "base"}, ""))
    assert sweep.stop_requested() is None
    sweep.request_stop("the budget is spent")
    sweep.request_stop("SIGINT")
    assert sweep.stop_requested() == "the budget is spent"
    sweep.clear_stop()
    assert sweep.stop_requested() is None


def test_only_a_finished_trial_is_the_best() -> None:
    trials = [
        trial(1, [3.0, 2.0]),
        trial(2, [3.0, 2.5]),
        trial(3, [1.0], TrialState.STOPPED),
        trial(4, [], TrialState.FAILED),
        trial(5, [4.0, 3.9, 3.8], TrialState.STOPPED),
    ]
    assert [one.number for one in leaderboard.ranked(trials, "min")] == [1, 2, 5, 3, 4]
    first = leaderboard.best(trials, "max")
    assert first and first.number == 2
    assert leaderboard.best(trials[2:], "min") is None
    assert "trial 3, eval/loss 1 at step 1" in best_so_far(trials, "eval/loss", "min")


def test_trials_are_compared_as_far_as_all_of_them_got() -> None:
    trials = [trial(1, [5.0, 1.0]), trial(2, [2.0], TrialState.STOPPED)]
    share, values = leaderboard.comparable(trials)
    assert (share, [value for _, value in values]) == (0.1, [5.0, 2.0])


def test_what_mattered_is_found_also_where_the_best_is_in_the_middle() -> None:
    rates, ranks = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], [4, 8]
    loss = {1e-5: 5.0, 1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.9, 1e-1: 5.2}
    pairs = [(rate, rank) for rate in rates for rank in ranks]
    trials = [
        trial(number, [loss[rate] + 0.01 * number % 3], changes={"optim.lr": rate, "method.r": rank, "seed": 0})
        for number, (rate, rank) in enumerate(pairs)
    ]
    found = leaderboard.importance(trials)
    assert set(found) == {"optim.lr", "method.r"}  # what never varied explains nothing
    assert found["optim.lr"] > 0.7 and found["method.r"] < 0.1
    assert leaderboard.importance(trials[:5]) == {}


def test_words_are_compared_by_the_means_of_their_groups() -> None:
    trials = [trial(n, [float(n % 2)], changes={"optim.schedule": ["cosine", "linear"][n % 2]}) for n in range(10)]
    assert leaderboard.importance(trials) == {"optim.schedule": pytest.approx(1.0)}


def test_the_leaderboard_has_every_trial_and_why_it_ended() -> None:
    stopped = dataclasses.replace(trial(2, [4.0], TrialState.STOPPED, changes={"method.r": 8}), why=f"{EARLY}no good")
    trials = [trial(1, [3.0, 2.0], changes={"optim.lr": 1e-3}), stopped]
    board = leaderboard.as_json(trials, "eval/loss", "min", "tickets@3")
    assert (board["best"], board["model"], board["tokens"]) == (1, "tickets@3", 300)
    page = leaderboard.page("Sweep x", board, "model: base\n")
    assert "| 1 | 1 | 0.001 | - | 2 | 2/10 | finished | 200 | run-1 |" in page
    assert f"- trial 2: {EARLY}no good" in page and "model: base" in page


def test_plots_are_drawn_of_one_trial_and_of_many() -> None:
    many = [
        trial(n, [1.0 + n, 2.0], changes={"optim.lr": 10.0**-n, "optim.schedule": "cosine", "seed": n})
        for n in range(1, 4)
    ]
    for trials in (many, many[:1]):
        assert plots.metric_by_step(trials, "eval/loss", "min").startswith(PNG)
        assert plots.parallel_coordinates(trials, "eval/loss", "max").startswith(PNG)
    assert plots.importance_bars({"optim.lr": 0.7}).startswith(PNG)


def test_what_is_new_about_a_trial_is_a_line_each() -> None:
    before = trial(1, [3.0], TrialState.RUNNING, changes={"optim.lr": 1e-3})
    after = dataclasses.replace(trial(1, [3.0, 2.0], TrialState.STOPPED), why=f"{EARLY}no good\nat all")
    assert news(None, before, "eval/loss") == [
        "trial 1 begins: optim.lr 0.001  (run run-1)",
        "trial 1  step 1/10  eval/loss 3.0000",
    ]
    assert news(before, after, "eval/loss") == [
        "trial 1  step 2/10  eval/loss 2.0000",
        f"trial 1 stopped after step 2, 200 tokens: {EARLY}no good",
    ]
    assert news(after, after, "eval/loss") == []


def test_the_time_left_goes_by_the_pace_since_the_driver_began() -> None:
    trials = [trial(1, [1.0]), trial(2, [1.0] * 5, TrialState.RUNNING)]
    assert seconds_left(trials, 4, 0.5, 10.0) == pytest.approx(25.0)  # 1.0 of 4 trials in 10 s, 2.5 to do
    assert seconds_left(trials, 4, 1.5, 10.0) is None


def test_without_a_terminal_the_stand_of_the_sweep_is_a_line_whenever_a_trial_has_ended() -> None:
    page = io.StringIO()
    with SweepView("eval/loss", "min", 2, Console(file=page)) as view:
        for first, second in (
            (TrialState.RUNNING, TrialState.WAITING),
            (TrialState.FINISHED, TrialState.RUNNING),
            (TrialState.FINISHED, TrialState.RUNNING),
            (TrialState.FINISHED, TrialState.STOPPED),
        ):
            view.show([trial(1, [3.0, 2.0], first), trial(2, [2.5], second)])
    stands = [line for line in page.getvalue().splitlines() if "trials ended" in line]
    assert len(stands) == 2
    assert all("best so far: trial 1, eval/loss 2 at step 2" in line and line.endswith("left") for line in stands)
    assert "1 of 2 trials ended, 300 tokens read" in stands[0] and "2 of 2 trials ended" in stands[1]


def test_what_an_earlier_driver_did_is_a_line_a_trial_and_not_told_as_if_it_happened_now() -> None:
    page = io.StringIO()
    before = [trial(1, [3.0, 2.0]), trial(2, [2.5], TrialState.INTERRUPTED), trial(3, [], TrialState.WAITING)]
    with SweepView("eval/loss", "min", 3, Console(file=page), before) as view:
        view.show([before[0], trial(2, [2.5, 2.25], TrialState.RUNNING), before[2]])
    assert page.getvalue().splitlines() == [
        "before this: trial 1 finished after step 2, 200 tokens, eval/loss 2",
        "before this: trial 2 interrupted after step 1, 100 tokens, eval/loss 2.5",
        "trial 2 goes on  (run run-2)",
        "trial 2  step 2/10  eval/loss 2.2500",
    ]


def test_a_budget_of_tokens_or_of_seconds_ends_a_sweep() -> None:
    search = SearchBlock(budget=Budget(tokens=100, seconds=60.0))
    assert over_budget(search, 99, 59.0) is None
    assert over_budget(search, 100, 0.0) == "the budget of 100 tokens is spent"
    assert over_budget(search, 0, 61.0) == "the budget of 60 s is spent"
    assert over_budget(SearchBlock(), 10**12, 10.0**9) is None


@pytest.mark.parametrize(
    ("asked", "fit", "nodes", "workers", "gpu", "at_once"),
    [
        (None, 8, 1, 1, True, 8),
        (None, 8, 1, 1, False, 1),
        (None, 8, 4, 2, False, 2),
        (16, 8, 1, 1, True, 8),
        (3, 0, 1, 4, False, 1),
    ],
)
def test_no_more_trials_run_at_once_than_have_room_for_all_their_workers(
    asked: int | None, fit: int, nodes: int, workers: int, gpu: bool, at_once: int
) -> None:
    assert trials_at_once(SearchBlock(parallel=asked), fit, nodes, workers, gpu) == at_once


def test_a_stopping_rule_gets_the_measurements_and_checkpoints_that_it_needs() -> None:
    config = RunConfig.model_validate({"model": "base", "data": {"train": "a", "eval": "b"}})
    sweeps = {
        rule: ResolvedSweep(SweepConfig(stop=rule), {}, {}, "") for rule in (AshaBlock(), PbtBlock(), NoStopBlock())
    }
    asha, pbt, none = (set_in_trials(sweep, config, 100) for sweep in sweeps.values())
    assert asha == {"evaluate.every.steps": 7}
    assert pbt == {"evaluate.every.steps": 13, "checkpoint.every.steps": 13, "checkpoint.keep_last": 4}
    assert none == {}
    often = RunConfig.model_validate(
        {"model": "b", "data": {"train": "a", "eval": "b"}, "evaluate": {"every": {"steps": 50}}}
    )
    assert [never_stops(sweep, often, 100) for sweep in sweeps.values()] == [None] * 3
    assert "evaluate.every.steps: 50, and a trial has 50 steps" in str(never_stops(sweeps[AshaBlock()], often, 50))
    assert never_stops(sweeps[NoStopBlock()], often, 50) is None


def test_a_trial_whose_actor_was_killed_does_not_take_the_same_checkpoint_again() -> None:
    adopted = TrialRun(run="c", draw={}, source="b", source_step=20)
    record = TrialRecord(number=1, draw={}, runs=(TrialRun(run="a", draw={}), adopted))
    assert _came_from(record, ("b", 20)) and _came_from(record, ("c", 40))
    assert not _came_from(record, ("b", 40)) and not _came_from(record, ("d", 20))
    assert not _came_from(TrialRecord(number=1, draw={}), ("b", 20))
