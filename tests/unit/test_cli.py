"""The command line from outside: what it prints, and the exit codes of what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service import storage
from service.config import load_run
from service.data import planner
from service.data.prepare import prepare_run
from service.domain import ModelRef, RunState
from service.errors import NotFoundError
from service.logs import LogWriter
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.runs import Run
from service.training import stacks
from service.training.ranklog import RankLog
from service.training.watch import Watch
from tests.integration.tiny import save_tokenizer
from tests.unit.console import Loray, home, loray

__all__ = ["home", "loray"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ManifestDraft(base_model="b", base_digest="00", renderer_digest="11", rank=4, alpha=8)


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
    for command in ("show", "logs", "metrics", "ledger", "stacks", "attach", "stop"):
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


def test_show_tells_what_has_happened_and_when(loray: Loray, home: str) -> None:
    run = _run(home)
    with LogWriter(run.path("events"), "a1-r0") as events:
        events.append({"time": 1700000000.0, "kind": "ready", "text": "3.0 s: load the model 2.0 [bold]"})
        events.append({"time": 1700000001.0, "kind": "started", "workers": 2})
    shown = loray("runs", "show", "latest").out
    assert "2023-11-14 22:13:20 UTC  ready: 3.0 s: load the model 2.0 [bold]" in shown
    assert "2023-11-14 22:13:21 UTC  started  workers: 2" in shown


def test_logs_are_printed_attempt_by_attempt_and_part_by_part(loray: Loray, home: str) -> None:
    run = _run(home)
    assert "No log yet" in loray("runs", "logs", "latest").out
    names = ["a2-rank-00000.log", "a2-rank-00000.part-0001.log", "a2-rank-00001.log", "a10-rank-00000.log"]
    for name in (*reversed(names), "stacks-a2-rank-00000-stall.txt"):
        storage.write_bytes(run.path("logs", name), f"in {name}\n".encode())
    lines = loray("runs", "logs", "latest").out.splitlines()
    assert lines == [line for name in names for line in (f"--- {name}", f"in {name}")]


def _hang_until(run: Run, let_go: threading.Event) -> None:
    log = RankLog(run, 0, 1)
    watch = Watch(run, 0, 1, log, (), stall_s=3600.0, retry_s=60.0)
    watch.moved("step 3")
    let_go.wait()
    watch.close()
    log.close()


def test_the_stacks_of_a_running_run_are_asked_for_and_the_silent_workers_named(loray: Loray, home: str) -> None:
    run, let_go = _run(home), threading.Event()
    run.set_state(RunState.RUNNING, workers=1, attempt=1)
    worker = threading.Thread(target=_hang_until, args=(run, let_go), name="training")
    worker.start()
    try:
        done = loray("runs", "stacks", "latest", "--json")
        run.heartbeat(workers=2)
        partly = loray("runs", "stacks", "latest", "--timeout", "3")
    finally:
        let_go.set()
        worker.join()
    answer = json.loads(done.out)
    assert done.code == 0 and answer["missing"] == [] and answer["run"] == run.id
    assert [(s["rank"], s["id"]) for s in answer["stacks"]] == [(0, answer["request"])]
    assert "_hang_until" in answer["stacks"][0]["text"] and "doing: step 3" in answer["stacks"][0]["text"]
    assert partly.code == 1 and "--- worker 0, attempt 1" in partly.out and "No answer from worker(s) 1" in partly.err
    assert stacks.requested(run) is None


def test_the_stacks_of_a_run_that_has_ended_are_those_it_left(loray: Loray, home: str) -> None:
    run = _run(home)
    done = loray("runs", "stacks", "latest")
    assert done.code == 0 and "is created and left no stacks" in done.out
    storage.write_bytes(stacks.uri(run, 1, 0, "stall"), b"worker 0, attempt 1: pid 1")
    assert "--- worker 0, attempt 1, stall\nworker 0, attempt 1: pid 1" in loray("runs", "stacks", "latest").out
    run.set_state(RunState.RUNNING, workers=1)
    silent = loray("runs", "stacks", "latest", "--timeout", "0.3")
    assert silent.code == 1 and "pid 1" in silent.out and "No answer from worker(s) 0" in silent.err


def _prepared_run(home: str) -> Run:
    """A running run over three rows in steps of one, with the first two steps in its ledger."""
    Path("run.yaml").write_text("model: base\ndata: {train: rows.jsonl}\noptim: {batch: {rows: 1}}\n")
    Path("rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 3)
    resolved = load_run("run.yaml")
    run = Run.create(home, "tickets", resolved.text, resolved.as_json())
    save_tokenizer(Path("tokenizer"))
    card = prepare_run(resolved.config, load_renderer(Path("tokenizer")), home=home).train
    run.set_state(RunState.RUNNING, train_digest=card.digest)
    plan = planner.make_plan([2, 2, 2], resolved.config.optim.batch, capacity=1024, epochs=1, seed=0, max_steps=None)
    with LogWriter(run.path("ledger"), "a1-r0") as log:
        for step in (1, 2):
            log.append({"step": step, "ids": [int(row) + 1 for row in plan.rows(step - 1)]})
    return run


def test_the_ledger_is_checked_against_the_plan(loray: Loray, home: str) -> None:
    run = _prepared_run(home)
    done = loray("runs", "ledger", "latest", "--check")
    assert (done.code, done.out) == (0, "ledger: 2 steps, 2 draws, each exactly once\n")
    assert json.loads(loray("runs", "ledger", "latest", "--check", "--json").out) == {
        "run": run.id, "ok": True, "steps": 2, "draws": 2, "unsettled": [], "differences": [],
    }  # fmt: skip
    with LogWriter(run.path("ledger"), "a1-r1") as log:
        log.append({"step": 2, "ids": run.ledger()[1]["ids"]})
    done = loray("runs", "ledger", "latest", "--check")
    assert done.code == 1 and "step 2: drawn twice [" in done.out
    assert json.loads(loray("runs", "ledger", "latest", "--check", "--json").out)["ok"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "absent.yaml"),
        ("train", "absent.yaml"),
        ("serve", "absent.yaml"),
        ("train",),
        ("train", "run.yaml", "--resume", "latest"),
        ("train", "--resume", "20260101-000000-none-0a1b"),
        ("train", "--resume", "latest", "-d", "--no-wait", "--profile"),
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


def test_resuming_with_what_would_change_the_run_exits_with_2_and_names_every_field(loray: Loray, home: str) -> None:
    Path("run.yaml").write_text("model: base\ndata: {train: rows.jsonl}\n")
    resolved = load_run("run.yaml")
    run = Run.create(home, "tickets", resolved.text, resolved.as_json())
    for resume in (run.id, "latest", "run.yaml"):
        done = loray("train", "--resume", resume, "--set", "method.r=4", "--set", "scale.strategy=zero9", "--no-wait")
        assert done.code == 2 and "2 problems" in done.err
        assert "method.r: the run has 16, asked for 4" in done.err
        assert "scale.strategy: must be 'ddp', 'zero1', 'zero2' or 'zero3', not 'zero9'" in done.err
    assert run.status().state is RunState.CREATED


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


def test_json_is_alone_on_standard_output_whatever_libraries_print(
    loray: Loray, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed does, when it is imported: the first time that a machine plans."""
    _publish(home, tmp_path / "a")
    listed = Registry.models

    def models(registry: Registry) -> list[str]:
        print("a library speaks")
        return listed(registry)

    monkeypatch.setattr(Registry, "models", models)
    done = loray("models", "list", "--json")
    assert (done.code, json.loads(done.out)[0]["model"], done.err) == (0, "tickets", "a library speaks\n")
    assert loray("models", "list").out.startswith("a library speaks\n"), "people may see it"
