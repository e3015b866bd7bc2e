"""A run from its resolved config to its end: plan, train, gate, report, publish. What `jobs/train.py` and the CLI call.

The driver owns the run's status and its heartbeat; the loop, in other processes, owns everything else in the directory.
Wrong input raises before a run exists; once it exists, whatever happens is also its last status.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from service import launcher, storage
from service.config import LoraBlock, ResolvedRun, RunConfig, read_text
from service.domain import Manifest, ModelRef, RunState
from service.errors import ConflictError, LorayError, NotFoundError, StorageError, TrainingError
from service.registry import ManifestDraft, Registry
from service.runs import Run, check_id, is_begun, list_runs
from service.settings import Settings, scratch
from service.status import beating, is_driven, this_process, told_apart
from service.stop_signals import heard
from service.training.attempts import train_to_the_end
from service.training.checkpoint import demand_same
from service.training.exported import Exported, StorageAway, project_of
from service.training.loop import Metrics, TrainJob, TrainResult
from service.training.patience import Patience
from service.training.plan import Digests, RunPlan, make_run_plan
from service.training.progress import ProgressView
from service.training.report import startup, write_report
from service.training.stop_channel import StopChannel
from service.training.trainer import Crew, SharedCrew

VERSIONED = ("loray", "torch", "transformers", "peft", "ray", "numpy")


def train_run(
    resolved: ResolvedRun,
    settings: Settings,
    console: Console,
    *,
    resume: Run | None = None,
    run_id: str | None = None,
    profile: bool = False,
    asked_at: float = 0.0,
    sharing: int = 1,
    crew: Crew | SharedCrew | None = None,
) -> Run:
    """Train `resolved` to its end, or go on with `resume`; the finished or stopped run. Raises what ended it.

    `profile` leaves a trace of a few steps in the run. `asked_at` (seconds since the epoch) is where start-up is counted
    from. `sharing` is the number of runs like this one that are to have room on the cluster at once. A `crew` keeps its workers
    for the next run.
    """
    line = f"Planning: model {resolved.config.model.id}, data {resolved.config.data.train}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    plan = make_run_plan(resolved, settings, digests(resume))
    if resume:
        demand_same(resume.uri, _job(resolved, settings, resume, 0, plan).identity)
    run = resume or Run.create(settings.home, run_name(resolved), resolved.text, resolved.as_json(), id=run_id)
    if resume:
        run.set_resolved(resolved.as_json())  # with what was set on resuming
    attempt = _begin(run, plan)
    away = StorageAway(run.id, project_of(resolved.config), "driver")
    with away.showing(), driven(run, away.seen(run.heartbeat)):
        console.print(f"Run {run.id}  ({run.uri})", markup=False, highlight=False, soft_wrap=True)
        _warn_of_short_notice(console)
        job = _job(resolved, settings, run, attempt, plan)
        job = dataclasses.replace(job, profile=profile, asked_at=asked_at, sharing=sharing)
        _train_and_finish(job, run, resolved, settings, plan, console, crew)
    return run


@contextmanager
def driven(run: Run, heartbeat: Callable[[], None] | None = None) -> Iterator[None]:
    """What a driver does for a run that it has begun: a heartbeat, and what ends it early becomes its last status."""
    try:
        with beating(heartbeat or run.heartbeat):
            yield
    except BaseException as error:
        _mark_failed(run, error)
        if isinstance(error, LorayError) and isinstance(error, (ValueError, LookupError)):
            # Not a mistake in the input any more: there is a run, and it has failed.
            raise TrainingError(f"run {run.id} failed: {type(error).__name__}: {error}") from error
        raise


def _mark_failed(run: Run, error: BaseException) -> None:
    """The run's last status; where even that cannot be written, the error says so and the run will read as lost."""
    try:
        run.set_state(RunState.FAILED, f"{type(error).__name__}: {error}", error=type(error).__name__)
    except ConflictError:
        pass  # it had already ended, and only what came after has failed; or another drives it
    except StorageError as another:
        error.add_note(f"and the run could not be marked as failed: {another}")


def _train_and_finish(
    job: TrainJob,
    run: Run,
    resolved: ResolvedRun,
    settings: Settings,
    plan: RunPlan,
    console: Console,
    crew: Crew | SharedCrew | None,
) -> None:
    result = _train(job, run, plan, console, crew)
    if result.stopped is None:
        _finish(run, resolved, settings, plan, result, console)
        return
    stopped = result.stopped
    patience_of(run, resolved, console).insist(lambda: run.set_state(RunState.STOPPED, stopped, step=result.step))
    go_on = f"Go on: loray train --resume {run.id}"
    console.print(
        f"Stopped at step {result.step}: {result.stopped}. {go_on}", markup=False, highlight=False, soft_wrap=True
    )


