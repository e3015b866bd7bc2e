"""The command line from outside: what it prints, and the exit codes of what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from service import storage
from service.cli.app import main
from service.domain import ModelRef, RunState
from service.errors import NotFoundError
from service.registry import ManifestDraft, Registry
from service.runs import Run

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ManifestDraft(base_model="b", base_digest="00", renderer_digest="11", rank=4, alpha=8)


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Loray = Callable[..., Done]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty LORAY_HOME, and a working directory with nothing in it."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(tmp_path / "home")


@pytest.fixture
def loray(home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Loray:
    """Runs the console script's function with these arguments."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["loray", *arguments])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        printed = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, printed.out, printed.err)

    return call


def _publish(home: str, directory: Path, weights: bytes = b"w") -> None:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    Registry(home).publish("tickets", directory, DRAFT)


def _run(home: str) -> Run:
    resolved = {"schema": 1, "config": {}, "sources": {}}
    return Run.create(home, "tickets", "model: base\n", resolved, id="20260101-000000-tickets-0a1b")


def test_an_empty_home_lists_nothing_and_says_how_to_begin(loray: Loray) -> None:
    for command, hint in (("runs", "loray train RUN.YAML"), ("models", "publish: NAME")):
        shown = loray(command, "list")
        assert shown.code == 0 and hint in shown.out
        assert json.loads(loray(command, "list", "--json").out) == []


def test_models_are_listed_with_versions_and_aliases(loray: Loray, home: str, tmp_path: Path) -> None:
    _publish(home, tmp_path / "adapter")
    _publish(home, tmp_path / "adapter", b"v")
    assert loray("models", "alias", "tickets@production", "1").code == 0
    listed = json.loads(loray("models", "list", "--json").out)
    assert listed == [{"model": "tickets", "versions": [1, 2], "aliases": {"production": 1}}]
    assert "production -> 1" in loray("models", "list").out


def test_a_models_manifest_is_shown_under_its_alias(loray: Loray, home: str, tmp_path: Path) -> None:
    _publish(home, tmp_path / "adapter")
    loray("models", "alias", "tickets@production", "1")
    shown = json.loads(loray("models", "show", "tickets", "--json").out)
    assert shown["ref"] == "tickets@1" and shown["rank"] == 4
    assert shown["digest"] in loray("models", "show", "tickets@1").out


def test_an_unknown_run_exits_with_2_and_names_the_nearest(loray: Loray, home: str) -> None:
    run = _run(home)
    for command in ("show", "logs", "metrics", "ledger", "attach", "stop"):
        done = loray("runs", command, "20260101-000000-tickets-0a1c")
        assert done.code == 2 and f"the nearest is {run.id}" in done.err and "loray runs list" in done.err
        assert done.out == ""


def test_runs_are_listed_and_latest_is_the_newest(loray: Loray, home: str) -> None:
    run = _run(home)
    (listed,) = json.loads(loray("runs", "list", "--json").out)
    assert (listed["run"], listed["state"]) == (run.id, "created")
    assert run.id in loray("runs", "list").out
    assert json.loads(loray("runs", "show", "latest", "--json").out)["run"] == run.id


def test_stop_asks_a_run_and_refuses_one_that_has_ended(loray: Loray, home: str) -> None:
    run = _run(home)
    run.set_state(RunState.RUNNING)
    assert loray("runs", "stop", run.id, "--reason", "lunch").code == 0
    assert run.stop_requested() == "lunch"
    run.set_state(RunState.STOPPED)
    done = loray("runs", "stop", run.id)
    assert done.code == 1 and "stopped" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "absent.yaml"),
        ("train", "absent.yaml"),
        ("serve", "absent.yaml"),
        ("train", "20260101-000000-none-0a1b", "--resume"),
        ("train", "run.yaml", "--resume", "--set", "seed=1"),
        ("runs", "show", "latest"),
        ("models", "show", "absent@1"),
        ("models", "show", "Not A Name"),
        ("models", "alias", "tickets@3", "1"),
        ("models", "alias", "tickets@production"),
        ("models", "alias", "absent@production", "1"),
        ("models", "delete", "tickets"),
        ("models", "delete", "absent@1"),
        ("eval", "absent@1", "--data", "absent.jsonl"),
        ("chat", "absent@1"),
    ],
    ids=" ".join,
)
def test_wrong_input_exits_with_2_and_one_message_without_a_traceback(loray: Loray, arguments: tuple[str, ...]) -> None:
    done = loray(*arguments)
    assert done.code == 2
    assert "Error: " in done.err and "Traceback" not in done.err


def test_plan_names_every_problem_of_a_run_file(loray: Loray) -> None:
    Path("run.yaml").write_text("model: base\noptim: {lrr: 1}\n")
    done = loray("plan", "run.yaml", "--set", "optim.epochs=0")
    assert done.code == 2
    for problem in ("data: missing", "optim.lrr: unknown key. Did you mean optim.lr?", "optim.epochs"):
        assert problem in done.err


def test_deleting_is_refused_while_an_alias_points_there(loray: Loray, home: str, tmp_path: Path) -> None:
    _publish(home, tmp_path / "adapter")
    loray("models", "alias", "tickets@production", "1")
    refused = loray("models", "delete", "tickets@1")
    assert refused.code == 1 and "production" in refused.err
    assert Registry(home).manifest(ModelRef.parse("tickets@1")).rank == 4
    assert loray("models", "alias", "tickets@production", "--delete").code == 0
    assert loray("models", "delete", "tickets@1").code == 0
    with pytest.raises(NotFoundError):
        Registry(home).manifest(ModelRef.parse("tickets@1"))


def _claimed(home: str) -> str:
    """What a publisher that was killed leaves: its claim and a file."""
    version = storage.join(home, "models", "default", "tickets", "2")
    storage.create_exclusive(storage.join(version, "claim.json"), b"{}")
    storage.write_bytes(storage.join(version, "adapter_model.safetensors"), b"half")
    return version


def test_a_dry_run_of_gc_shows_the_claimed_version_and_deletes_nothing(loray: Loray, home: str, tmp_path: Path) -> None:
    _publish(home, tmp_path / "adapter")
    version = _claimed(home)
    done = loray("gc", "--dry-run")
    assert done.code == 0 and f"would delete {version}" in done.out
    assert json.loads(loray("gc", "--dry-run", "--json").out)[0]["deleted"] is False
    assert storage.list_names(version) == ["adapter_model.safetensors", "claim.json"]


def test_gc_deletes_the_unfinished_version_and_never_a_model(loray: Loray, home: str, tmp_path: Path) -> None:
    _publish(home, tmp_path / "adapter")
    version = _claimed(home)
    assert f"deleted {version}" in loray("gc").out
    assert not storage.exists(storage.join(version, "adapter_model.safetensors"))
    assert Registry(home).versions("tickets") == [1]
    assert "Nothing to collect" in loray("gc").out


def test_help_names_every_command_and_needs_no_home() -> None:
    command = [sys.executable, "-m", "service.cli.app", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("plan", "train", "serve", "chat", "eval", "gc", "runs", "models"):
        assert f" {name} " in done.stdout
