"""A sweep that may have been begun by a driver on another host: gone on with, waited for, or left alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import sweep as job
from service import status, storage
from service.domain import RunState
from service.errors import ConfigError, ConflictError, NotFoundError
from service.status import LOST_AFTER_S
from tests.unit.run_files import SMALL
from tune.directory import Sweep
from tune.sweep import reopen_if_begun
from tune.sweep_file import load_sweep

ID = "20260101-000000-tickets-0001"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A sweep file and the file of its id, as they lie in a pod."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    (tmp_path / "run.yaml").write_text(SMALL)
    block = {"base": "run.yaml", "space": {"optim.lr": [1e-4, 1e-3]}, "stop": "none"}
    search = {"algorithm": "grid", "metric": "train/loss"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**block, "search": search}))
    (tmp_path / "sweep-id").write_text(f"{ID}\n")
    return [str(tmp_path / "sweep.yaml"), "--sweep-id-file", str(tmp_path / "sweep-id")]


@pytest.fixture
def begun(arguments: list[str], tmp_path: Path) -> Sweep:
    return Sweep.create(str(tmp_path / "home"), "tickets", load_sweep(arguments[0]), ID)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been run: real sweeps that go on are in tests/integration/test_sweeps.py."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "tune.sweep.run_sweep", lambda resolved, *_, **options: calls.append({"as": resolved, **options})
    )
    return calls


def test_the_first_attempt_begins_under_the_id(arguments: list[str], ran: list[dict[str, Any]]) -> None:
    assert job.main(arguments) == 0
    assert ran == [{"as": load_sweep(arguments[0]), "sweep_id": ID}]


def test_one_that_was_killed_while_it_was_written_down_is_begun_anew(
    arguments: list[str], begun: Sweep, ran: list[dict[str, Any]]
) -> None:
    resolved = begun.resolved()
    storage.delete_tree(begun.path("resolved.json"))
    storage.delete_tree(begun.path("status.json"))
    assert job.main(arguments) == 0
    assert ran == [{"as": resolved, "sweep_id": ID}]
    with pytest.raises(NotFoundError, match=f"Sweep {ID} was never begun"):
        Sweep.open(begun.home, ID)
    assert (
        Sweep.create(begun.home, "tickets", resolved, ID).resolved()
        == Sweep.open(begun.home, ID).resolved()
        == resolved
    )
    with pytest.raises(ConflictError):
        Sweep.create(begun.home, "tickets", resolved, ID)


def test_another_attempt_goes_on_with_the_sweep_as_it_was_begun(
    arguments: list[str], begun: Sweep, ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver died with its node a moment less than it takes to be lost ago: it is waited for."""
    monkeypatch.setattr(status, "LOOK_EVERY_S", 0.01)
    begun.set_state(RunState.RUNNING, pid=1, born="long ago", host="gone")
    heard = datetime.now(UTC) - timedelta(seconds=LOST_AFTER_S - 0.3)
    then = begun.status().model_copy(update={"updated_at": heard.isoformat()})
    storage.write_bytes(begun.path("status.json"), then.model_dump_json().encode())
    assert job.main([*arguments, "--set", "search.parallel=7"]) == 0
    (call,) = ran
    assert call["resume"].id == ID and call["as"] == begun.resolved()
    assert begun.status().state is RunState.FAILED, "and may run again"


def test_one_that_is_over_is_left_alone(
    arguments: list[str], begun: Sweep, ran: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    begun.set_state(RunState.RUNNING)
    begun.set_state(RunState.SUCCEEDED)
    assert job.main(arguments) == 0 and ran == []
    assert f"Sweep {ID} is over already." in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["latest", "../../elsewhere", "", "20260101-000000-tickets"])
def test_what_is_no_id_is_refused(
    arguments: list[str], begun: Sweep, ran: list[dict[str, Any]], tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "sweep-id").write_text(wrong)
    assert job.main(arguments) == 2 and ran == []
    with pytest.raises(ConfigError):
        reopen_if_begun(begun.home, wrong)


def test_an_id_is_for_a_sweep_file(arguments: list[str]) -> None:
    for wrong in (["--resume", ID, *arguments[1:]], arguments[1:]):
        with pytest.raises(SystemExit):
            job.main(wrong)