def digests(resume: Run | None) -> Digests | None:
    """The prepared data of a run that goes on: its source files may have moved, or never have been on this machine."""
    details = resume.status().details if resume else {}
    if "train_digest" not in details:
        return None
    return details["train_digest"], details["eval_digest"], details.get("test_digest")


def run_name(resolved: ResolvedRun) -> str:
    """What a run is called: after the model it publishes, else after its method; 40 characters at most, for its id."""
    publish = resolved.config.publish
    name = ModelRef.parse(publish.name).name if publish else resolved.config.method.type
    return name[:40].rstrip("._-")


def reopen(home: str, id_or_latest: str) -> Run:
    """A run that can go on. Raises ConflictError when it has succeeded, or its driver still lives."""
    run = Run.open(home, id_or_latest)
    status = run.status()
    if status.state is RunState.SUCCEEDED:
        raise ConflictError(f"run {run.id} has succeeded: there is nothing to resume. Start a new run.")
    if is_driven(status):
        raise ConflictError(
            f"run {run.id} is running (heartbeat {status.updated_at}). Stop it first: loray runs stop {run.id}"
        )
    if status.state in (RunState.RUNNING, RunState.LOST):
        run.declare_dead()
    return run


def reopen_if_begun(home: str, run_id: str) -> Run | None:
    """The run of this id, as `reopen` gives it; one that has succeeded too. None where none was begun.

    Raises ConflictError where a driver is heard.
    """
    try:
        run = Run.open(home, check_id(run_id))
    except NotFoundError:
        return None
    return run if told_apart(run.status).state is RunState.SUCCEEDED else reopen(home, run.id)


def newest_run_of(home: str, run_file: str) -> str:
    """The id of the newest run made from this very run file. Raises NotFoundError."""
    text = read_text(run_file, "run file")
    for run in reversed(list_runs(home)):
        if run.run_yaml() == text and is_begun(home, run.id):
            return run.id
    raise NotFoundError(
        f"no run was made from {run_file} as it is now. List runs with `loray runs list`, resume by id."
    )


def _begin(run: Run, plan: RunPlan) -> int:
    """Mark the run as running here; the number of this attempt. Raises ConflictError when somebody else has it."""
    cards = {"train": plan.train, "eval": plan.eval, "test": plan.test}
    data: dict[str, Any] = {f"{side}_digest": card.digest if card else None for side, card in cards.items()}
    return begin(run, num_steps=plan.num_steps, **data)


def begin(run: Run, **details: Any) -> int:
    """Mark a run as running in this process; the number of this attempt. Raises ConflictError when somebody else has it."""
    attempt = int(run.status().details.get("attempt", 0)) + 1
    asked_before = run.stop_requested()
    run.set_state(RunState.RUNNING, attempt=attempt, **this_process(), **details)
    if asked_before:
        run.withdraw_stop(asked_before)  # what is asked from now on stays
    return attempt


def _job(resolved: ResolvedRun, settings: Settings, run: Run, attempt: int, plan: RunPlan) -> TrainJob:
    return TrainJob(
        home=settings.home,
        cache=str(settings.cache),
        run_id=run.id,
        attempt=attempt,
        config=_travelling(resolved.config).model_dump(mode="json", by_alias=True),
        base_source=_source(resolved.config.model.id, plan),
        base_digest=plan.base.digest,
        train_digest=plan.train.digest,
        eval_digest=plan.eval.digest if plan.eval else None,
        test_digest=plan.test.digest if plan.test else None,
    )


def _travelling(config: RunConfig) -> RunConfig:
    """The config as workers take it: Ray Train gives them another working directory, where a relative path means nothing."""
    method = config.method
    if not isinstance(method, LoraBlock) or not method.init_from or not Path(method.init_from).expanduser().is_dir():
        return config
    absolute = str(Path(method.init_from).expanduser().absolute())
    return config.model_copy(update={"method": method.model_copy(update={"init_from": absolute})})


def _source(name: str, plan: RunPlan) -> str:
    """What a worker resolves, for the same reason."""
    return str(plan.base.path) if Path(name).expanduser().is_dir() else name


def _train(job: TrainJob, run: Run, plan: RunPlan, console: Console, crew: Crew | SharedCrew | None) -> TrainResult:
    launcher.connect()
    stop = StopChannel(run)
    project = project_of(RunConfig.model_validate(job.config))
    exported = Exported(run, project, plan.num_steps, job.attempt)
    with (
        stop_on_signal(stop, console),
        ProgressView(run, plan.num_steps, console) as view,
        exported.showing(),
    ):
        result = train_to_the_end(job, run, stop, view.say, lambda: exported.take(view.poll()), crew)
    stop.deliver()  # a signal too late for this run is one for the run that it is a part of
    return result


