"""A run that may have been begun by a driver on another host: gone on with, waited for, or left alone."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import train
from service import status, storage
from service.domain import RunState
from service.errors import ConflictError, NotFoundError
from service.runs import Run
from service.status import LOST_AFTER_S
from service.training import driver
from tests.unit.run_files import SMALL

ID = "20260101-000000-tickets-0001"
ELSEWHERE: dict[str, Any] = {"pid": 1, "born": "long ago", "host": "gone"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One whose driver is on another host and was heard a moment less than it takes to be lost ago."""
    monkeypatch.setattr(status, "LOOK_EVERY_S", 0.01)
    run = Run.create(str(tmp_path), "tickets", "", {}, id=ID)
    run.set_state(RunState.RUNNING, **ELSEWHERE)
    heard = datetime.now(UTC) - timedelta(seconds=LOST_AFTER_S - 0.3)
    then = run.status().model_copy(update={"updated_at": heard.isoformat()})
    storage.write_bytes(run.path("status.json"), then.model_dump_json().encode())
    return run


@pytest.fixture
def being_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "this_process", lambda: ELSEWHERE)


def test_there_is_nothing_to_go_on_with_at_first(tmp_path: Path) -> None:
    assert driver.reopen_if_begun(str(tmp_path), ID) is None


def test_one_that_was_killed_while_it_was_written_down_is_begun_anew(tmp_path: Path) -> None:
    half = Run(str(tmp_path), ID)
    storage.write_bytes(half.path("run.yaml"), b"model: x\n")
    assert driver.reopen_if_begun(half.home, ID) is None
    with pytest.raises(NotFoundError, match=f"Run {ID} was never begun"):
        driver.reopen(half.home, ID)
    before = Run.create(half.home, "tickets", "model: x\n", {}, id="20250101-000000-tickets-0001")
    assert driver.reopen(half.home, "latest") == before
    (tmp_path / "run.yaml").write_text("model: x\n")
    assert driver.newest_run_of(half.home, str(tmp_path / "run.yaml")) == before.id
    run = Run.create(half.home, "tickets", "model: y\n", {"model": "y"}, id=ID)
    assert (run.run_yaml(), run.resolved()) == ("model: y\n", {"model": "y"})
    with pytest.raises(ConflictError, match="exists already"):
        Run.create(half.home, "tickets", "", {}, id=ID)


def test_a_driver_that_died_with_its_node_is_waited_for(run: Run) -> None:
    assert run.status().state is RunState.RUNNING
    assert driver.reopen_if_begun(run.home, ID) == run
    assert run.status().state is RunState.FAILED, "and may run again"


@pytest.mark.usefixtures("being_its_driver")
def test_a_driver_that_is_heard_again_keeps_its_run(run: Run) -> None:
    beat = threading.Timer(0.05, run.heartbeat)
    beat.start()
    with pytest.raises(ConflictError, match="is running"):
        driver.reopen_if_begun(run.home, ID)
    beat.join()


@pytest.mark.usefixtures("being_its_driver")
@pytest.mark.parametrize("state", [RunState.STOPPED, RunState.FAILED, RunState.SUCCEEDED])
def test_one_that_has_ended_is_returned_at_once(run: Run, state: RunState) -> None:
    run.set_state(state)
    assert driver.reopen_if_begun(run.home, ID) == run
    assert run.status().state is state


@pytest.mark.usefixtures("being_its_driver")
def test_a_job_that_is_started_again_after_its_run_has_succeeded_has_nothing_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the operator does where it has not heard of the end. A job that goes on: tests/integration/test_nodes.py."""
    run.set_state(RunState.SUCCEEDED)
    monkeypatch.setenv("LORAY_HOME", run.home)
    (tmp_path / "run.yaml").write_text(SMALL)
    (tmp_path / "run-id").write_text(f"{ID}\n")
    arguments = [str(tmp_path / "run.yaml"), "--run-id-file", str(tmp_path / "run-id")]
    assert train.main(arguments) == 0
    assert f"Run {ID} has succeeded already." in capsys.readouterr().out
    assert train.main([*arguments, "--set", "optim.rate=1"]) == 2, "a run file is read in any case"
    with pytest.raises(SystemExit):
        train.main([*arguments, "--run-id", ID])
