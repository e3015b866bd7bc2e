"""Real processes killed while a run goes on, on a real Ray cluster: what is left must be as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from service import storage
from service.domain import RunState
from service.runs import Run
from service.settings import Settings
from tests.integration import small_runs
from tests.integration.drivers import checkpoints, processes, train_workers, training, trains
from tests.integration.place import ROOT, Place, base, losses, place, wait_until
from tests.integration.stoppable_endpoint import Endpoint, endpoint

__all__ = ["base", "endpoint", "place"]  # fixtures
pytest_plugins = ("tests.s3_endpoint",)
pytestmark = pytest.mark.long
# 240 steps, so that the fault finds it in the middle; a checkpoint every two would take most of the time.
LONG = ("--set", "optim.epochs=60", "--set", "publish=null", "--set", "checkpoint.every.steps=20")


def ledger_line(place: Place, run: Run) -> dict[str, object]:
    answer: dict[str, object] = json.loads(place.loray("runs", "ledger", run.id, "--check", "--json"))
    return answer


def test_a_run_whose_worker_is_killed_goes_on_by_itself_to_the_same_losses(place: Place) -> None:
    place.train(str(place.run_file), *LONG)
    whole = place.newest()
    with training(place, *LONG) as (run, driver):
        wait_until(lambda: len(checkpoints(run)) > 0, "it has a checkpoint")
        train_workers()[-1].send_signal(signal.SIGKILL)
        output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, output[-3000:]
    assert "was killed, or its node went away" in output and "Attempt 2 begins" in output, output[-3000:]
    status = run.status()
    assert (status.state, status.details["attempt"], status.step) == (RunState.SUCCEEDED, 2, 240)
    assert losses(run) == losses(whole)
    assert run.ledger() == whole.ledger()
    ledger_line(place, run)
    kept = storage.list_names(run.path("logs"))
    assert {"a1-rank-00000", "a1-rank-00001", "a2-rank-00000"} <= {name[:13] for name in kept}


def test_a_run_whose_ray_train_controller_is_killed_goes_on_by_itself(place: Place) -> None:
    """As by Ray's memory monitor, where a head has too little for all that leads its runs."""
    with training(place, *LONG) as (run, driver):
        wait_until(lambda: len(checkpoints(run)) > 0, "it has a checkpoint")
        (controller,) = processes("ray::TrainController")
        controller.send_signal(signal.SIGKILL)
        output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, output[-3000:]
    assert "a process of Ray Train that leads" in output and "Attempt 2 begins" in output, output[-3000:]
    status = run.status()
    assert (status.state, status.details["attempt"], status.step) == (RunState.SUCCEEDED, 2, 240)
    ledger_line(place, run)


def test_workers_that_die_again_and_again_without_a_checkpoint_end_the_run(place: Place) -> None:
    never = ("--set", "checkpoint.every.steps=0", "--set", "scale.max_failures=1", "--set", "optim.epochs=4000")
    with training(place, *never) as (run, driver):
        for attempt in (1, 2):
            wait_until(functools.partial(trains, run, attempt), f"attempt {attempt} trains")
            train_workers()[0].send_signal(signal.SIGKILL)
        output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 1, output[-3000:]
    assert run.status().state is RunState.FAILED
    assert "was killed" in run.status().message


@pytest.fixture
def on_s3(place: Place, endpoint: Endpoint, s3_home: str) -> Place:
    """The same with home, model and data on S3, and a cluster that the driver starts itself, so that the workers have its
    credentials."""
    environment = {name: value for name, value in place.environment.items() if name != "RAY_ADDRESS"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment["LORAY_HOME"] = s3_home
    config = yaml.safe_load(place.run_file.read_text())
    given = storage.join(s3_home, "given")
    for file in sorted(Path(config["model"]).iterdir()):
        storage.write_bytes(storage.join(given, "base", file.name), file.read_bytes())
    for side, file in config["data"].items():
        storage.write_bytes(storage.join(given, f"{side}.jsonl"), Path(file).read_bytes())
        Path(file).unlink()
    data = {side: storage.join(given, f"{side}.jsonl") for side in config["data"]}
    run_file = place.run_file.with_name("on-s3.yaml")
    run_file.write_text(yaml.safe_dump({**config, "model": storage.join(given, "base"), "data": data}))
    return Place("", Settings(s3_home, place.settings.cache), environment, run_file)


LIMIT_KB = 3_500_000


def test_a_run_whose_storage_is_away_for_20_seconds_goes_on_to_its_end(on_s3: Place, endpoint: Endpoint) -> None:
    with training(on_s3, *LONG) as (run, driver):
        endpoint.stop_at("checkpoints/00000040")
        wait_until(endpoint.has_stopped, "its second checkpoint begins, and storage goes away")
        back = threading.Timer(20.0, endpoint.start)
        back.start()
        output = driver.communicate(timeout=300)[0]
        back.join()
    assert driver.returncode == 0, output[-3000:]
    status = run.status()
    assert (status.state, status.details["attempt"], status.step) == (RunState.SUCCEEDED, 1, 240)
    kinds = [event["kind"] for event in run.events()]
    assert "storage_away" in kinds and "storage_back" in kinds
    ledger_line(on_s3, run)


def test_a_run_whose_storage_stays_away_fails_and_goes_on_from_its_last_whole_checkpoint(
    on_s3: Place, endpoint: Endpoint
) -> None:
    with training(on_s3, *LONG, "--set", "checkpoint.retry_s=3") as (run, driver):
        endpoint.stop_at("checkpoints/00000040")
        wait_until(endpoint.has_stopped, "its second checkpoint begins, and storage goes away")
        output = driver.communicate(timeout=300)[0]
    assert driver.returncode == 1, output[-3000:]
    assert "storage was away" in output or "storage has failed" in output, output[-3000:]
    endpoint.start()
    kept = checkpoints(run)
    assert max(kept) == 20
    on_s3.train("--resume", run.id)
    assert run.status().state is RunState.SUCCEEDED
    ledger_line(on_s3, run)


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_losses_stay(place: Place, base: Path) -> None:
    optim = {"lr": 1e-3, "batch": {"rows": 8000}, "epochs": 1}
    file = small_runs.write_run_file(
        place.run_file.parent / "large", base, num_rows=8000, scale={"workers": 2}, optim=optim
    )
    padded = ("--set", "data.pack=never", "--set")
    place.train(str(file), *padded, "memory.micro=64")
    small = place.newest()
    alone = {name: value for name, value in place.environment.items() if name != "RAY_ADDRESS"}
    limited = ["bash", "-c", f'ulimit -d {LIMIT_KB} && exec "$@"', "bash"]  # every process of its Ray gets it
    command = [*limited, sys.executable, "-m", "jobs.train", str(file), *padded, "memory.micro=8000"]
    done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (
        "a micro-batch of 8000 sequence(s) does not fit" in done.stdout
        and "Trying 4000; the global batch stays" in done.stdout
    )
    run = place.newest()
    assert run.status().details["attempt"] >= 2
    assert losses(run) == pytest.approx(losses(small), rel=1e-5)
