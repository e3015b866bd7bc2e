"""Runs through their doors on a real Ray cluster: `python -m jobs.train`, `loray train`, `ray job submit`, a killed driver."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import storage
from service.domain import ModelRef, RunState
from service.registry import Registry
from service.runs import list_runs
from service.training.checkpoint import newest_step
from tests.integration import tiny
from tests.integration.place import DEADLINE_S, ROOT, SCRIPTS, Place, base, losses, place, wait_until

__all__ = ["base", "place"]  # fixtures


@pytest.mark.long
def test_a_killed_trainer_resumes_to_the_same_losses_and_model_as_one_never_killed(place: Place) -> None:
    # Long enough that the kill finds it in the middle.
    long = ["--set", "optim.epochs=40", "--set", "publish=null"]
    place.train(str(place.run_file), *long)
    whole = place.newest()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(place.run_file), *long],
        env=place.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: len(list_runs(place.settings.home)) == 2, "the second run exists")
    killed = place.newest()
    wait_until(lambda: (newest_step(killed.uri) or 0) >= 4, "it has checkpoints")
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = newest_step(killed.uri) or 0
    assert checkpoint < 160, "the run ended before it could be killed"
    assert not storage.list_names(killed.path("model"))
    place.train("--resume", killed.id)
    assert killed.status().state is RunState.SUCCEEDED
    assert killed.status().details["attempt"] == 2
    assert any(event["kind"] == "resumed" for event in killed.events())
    assert losses(killed) == losses(whole)
    assert killed.ledger() == whole.ledger()
    name = "adapter_model.safetensors"
    assert storage.read_bytes(killed.path("model", name)) == storage.read_bytes(whole.path("model", name))


def test_a_run_ends_published_with_report_and_curve(place: Place) -> None:
    output = place.train(str(place.run_file), "--set", "checkpoint.keep_last=2")
    run = place.newest()
    assert "Published small@1" in output and "Warning" not in output
    assert re.search(r"From the command to the first step: \d", output)
    assert f"Report: {run.path('report.md')}" in output
    assert storage.read_bytes(run.path("loss.png")).startswith(b"\x89PNG")
    report = storage.read_bytes(run.path("report.md")).decode()
    assert "alive 14/14" in report
    assert "small@1" in report and "- `checkpoint.keep_last`: 2\n" in report
    assert "| warning |" not in report
    manifest = Registry(place.settings.home).manifest(ModelRef.parse("small@1"))
    assert manifest.run == run.id
    assert manifest.metrics["train/loss"] == losses(run)[-1]
    rows = json.loads("[" + ",".join(place.loray("runs", "metrics", "latest", "--json").strip().split("\n")) + "]")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"train/loss", "train/grad_norm", "train/tokens_per_s", "optim/lr"} <= set(rows[0])
    logs = storage.list_names(run.path("logs"))
    assert logs == ["a1-rank-00000.log", "a1-rank-00001.log"]


@pytest.mark.long
def test_an_adapter_that_learnt_nothing_is_a_failed_run_and_no_version(place: Place) -> None:
    output = place.train(str(place.run_file), "--set", "optim.lr=1.0e-45", "--set", "optim.max_steps=1", expect=1)
    status = place.newest().status()
    assert status.state is RunState.FAILED and status.details["error"] == "GateError"
    assert "14 of 14 updates are zero" in status.message and "14 of 14 updates are zero" in output
    assert Registry(place.settings.home).versions("small") == []


@pytest.mark.long
def test_a_submitted_job_succeeds_and_a_mistyped_key_fails_with_our_message(place: Place) -> None:
    from ray.job_submission import JobSubmissionClient

    submit = [str(SCRIPTS / "ray"), "job", "submit", "--address", place.dashboard, "--working-dir", "."]
    forwarded = {name: place.environment[name] for name in ("LORAY_HOME", "LORAY_CACHE", "HF_HUB_OFFLINE")}
    env = ["--runtime-env-json", json.dumps({"env_vars": forwarded, "excludes": [".git", ".venv"]})]
    command = ["--", sys.executable, "-m", "jobs.train", str(place.run_file), "--set"]
    override = ("RAY_ADDRESS",)  # Ray would take it for the dashboard's address
    place.run(*submit, "--submission-id", "good", *env, *command, "optim.max_steps=4", without=override)
    place.run(*submit, "--submission-id", "bad", *env, *command, "optim.max_stepz=4", expect=1, without=override)
    client = JobSubmissionClient(place.dashboard)
    assert client.get_job_info("good").status == "SUCCEEDED"
    bad = client.get_job_info("bad")
    assert bad.status == "FAILED"
    assert "optim.max_stepz: unknown key. Did you mean optim.max_steps?" in bad.message
    assert len(list_runs(place.settings.home)) == 1  # the mistyped one left no run


@pytest.mark.long
def test_loray_train_with_an_address_submits_and_follows_the_log(place: Place) -> None:
    output = place.loray("train", str(place.run_file), "--address", place.dashboard, "--set", "optim.max_steps=4")
    run = place.newest()
    assert run.status().state is RunState.SUCCEEDED
    assert "step 4/4" in output
    assert f"Job {run.id} ended SUCCEEDED" in output
    detached = place.loray(
        "train", str(place.run_file), "--address", place.dashboard, "-d", "--set", "optim.max_steps=4"
    )
    again = next(line for line in detached.splitlines() if "loray runs attach" in line)
    arguments = again.split("loray ")[1].split()
    assert "ended SUCCEEDED" in place.loray(*arguments)


@pytest.mark.long
@pytest.mark.longer
def test_a_submitted_run_that_was_stopped_goes_on_in_a_job_of_its_own(place: Place) -> None:
    long = ["--address", place.dashboard, "--set", "optim.epochs=2000"]
    place.loray("train", str(place.run_file), "-d", *long)
    wait_until(lambda: bool(list_runs(place.settings.home)), "the job has made its run")
    run = place.newest()
    wait_until(lambda: len(losses(run)) > 3, "it trains")
    place.loray("runs", "stop", run.id)
    assert "SUCCEEDED" in place.loray("runs", "attach", run.id, "--address", place.dashboard)
    assert run.status().state is RunState.STOPPED
    stopped_at = len(losses(run))
    assert run.resolved()["overrides"][0] == "optim.epochs=2000"
    # The data lies nowhere that this machine or the second job could find: what was prepared is enough.
    for name in ("train.jsonl", "eval.jsonl"):
        (place.run_file.parent / name).unlink()
    place.loray("train", "--resume", run.id, "--address", place.dashboard, "-d")
    wait_until(lambda: len(losses(run)) > stopped_at, "it goes on")
    place.loray("runs", "stop", run.id)
    place.loray("runs", "attach", run.id, "--address", place.dashboard)
    assert run.status().details["attempt"] == 2
    assert len(losses(run)) > stopped_at


@pytest.mark.long
def test_a_base_model_may_be_named_by_a_relative_path(place: Place, base: Path) -> None:
    relative = os.path.relpath(base, ROOT)
    output = place.train(str(place.run_file), "--set", f"model={relative}", "--set", "optim.max_steps=2")
    assert "Published small@1" in output


@pytest.mark.long
def test_a_detached_run_stops_with_a_checkpoint_and_goes_on(place: Place, tmp_path: Path) -> None:
    own = tiny.save_base(tmp_path / "own")
    place.loray("train", str(place.run_file), "-d", "--set", "optim.epochs=2000", "--set", f"model={own}")
    run = place.newest()
    wait_until(lambda: len(losses(run)) > 3, "it trains")
    refused = place.loray("train", "--resume", run.id, expect=1)
    assert "is running" in refused
    place.loray("runs", "stop", "latest", "--reason", "enough")
    place.loray("runs", "attach", "latest")
    status = run.status()
    assert (status.state, status.message) == (RunState.STOPPED, "enough")
    newest = newest_step(run.uri)
    assert newest == status.step == len(losses(run))  # not one step is lost
    resolved = run.resolved()
    assert resolved["sources"]["optim.epochs"] == "--set"
    refused = place.loray("runs", "stop", "latest", expect=1)
    assert "nothing to stop" in refused
    tiny.save_base(own, seed=1)  # another model in its place
    attempts, refused = run.status().details["attempt"], place.train("--resume", run.id, expect=2)
    assert "was made by another training" in refused and "digest of the base model" in refused
    assert run.status().details["attempt"] == attempts and run.status().state is RunState.STOPPED


@pytest.mark.long
def test_sigterm_at_the_driver_stops_with_a_checkpoint(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(place.run_file), "--set", "optim.epochs=2000"],
        env=place.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: bool(list_runs(place.settings.home)), "the run exists")
    run = place.newest()
    wait_until(lambda: len(losses(run)) > 3, "it trains")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert run.status().state is RunState.STOPPED
    assert "SIGTERM" in run.status().message
    assert newest_step(run.uri) == run.status().step == len(losses(run))
    assert f"loray train --resume {run.id}" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "missing.jsonl"}}, "missing.jsonl: the data file does not exist"),
        ({"data": {"train": "EMPTY"}}, "is empty: it holds no row"),
        ({"data": {"train": "BROKEN"}}, "One JSON object a row. Row 2."),
        ({"model": "no-such-model"}, "is no bundled name"),
        ({"model": "/nowhere/at/all"}, "is no directory"),
        ({"method": {"type": "lora", "targets": ["nothing_proj"]}}, "name no linear layer"),
        ({"data": {"train": "GOOD", "seq_len": 8}}, "more than data.seq_len = 8 tokens"),
    ],
)
def test_wrong_input_exits_2_with_its_reason_and_leaves_no_run(
    change: dict[str, Any], message: str, place: Place, tmp_path: Path
) -> None:
    files = {"EMPTY": "", "BROKEN": '{"prompt": "a", "completion": "b"}\n{"prompt": \n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = {**yaml.safe_load(place.run_file.read_text()), **change}
    data = config["data"]
    good = str(place.run_file.parent / "train.jsonl")
    data["train"] = good if data["train"] == "GOOD" else data["train"]
    if data["train"] in files:
        data["train"] = str(tmp_path / data["train"])
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    output = place.train(str(file), expect=2)
    assert message in " ".join(output.split())
    assert not list_runs(place.settings.home)
    with contextlib.suppress(FileNotFoundError):
        assert not Registry(place.settings.home).models()


@pytest.mark.long
def test_a_run_that_wants_more_than_the_cluster_has_says_what_is_missing_and_does_not_wait_for_ever(
    place: Place,
) -> None:
    output = place.train(str(place.run_file), "--set", "scale.workers=64", "--no-wait", expect=1)
    assert "64 worker(s) with 1 CPU each are wanted" in output and "4 of 4 CPU free" in output
    assert place.newest().status().state is RunState.FAILED
    output = place.train(str(place.run_file), "--set", "scale.workers=64", "--set", "scale.wait_s=2", expect=1)
    assert "Waiting, 2 s more at most" in output