def _warn_of_short_notice(console: Console) -> None:
    """A job submitted without it is killed 3 s after SIGTERM, which may be too short for a checkpoint."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and "RAY_JOB_STOP_WAIT_TIME_S" not in os.environ:
        console.print(
            "Stopping this job by Ray leaves 3 s for a checkpoint. Use `loray runs stop`, or submit with "
            '--runtime-env-json \'{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}\'.',
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def stop_on_signal(stop: StopChannel, console: Console) -> AbstractContextManager[None]:
    """SIGTERM and SIGINT ask the run to stop by its one channel; a second SIGINT gives up waiting."""

    def ask(reason: str) -> None:
        stop.ask(reason)
        console.print("Stopping after this step, with a checkpoint ... (Ctrl-C again to give up)", highlight=False)

    return heard(ask, lambda: stop.asked is not None)


def _finish(
    run: Run, resolved: ResolvedRun, settings: Settings, plan: RunPlan, result: TrainResult, console: Console
) -> None:
    """Publish, write the report, say where it is. Storage that is away is asked again: the training is done."""
    insist = patience_of(run, resolved, console).insist
    insist(run.heartbeat)  # ConflictError where another driver has gone on with it
    publish = resolved.config.publish
    manifest = None
    if publish:
        registry = Registry(settings.home)
        manifest = insist(
            lambda: published_once(
                publish.name,
                run,
                registry,
                lambda: publish_model(publish.name, run, resolved, settings, plan, result.metrics),
            )
        )
    report, warning = insist(lambda: write_report(run, resolved, plan, result, manifest.ref if manifest else None))
    published = {"model": manifest.ref} if manifest else {}
    insist(lambda: run.set_state(RunState.SUCCEEDED, step=result.step, report=report, **published))
    if result.gate:
        alive = f"alive {result.gate.alive}/{result.gate.total}, reloaded = trained"
        console.print(f"Gate passed: {alive} within {result.gate.largest_difference:.2g} nats", highlight=False)
    if manifest:
        console.print(f"Published [bold]{manifest.ref}[/]  (sha256 {manifest.digest[:12]})", highlight=False)
    console.print(f"From the command to the first step: {startup(run)}", highlight=False)
    if warning:
        console.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def patience_of(run: Run, resolved: ResolvedRun, console: Console) -> Patience:
    """What a driver writes at the end is written again while storage is away, for as long as the run file allows."""

    def say(kind: str, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return Patience([run.uri], resolved.config.checkpoint.retry_s, "finishing the run", say)


def published_once(family: str, run: Run, registry: Registry, publish: Callable[[], Manifest]) -> Manifest:
    """What `publish` gives, unless this run has published before: in an attempt cut short, or by a call whose answer was lost."""
    manifests = (registry.manifest(ModelRef.parse(family).at(v)) for v in reversed(registry.versions(family)))
    return next((manifest for manifest in manifests if manifest.run == run.id), None) or publish()


def publish_model(
    family: str, run: Run, resolved: ResolvedRun, settings: Settings, plan: RunPlan, metrics: Metrics
) -> Manifest:
    """Make what a run has trained, and its gate has passed, the next version of `family`."""
    config, method = resolved.config, resolved.config.method
    draft = ManifestDraft(
        kind="adapter" if isinstance(method, LoraBlock) else "full",
        method=method.type,
        base_model=config.model.id,
        base_digest=plan.base.digest,
        base_bits=method.base_bits if isinstance(method, LoraBlock) else 16,
        renderer_digest=plan.train.renderer_digest,
        rank=max([method.r, *method.rank_pattern.values()]) if isinstance(method, LoraBlock) else 0,
        alpha=method.alpha if isinstance(method, LoraBlock) else 0.0,
        config=config.model_dump(mode="json", by_alias=True),
        data={
            name: {"source": card.source, "sha256": card.source_sha256, "rows": card.rows, "tokens": card.tokens}
            for name, card in (("train", plan.train), ("eval", plan.eval), ("test", plan.test))
            if card
        },
        metrics=metrics,
        run=run.id,
        versions={package: importlib.metadata.version(package) for package in VERSIONED},
    )
    with scratch(settings.cache) as directory:
        for name in storage.list_names(run.path("model")):
            storage.fetch_file(run.path("model", name), directory / name, None)
        if draft.kind == "full" and config.model.chat_template:  # served as it was trained, not as its base was
            text = read_text(config.model.chat_template, "model.chat_template", "Jinja")
            (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
        return Registry(settings.home).publish(family, directory, draft)
