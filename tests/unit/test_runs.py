"""Run directories, on a directory and on S3."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from service import storage
from service.domain import RunState
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError
from service.logs import LogWriter
from service.runs import DRIVER_KILLED, Run, list_runs, next_state_allowed
from service.status import this_process

pytest_plugins = ("tests.s3_endpoint",)


def _run(home: str, name: str = "tickets") -> Run:
    return Run.create(home, name, "model: x\n", {"model": "x", "optim": {"lr": 1e-4}})


def _log(run: Run, kind: str, writer: str, *rows: dict[str, object]) -> None:
    with LogWriter(run.path(kind), writer) as log:
        for row in rows:
            log.append(row)


def test_a_run_is_created_whole_and_opened_by_id(home: str) -> None:
    run = _run(home)
    opened = Run.open(home, run.id)
    assert opened == run
    assert opened.run_yaml() == "model: x\n"
    assert opened.resolved() == {"model": "x", "optim": {"lr": 1e-4}}
    assert opened.status().state == RunState.CREATED


def test_a_proposed_stop_gives_way_to_one_that_was_asked_for(home: str) -> None:
    run = _run(home)
    run.propose_stop("moving")
    assert run.stop_requested() == "moving"
    run.withdraw_stop("moving")
    assert run.stop_requested() is None
    run.propose_stop("moving again")
    run.request_stop("by a person")
    run.propose_stop("moving")
    run.withdraw_stop("moving again")
    assert run.stop_requested() == "by a person"


def test_ids_sort_by_time_even_within_a_second(home: str) -> None:
    runs = [_run(home, name) for name in ("c", "a-b", "b")]
    assert list_runs(home) == runs
    assert Run.open(home, "latest") == runs[-1]


def test_runs_created_at_once_are_distinct(home: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: _run(home), range(8)))
    assert len(set(runs)) == 8 and set(list_runs(home)) == set(runs)


def test_an_unknown_run_is_answered_with_the_nearest(home: str) -> None:
    with pytest.raises(NotFoundError, match=r"0 runs are there.*loray runs list"):
        Run.open(home, "latest")
    run = _run(home)
    with pytest.raises(NotFoundError, match=f"the nearest is {run.id}"):
        Run.open(home, run.id[:-1])
    with pytest.raises(ConfigError, match="run name"):
        _run(home, "../x")


def test_a_run_lives_from_created_to_its_end(home: str) -> None:
    run = _run(home)
    run.set_state(RunState.RUNNING, job_id="raysubmit_1")
    run.heartbeat(step=7)
    status = run.status()
    assert (status.state, status.step, status.details) == (RunState.RUNNING, 7, {"job_id": "raysubmit_1"})
    run.set_state(RunState.SUCCEEDED, "published tickets@1", step=9)
    run.heartbeat(step=8)  # a thread that was late
    status = run.status(datetime.now(UTC) + timedelta(days=1))
    assert (status.state, status.step, status.message) == (RunState.SUCCEEDED, 9, "published tickets@1")
    with pytest.raises(ConflictError, match=r"is succeeded .* cannot become running"):
        run.set_state(RunState.RUNNING)


def test_a_silent_running_run_reads_as_lost_and_can_be_resumed(home: str) -> None:
    run = _run(home)
    run.set_state(RunState.RUNNING)
    now = datetime.now(UTC)
    assert run.status(now + timedelta(seconds=50)).state == RunState.RUNNING
    lost = run.status(now + timedelta(seconds=90))
    assert lost.state == RunState.LOST and "no heartbeat" in lost.message
    with pytest.raises(ConflictError, match="cannot become running"):
        run.set_state(RunState.RUNNING)
    old = run.status().model_copy(update={"updated_at": (now - timedelta(seconds=90)).isoformat()})
    storage.write_bytes(run.path("status.json"), old.model_dump_json().encode())
    assert run.set_state(RunState.RUNNING).state == RunState.RUNNING


def test_a_driver_that_comes_back_after_another_has_gone_on_changes_nothing(home: str) -> None:
    run = _run(home)
    cut_off = {**this_process(), "host": "elsewhere"}
    run.set_state(RunState.RUNNING, attempt=1, **cut_off)
    for late in (run.heartbeat, lambda: run.set_state(RunState.SUCCEEDED), lambda: run.set_state(RunState.FAILED)):
        before = storage.read_bytes(run.path("status.json"))
        with pytest.raises(ConflictError, match=f"driven by process {os.getpid()} on elsewhere now"):
            late()
        assert storage.read_bytes(run.path("status.json")) == before
    run.declare_dead()
    assert (run.status().state, run.status().details["error"]) == (RunState.FAILED, DRIVER_KILLED)
    run.set_state(RunState.RUNNING, attempt=2, **this_process())
    run.heartbeat(step=3)
    assert run.set_state(RunState.SUCCEEDED).step == 3


def test_transitions_are_those_of_the_picture() -> None:
    allowed = {(a, b) for a in RunState for b in RunState if next_state_allowed(a, b)}
    ends = {RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED}
    assert allowed == (
        {(RunState.CREATED, s) for s in (RunState.RUNNING, RunState.FAILED, RunState.STOPPED)}
        | {(RunState.RUNNING, s) for s in ends}
        | {(RunState.LOST, s) for s in {*ends, RunState.RUNNING}}
        | {(RunState.FAILED, RunState.RUNNING), (RunState.STOPPED, RunState.RUNNING)}
    )


def test_heartbeats_and_a_state_change_at_once_lose_neither(home: str) -> None:
    run = _run(home)
    run.set_state(RunState.RUNNING)
    with ThreadPoolExecutor(4) as pool:
        beats = [pool.submit(run.heartbeat, **{f"k{n}": n}) for n in range(8)]
        for beat in beats:
            beat.result()
        pool.submit(run.set_state, RunState.FAILED, "out of memory").result()
    assert run.status().state == RunState.FAILED
    assert run.status().details == {f"k{n}": n for n in range(8)}


def test_a_run_whose_creator_was_killed_early_reads_as_created(home: str) -> None:
    run = _run(home)
    storage.delete_tree(run.path("status.json"))
    assert run.status().state == RunState.CREATED
    run.set_state(RunState.FAILED, "never started")
    assert run.status().state == RunState.FAILED
    with pytest.raises(NotFoundError):
        Run(home, "20260101-000000-x-0000").status()


def test_a_damaged_status_is_named(home: str) -> None:
    run = _run(home)
    storage.write_bytes(run.path("status.json"), b"{}")
    with pytest.raises(StorageError, match=r"status\.json is no run status"):
        run.status()


def test_a_stop_is_asked_for_seen_and_cleared(home: str) -> None:
    run = _run(home)
    assert run.stop_requested() is None
    run.request_stop("SIGTERM")
    assert Run.open(home, run.id).stop_requested() == "SIGTERM"
    run.clear_stop()
    run.clear_stop()
    assert run.stop_requested() is None


def test_metrics_of_ranks_merge_and_the_last_attempt_wins(home: str) -> None:
    run = _run(home)
    _log(run, "metrics", "a1-r0", {"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0, "old": 1})
    _log(run, "metrics", "a1-r1", {"step": 1, "memory/peak_bytes": 5, "train/loss": 9.0})
    _log(run, "metrics", "a2-r0", {"step": 2, "train/loss": 2.5}, {"step": 2, "eval/loss": 2.2})
    _log(run, "metrics", "a10-r0", {"step": 3, "train/loss": 1.0})
    assert run.metrics() == [
        {"step": 1, "train/loss": 3.0, "memory/peak_bytes": 5},
        {"step": 2, "train/loss": 2.5, "eval/loss": 2.2},
        {"step": 3, "train/loss": 1.0},
    ]


def test_the_ledger_joins_ranks_and_drops_redone_steps(home: str) -> None:
    run = _run(home)
    _log(run, "ledger", "a1-r0", {"step": 1, "ids": [0, 1]}, {"step": 2, "ids": [4]})
    _log(run, "ledger", "a1-r1", {"step": 1, "ids": [2, 3]}, {"step": 2, "ids": [5]})
    _log(run, "ledger", "a2-r0", {"step": 2, "ids": [4, 5]})
    assert run.ledger() == [{"step": 1, "ids": [0, 1, 2, 3]}, {"step": 2, "ids": [4, 5]}]


def test_a_writer_of_another_name_is_not_dropped_in_silence(home: str) -> None:
    run = _run(home)
    _log(run, "metrics", "driver", {"step": 1})
    with pytest.raises(StorageError, match="a<attempt>-r<rank>"):
        run.metrics()


def test_events_come_in_order_of_time(home: str) -> None:
    run = _run(home)
    _log(run, "events", "a", {"time": "2026-01-01T00:00:02", "event": "second"})
    _log(run, "events", "b", {"time": "2026-01-01T00:00:01", "event": "first"})
    assert [row["event"] for row in run.events()] == ["first", "second"]
