"""How jobs end: the exit code, and that a RayJob's attempt waits for its pods. On real nodes: tests/integration/test_nodes.py."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from jobs import ending, sweep, train
from service.errors import ClusterError, ConfigError, TrainingError


@pytest.mark.parametrize(
    ("ago", "wanted", "ready"),
    [
        ([], 1, False),
        ([100.0], 1, True),
        ([10.0], 1, False),
        ([100.0], 2, False),  # the other is still fetching its image
        ([100.0, 10.0], 2, False),
        ([100.0, 90.0], 2, True),
        ([100.0, 90.0, 1.0], 2, True),  # one that took a lost one's place begins nothing anew
    ],
)
def test_pods_are_ready_when_as_many_as_were_wanted_have_been_there(ago: list[float], wanted: int, ready: bool) -> None:
    now = 1_800_000_000.0
    assert ending.ready([now - seconds for seconds in ago], wanted, now) is ready


def test_the_wait_ends_with_the_pods_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([[], [0.0], [0.0, 0.0]])
    monkeypatch.setenv(ending.WORKER_PODS, "2")
    monkeypatch.setattr(ending, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(ending, "_starts", lambda: looks)
    ending.stay_until_seen(Console())
    assert capsys.readouterr().out.count("Waiting for the worker pods") == 1
    assert next(looks, None) is None, "it has looked until both were there"


def test_outside_of_a_rayjob_nobody_waits_and_a_lost_cluster_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> list[float]:
        raise ClusterError("the head is gone")

    monkeypatch.setattr(ending, "_starts", lost)
    monkeypatch.delenv(ending.WORKER_PODS, raising=False)
    ending.stay_until_seen(Console())
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(ending.WORKER_PODS, "2")
    ending.stay_until_seen(Console())
    assert "may not see this end: the head is gone" in capsys.readouterr().out


@pytest.mark.parametrize(("job", "option"), [(train, "--run-id-file"), (sweep, "--sweep-id-file")])
def test_an_attempt_of_a_rayjob_waits_however_it_ends_and_other_jobs_do_not(
    job: ModuleType, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(ending, "stay_until_seen", lambda console: waited.append(capsys.readouterr().out))
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    id_file = tmp_path / "id"
    id_file.write_text("20260101-000000-small-0001\n")
    assert job.main([str(tmp_path / "none.yaml"), option, str(id_file)]) == 2
    assert len(waited) == 1 and "does not exist" in waited[0], "after the reason was printed"
    assert job.main([str(tmp_path / "none.yaml")]) == 2
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("x"), 2), (TrainingError("x"), 1), (KeyboardInterrupt(), ending.GIVEN_UP)]
)
def test_exit_codes(error: ConfigError | TrainingError | KeyboardInterrupt, code: int) -> None:
    assert ending.exit_code(error, Console(quiet=True)) == code
