"""A run from its resolved config to its end: plan, train, gate, report, publish. What `jobs/train.py` and the CLI call.

The driver owns the run's status and its heartbeat; the loop, in other processes, owns everything else in the directory.
Wrong input raises before a run exists; once it exists, whatever happens is also its last status.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from service import launcher, storage
from service.config import ResolvedRun, read_text
from service.domain import Manifest, ModelRef, RunState
from service.errors import ConflictError, NotFoundError
from service.registry import ManifestDraft, Registry
from service.runs import Run, list_runs
from service.settings import Settings
from service.training import trainer
from service.training.loop import TrainJob, TrainResult
from service.training.plan import RunPlan, make_run_plan
from service.training.progress import ProgressView
from service.training.report import write_report

HEARTBEAT_EVERY_S = 10.0
VERSIONED = ("loray", "torch", "transformers", "peft", "ray", "numpy")


def train_run(
    resolved: ResolvedRun, settings: Settings, console: Console, *, resume: Run | None = None, run_id: str | None = None
) -> Run:
    """Train `resolved` to its end, or go on with `resume`; the finished or stopped run. Raises what ended it."""
    console.print(f"Planning: model {resolved.config.model.id}, data {resolved.config.data.train}", highlight=False)
    plan, _ = make_run_plan(resolved, settings)
    run = resume or Run.create(settings.home, run_name(resolved), resolved.text, resolved.as_json(), id=run_id)
    attempt = _begin(run, plan)
    console.print(f"Run {run.id}  ({run.uri})", highlight=False, soft_wrap=True)
    try:
        result = _train(_job(resolved, settings, run, attempt, plan), run, plan, console)
        if result.stopped is not None:
            run.set_state(RunState.STOPPED, result.stopped, step=result.step)
            console.print(f"Stopped at step {result.step}: {result.stopped}. Go on: loray train --resume {run.id}")
        else:
            _finish(run, resolved, settings, plan, result, console)
    except BaseException as error:
        run.set_state(RunState.FAILED, f"{type(error).__name__}: {error}")
        raise
    return run


def run_name(resolved: ResolvedRun) -> str:
    """What a run is called: after the model it publishes, else after its method."""
    publish = resolved.config.publish
    return ModelRef.parse(publish.name).name if publish else resolved.config.method.type


def reopen(home: str, id_or_latest: str) -> Run:
    """A run that can go on. Raises ConflictError when it has succeeded, or its driver still lives."""
    run = Run.open(home, id_or_latest)
    status = run.status()
    if status.state is RunState.SUCCEEDED:
        raise ConflictError(f"run {run.id} has succeeded: there is nothing to resume. Start a new run.")
    if status.state is RunState.RUNNING:
        if not _is_dead(status.details.get("host"), status.details.get("pid")):
            raise ConflictError(
                f"run {run.id} is running (heartbeat {status.updated_at}). Stop it first: loray runs stop {run.id}"
            )
        run.set_state(RunState.FAILED, "its driver was killed")
    return run


def newest_run_of(home: str, run_file: str) -> str:
    """The id of the newest run made from this very run file. Raises NotFoundError."""
    text = read_text(run_file, "run file")
    for run in reversed(list_runs(home)):
        if run.run_yaml() == text:
            return run.id
    raise NotFoundError(
        f"no run was made from {run_file} as it is now. List runs with `loray runs list`, resume by id."
    )


def _begin(run: Run, plan: RunPlan) -> int:
    """Mark the run as running here; the number of this attempt."""
    attempt = int(run.status().details.get("attempt", 0)) + 1
    run.clear_stop()
    here: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
    run.set_state(RunState.RUNNING, attempt=attempt, num_steps=plan.num_steps, **here)
    return attempt


def _job(resolved: ResolvedRun, settings: Settings, run: Run, attempt: int, plan: RunPlan) -> TrainJob:
    return TrainJob(
        home=settings.home,
        cache=str(settings.cache),
        run_id=run.id,
        attempt=attempt,
        config=resolved.config.model_dump(mode="json", by_alias=True),
        base_digest=plan.base.digest,
        train_digest=plan.train.digest,
        eval_digest=plan.eval.digest if plan.eval else None,
    )


def _train(job: TrainJob, run: Run, plan: RunPlan, console: Console) -> TrainResult:
    """Ray Train in a thread, because the main thread shows progress and takes the signals."""
    launcher.connect()
    with _stop_on_signal(run, console), ProgressView(run, plan.num_steps, console) as view:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(trainer.fit, job, int(job.config["scale"]["workers"]))
            _watch(future, run, view)
        return future.result()


def _watch(future: Future[TrainResult], run: Run, view: ProgressView) -> None:
    """Until the future is done: show progress, and tell the world that this driver lives."""
    told = time.monotonic()
    while not future.done():
        wait([future], timeout=0.5)
        view.poll()
        if time.monotonic() - told >= HEARTBEAT_EVERY_S:
            run.heartbeat()
            told = time.monotonic()


@contextmanager
def _stop_on_signal(run: Run, console: Console) -> Iterator[None]:
    """SIGTERM and SIGINT ask the run to stop by its one channel; a second SIGINT gives up waiting."""

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and run.stop_requested():
            raise KeyboardInterrupt
        run.request_stop(f"{signal.Signals(number).name} at the driver")
        console.print("Stopping after this step, with a checkpoint ... (Ctrl-C again to give up)", highlight=False)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(
    run: Run, resolved: ResolvedRun, settings: Settings, plan: RunPlan, result: TrainResult, console: Console
) -> None:
    """Publish, write the report, say where it is."""
    publish = resolved.config.publish
    manifest = _publish(publish.name, run, resolved, settings, plan, result) if publish else None
    report = write_report(run, resolved, plan, result, manifest.ref if manifest else None)
    published = {"model": manifest.ref} if manifest else {}
    run.set_state(RunState.SUCCEEDED, step=result.step, report=report, **published)
    if result.gate:
        alive = f"alive {result.gate.alive}/{result.gate.total}, reloaded = trained"
        console.print(f"Gate passed: {alive} within {result.gate.largest_difference:.2g} nats", highlight=False)
    if manifest:
        console.print(f"Published [bold]{manifest.ref}[/]  (sha256 {manifest.digest[:12]})", highlight=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def _publish(
    family: str, run: Run, resolved: ResolvedRun, settings: Settings, plan: RunPlan, result: TrainResult
) -> Manifest:
    config = resolved.config
    draft = ManifestDraft(
        base_model=config.model.id,
        base_digest=plan.base.digest,
        renderer_digest=plan.train.renderer_digest,
        rank=config.method.r,
        alpha=config.method.alpha,
        config=config.model_dump(mode="json", by_alias=True),
        data={
            name: {"source": card.source, "sha256": card.source_sha256, "rows": card.rows, "tokens": card.tokens}
            for name, card in (("train", plan.train), ("eval", plan.eval))
            if card
        },
        metrics=result.metrics,
        run=run.id,
        versions={package: importlib.metadata.version(package) for package in VERSIONED},
    )
    with tempfile.TemporaryDirectory(prefix="loray-publish-") as directory:
        for name in storage.list_names(run.path("model")):
            storage.fetch_file(run.path("model", name), Path(directory) / name, None)
        return Registry(settings.home).publish(family, Path(directory), draft)


def _is_dead(host: object, pid: object) -> bool:
    """Whether the process of this host is gone; of another host nothing is known, so it counts as alive."""
    if host != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
