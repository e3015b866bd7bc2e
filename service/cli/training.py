"""Starting and following runs: in this process, in one of its own (`-d`), or as a Ray job on a cluster (`--address`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service import launcher
from service.cli.terminal import console, say
from service.config import ResolvedRun, load_run, run_from_json
from service.domain import RunState
from service.errors import NotFoundError, TrainingError
from service.runs import Run, new_id
from service.settings import Settings, load_settings

FORWARDED = ("LORAY_HOME", "LORAY_CACHE", "HF_HUB_OFFLINE")  # never credentials: job environments can be read by all
ENDED = (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.LOST)
TELL_EVERY_S = 30.0


@dataclass(frozen=True)
class Asked:
    """What `loray train` was asked for: a run file, or a run to go on with. `asked_at` in seconds since the epoch."""

    run_file: str | None
    resume: str | None
    overrides: tuple[str, ...]
    profile: bool
    asked_at: float


def train_here(asked: Asked) -> None:
    """Train in this process, on the cluster of RAY_ADDRESS or a Ray of its own."""
    settings = load_settings()
    resolved, run = _resolved(asked, settings)
    from service.training import repeats

    repeats.train(resolved, settings, console, resume=run, profile=asked.profile, asked_at=asked.asked_at)


def train_detached(asked: Asked) -> None:
    """Start `python -m jobs.train` in a session of its own, wait until its run exists, and say how to follow it."""
    settings = load_settings()
    resolved, run = _resolved(asked, settings)
    run_id = _run_id(resolved, run, settings)
    command = launcher.train_command(
        run_id, asked.overrides, run_file=asked.run_file, profile=asked.profile, asked_at=asked.asked_at
    )
    log = settings.cache / "runs" / run_id / "driver.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    _await_start(Run(settings.home, run_id), process, log)
    say(f"Run {run_id} goes on in process {process.pid}; it prints to {log}")
    console.print(f"Follow it: loray runs attach {run_id}    Stop it: loray runs stop {run_id}", highlight=False)


def train_on_cluster(asked: Asked, address: str, *, detach: bool) -> None:
    """Submit the run as a Ray job and follow its log; Ctrl-C detaches."""
    settings = load_settings()
    resolved, run = _resolved(asked, settings)
    run_id = _run_id(resolved, run, settings)
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    launcher.submit(
        None if run else resolved, run_id, address, env_vars,
        overrides=asked.overrides if run else (), profile=asked.profile, asked_at=asked.asked_at,
    )  # fmt: skip
    console.print(f"Submitted run {run_id} to {address}", highlight=False)
    if detach:
        console.print(f"Follow it: {_attach_command(run_id, address)}", highlight=False)
    else:
        follow_job(run_id, address)


def follow_job(run_id: str, address: str) -> None:
    """Print the newest Ray job of a run until it ends. Raises TrainingError when it failed."""
    client = launcher.job_client(address)
    job_id = launcher.newest_job(client, run_id)
    try:
        status, message = launcher.follow(client, job_id, lambda text: console.print(text, end="", markup=False))
    except KeyboardInterrupt:
        console.print(f"\nDetached; the run goes on. Attach again: {_attach_command(run_id, address)}", highlight=False)
        return
    if status == "FAILED":
        raise TrainingError(f"job {job_id} ended {status}: {message}")
    console.print(f"Job {job_id} ended {status}.", highlight=False)


def follow_run(run: Run) -> None:
    """Show a run's progress from its directory until it ends. Ctrl-C leaves it running. Raises TrainingError if it failed."""
    from service.training.progress import ProgressView

    num_steps, said = int(run.status().details.get("num_steps", 0)), ""
    try:
        with ProgressView(run, num_steps, console) as view:
            while (status := run.status()).state not in ENDED:
                if status.message != said:  # which child of it trains
                    view.say(said := status.message)
                view.poll()
                time.sleep(0.5)
    except KeyboardInterrupt:
        console.print(f"\nDetached; the run goes on. Attach again: loray runs attach {run.id}", highlight=False)
        return
    if status.state in (RunState.FAILED, RunState.LOST):
        raise TrainingError(f"run {run.id} is {status.state}: {status.message}")
    console.print(f"Run {run.id} {status.state}. {status.message}", highlight=False, soft_wrap=True)


def _resolved(asked: Asked, settings: Settings) -> tuple[ResolvedRun, Run | None]:
    """The config to train: from the file, or from the run that goes on (an id, latest, or the file it was made from)."""
    if asked.run_file is not None:
        return load_run(asked.run_file, asked.overrides), None
    from service.training.driver import newest_run_of, reopen

    assert asked.resume is not None, "app.py demands one of the two"
    run_id = newest_run_of(settings.home, asked.resume) if Path(asked.resume).is_file() else asked.resume
    run = reopen(settings.home, run_id)
    return run_from_json(run.resolved(), run.run_yaml(), asked.overrides), run


def _run_id(resolved: ResolvedRun, run: Run | None, settings: Settings) -> str:
    from service.training.driver import run_name

    return run.id if run else new_id(settings.home, run_name(resolved))


def _await_start(run: Run, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the detached driver has marked its run as running, or died with a reason; planning may fetch a base first."""
    told = time.monotonic()
    while process.poll() is None:
        with suppress(NotFoundError):  # it has not made the run's directory yet
            if run.status().details.get("pid") == process.pid:
                return
        if time.monotonic() - told >= TELL_EVERY_S:
            say(f"still planning (fetching the base model, tokenising); it prints to {log}")
            told = time.monotonic()
        time.sleep(0.1)
    raise TrainingError(f"the run did not start:\n{log.read_text()[-2000:]}")


def _attach_command(run_id: str, address: str) -> str:
    return f"loray runs attach {run_id} --address {address}"
