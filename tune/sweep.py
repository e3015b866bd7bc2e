"""A sweep from its file to its leaderboard: check, try, rank, publish. What `jobs/sweep.py` and the CLI call.

    sweep = run_sweep(load_sweep("sweep.yaml"), load_settings(), Console())

The driver owns the sweep's status; each trial's driver its run and the trial's record. Wrong input raises before a sweep
exists. A sweep that was stopped or whose driver was killed goes on with `resume`: what has ended is never run again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from service import launcher, storage
from service.config import checked, report, run_from_json
from service.config_values import override, put
from service.domain import Manifest, ModelRef, RunState
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError, TrainingError
from service.registry import Registry
from service.runs import Run, check_id
from service.settings import Settings
from service.status import beating, is_driven, this_process, told_apart
from service.stop_signals import heard
from service.sweep_config import STEPS, PbtBlock, SearchBlock, SweepConfig
from tune import leaderboard, plots
from tune import space as spaces
from tune.directory import Sweep, TrialRecord
from tune.sweep_file import ResolvedSweep, across
from tune.table import SweepView, best_so_far, summary
from tune.trial import TrialJob, never_stops
from tune.trials import ENDED, Trial, Trials

LOOK_EVERY_S = 1.0
LOOKING_SHARE = 0.1  # of the driver's time at most, where looking at many trials takes long
SHARING_AT_ONCE = 4  # trials on one copy of the base, unless search.parallel says how many
BUDGET = "the budget"  # what a stop begins with that a budget asks for
RESUMABLE = ("search.trials", "search.parallel", "search.budget", "publish")


def run_sweep(
    resolved: ResolvedSweep,
    settings: Settings,
    console: Console,
    *,
    resume: Sweep | None = None,
    sweep_id: str | None = None,
) -> Sweep:
    """Try all trials, or go on with `resume`; the sweep as it ended or was stopped. Raises what ended it otherwise.

    `sweep_id` is a new sweep's, unless it is made of the time and its name.
    """
    launcher.prepare_environment()
    job, parallel = _planned(resolved, settings, console)
    sweep = resume or Sweep.create(settings.home, _name(resolved), resolved, sweep_id)
    spent_s = float(sweep.status().details.get("seconds", 0.0))
    sweep.clear_stop()  # what is asked from now on stays
    sweep.set_state(RunState.RUNNING, **this_process())
    job = TrialJob(**{**vars(job), "sweep": sweep.id})
    try:
        _say(console, f"Sweep {sweep.id}  ({sweep.uri})")
        with beating(sweep.heartbeat):
            trials = _tried(sweep, resolved, job, parallel, spent_s, console)
            _end(sweep, resolved, trials, settings, console)
    except BaseException as error:
        _mark_failed(sweep, error)
        _say(console, f"Go on: loray sweep --resume {sweep.id}")
        raise
    return sweep


def reopen(home: str, id_or_latest: str, overrides: Sequence[str] = ()) -> tuple[Sweep, ResolvedSweep]:
    """A sweep that can go on, with `overrides` of RESUMABLE. Raises ConflictError when it is over, or its driver lives."""
    sweep = Sweep.open(home, id_or_latest)
    status = sweep.status()
    if status.state is RunState.SUCCEEDED:
        raise ConflictError(f"sweep {sweep.id} is over: there is nothing to resume. loray sweep show {sweep.id}")
    resolved = _changed(sweep.resolved(), overrides)
    if is_driven(status):
        raise ConflictError(f"sweep {sweep.id} is running (heartbeat {status.updated_at}). Stop it first.")
    if status.state in (RunState.RUNNING, RunState.LOST):
        sweep.declare_dead()
    if overrides:
        sweep.set_resolved(resolved)
    return sweep, resolved


def reopen_if_begun(home: str, sweep_id: str) -> tuple[Sweep, ResolvedSweep] | None:
    """The sweep of this id, as `reopen` gives it; one that is over too. None where none was begun.

    Raises ConflictError where a driver is heard.
    """
    try:
        sweep = Sweep.open(home, check_id(sweep_id, "sweep"))
    except NotFoundError:
        return None
    over = told_apart(sweep.status).state is RunState.SUCCEEDED
    return (sweep, sweep.resolved()) if over else reopen(home, sweep_id)


def publish_best(sweep: Sweep, family: str, settings: Settings) -> Manifest:
    """Publish the best finished trial's model as the next version of `family`. Raises NotFoundError where there is none."""
    from service.training.driver import digests, publish_model, published_once
    from service.training.plan import make_run_plan

    resolved = sweep.resolved()
    first = leaderboard.best(Trials(sweep, resolved).look(), resolved.config.search.mode)
    if first is None or first.run is None:
        raise NotFoundError(
            f"sweep {sweep.id} has no finished trial, so it has no model yet. Let it go on, or resume it."
        )
    run, registry = Run.open(settings.home, first.run), Registry(settings.home)

    def publish() -> Manifest:
        config = run_from_json(run.resolved(), run.run_yaml())
        plan = make_run_plan(config, settings, digests(run))
        return publish_model(family, run, config, settings, plan, run.figures(run.status().step or 0))

    return published_once(family, run, registry, publish)


def write_leaderboard(sweep: Sweep, resolved: ResolvedSweep, trials: Sequence[Trial], model: str | None) -> str:
    """Write the page, the JSON and the plots; the URI of the page."""
    metric, mode = resolved.config.search.metric, resolved.config.search.mode
    board = leaderboard.as_json(trials, metric, mode, model)
    first = leaderboard.best(trials, mode)
    run_file = Run(sweep.home, first.run).run_yaml() if first and first.run else ""
    if any(trial.curve for trial in trials):
        storage.write_bytes(sweep.path("metric.png"), plots.metric_by_step(trials, metric, mode))
        storage.write_bytes(sweep.path("parallel.png"), plots.parallel_coordinates(trials, metric, mode))
    if board["importance"]:
        storage.write_bytes(sweep.path("importance.png"), plots.importance_bars(board["importance"]))
    storage.write_bytes(sweep.path("leaderboard.json"), leaderboard.dumps(board))
    page = sweep.path("leaderboard.md")
    storage.write_bytes(page, leaderboard.page(f"Sweep {sweep.id}", board, run_file).encode())
    return page


def over_budget(search: SearchBlock, tokens: int, seconds: float) -> str | None:
    """Why the sweep must end, where its budget is spent."""
    if search.budget.tokens is not None and tokens >= search.budget.tokens:
        return f"{BUDGET} of {search.budget.tokens:,} tokens is spent"
    if search.budget.seconds is not None and seconds >= search.budget.seconds:
        return f"{BUDGET} of {search.budget.seconds:g} s is spent"
    return None


def trials_at_once(search: SearchBlock, fit: int, nodes: int, workers: int, gpu: bool) -> int:
    """How many trials train at a time. Unless given: all that have GPUs, and of those that train on CPUs one a node."""
    wanted = search.parallel or (fit if gpu else nodes // workers)
    return max(1, min(wanted, fit))


def _planned(resolved: ResolvedSweep, settings: Settings, console: Console) -> tuple[TrialJob, int]:
    """What all trials are given, and how many train at once; prepares the data. Raises what is wrong with the base."""
    from service.training.placement import Cluster, runs_that_fit
    from service.training.plan import make_run_plan

    corners = [resolved.trial("the sweep's base", draw, {}) for draw in spaces.corners(resolved.space)]
    run = max(corners, key=lambda corner: corner.config.scale.max_workers)
    _say(console, f"Planning: model {run.config.model.id}, data {run.config.data.train}")
    plan = make_run_plan(run, settings)
    if problem := never_stops(resolved, run.config, plan.num_steps):
        raise ConfigError(problem)
    launcher.connect()
    cluster, scale = Cluster.current(), run.config.scale
    fit, search = runs_that_fit(cluster, scale), resolved.config.search
    gpu, nodes = bool(cluster.total("GPU")), sum(1 for node in cluster.nodes if node.get("CPU"))
    population = isinstance(resolved.config.stop, PbtBlock)
    if population:
        search = search.model_copy(update={"parallel": resolved.num_trials})
        if fit < resolved.num_trials:
            raise ConfigError(
                f"stop: pbt trains all {resolved.num_trials} trials at once, and the cluster has room for {fit}. Lower "
                "search.trials or scale.workers, or set stop: asha."
            )
    if search.share_base:
        parallel = search.parallel or SHARING_AT_ONCE
    else:
        parallel = trials_at_once(search, fit, nodes, scale.max_workers, gpu)
    if search.parallel and search.parallel > parallel:
        _say(console, f"The cluster has room for {parallel} trial(s) at once, not {search.parallel}: the others queue.")
    how = f"search {search.algorithm}, stop {resolved.config.stop.type}"
    at_once = f"{min(parallel, resolved.num_trials)} at a time{' on one copy of the base' if search.share_base else ''}"
    num_steps = None if any(key.startswith(STEPS) for key in resolved.space) else plan.num_steps
    what = f"{resolved.num_trials} trials{f' of {num_steps} steps' if num_steps else ''}"
    _say(console, f"{what}, {at_once}, {how}")
    here, metric, sharing = str(Path.cwd()), search.metric, 1 if search.share_base else parallel
    return TrialJob(settings.home, str(settings.cache), here, "", metric, num_steps, sharing), parallel


def _tried(
    sweep: Sweep, resolved: ResolvedSweep, job: TrialJob, parallel: int, spent_s: float, console: Console
) -> list[Trial]:
    """Run what has not ended; how all trials stand then."""
    from tune.tuner import Queue

    known = {record.number for record in sweep.records()}
    for number, draw in enumerate(resolved.known_draws or (), start=1):
        if number not in known:
            sweep.insist(partial(sweep.write_record, TrialRecord(number=number, draw=draw)))
    look = Trials(sweep, resolved)
    trials = look.look()
    ended = [trial for trial in trials if trial.state in ENDED]
    over = {trial.number for trial in ended}
    most = resolved.num_trials  # fewer than were drawn, where that was set on resuming
    waiting = tuple(record for record in sweep.records() if record.number not in over and record.number <= most)
    search = resolved.config.search
    view = SweepView(search.metric, search.mode, resolved.num_trials, console, trials)
    stop = _Stop(sweep, view.say)
    with view, heard(stop.ask, lambda: stop.reason is not None):
        tick = _Tick(sweep, resolved, look, view, stop, spent_s)
        if waiting or len(ended) < most:
            if search.share_base:
                from tune.shared import run_trials_together as run_trials
            else:
                from tune.tuner import run_trials
            new = range(1 + max((trial.number for trial in trials), default=0), most + 1)
            run_trials(sweep, resolved, job, Queue(waiting, new), ended, parallel, tick)
        tick.last()
    sweep.insist(lambda: sweep.heartbeat(seconds=spent_s + tick.elapsed_s))
    return sweep.insist(look.look)


class _Stop:
    """A request to stop, by a signal or by the sweep's budget, and whether the sweep's one channel has it."""

    def __init__(self, sweep: Sweep, say: Callable[[str], None]) -> None:
        self._sweep, self._say = sweep, say
        self.reason: str | None = None
        self._delivered = False

    def ask(self, reason: str) -> None:
        """Remember a request; `deliver` passes it on. A signal handler may call it: it touches no storage."""
        self.reason = self.reason or reason

    def deliver(self) -> None:
        """Tell the trials. Storage that is away is tried again next time, by raising StorageError."""
        if self.reason and not self._delivered:
            self._sweep.request_stop(self.reason)
            self._delivered = True
            self._say(f"Stopping: {self.reason}. Running trials end with a checkpoint ... (Ctrl-C again to give up)")


class _Tick:
    """What the driver does while trials go on: look, show, watch the budget, pass a stop on."""

    def __init__(
        self, sweep: Sweep, resolved: ResolvedSweep, look: Trials, view: SweepView, stop: _Stop, spent_s: float
    ) -> None:
        self._sweep, self._search, self._look, self._view, self._stop = sweep, resolved.config.search, look, view, stop
        self._spent_s, self._began, self._due = spent_s, time.monotonic(), 0.0

    @property
    def elapsed_s(self) -> float:
        """Since this driver has begun."""
        return time.monotonic() - self._began

    def __call__(self) -> None:
        began = time.monotonic()
        if began < self._due:
            return
        try:
            self._stop.deliver()
            self._once()
        except StorageError as error:
            self._view.say(f"trials cannot be read just now: {error}")
        cost = time.monotonic() - began
        self._due = time.monotonic() + max(LOOK_EVERY_S, cost / LOOKING_SHARE)

    def last(self) -> None:
        """Show how it ended."""
        self._view.show(self._sweep.insist(self._look.look))

    def _once(self) -> None:
        trials = self._look.look()
        self._view.show(trials)
        seconds = self._spent_s + self.elapsed_s
        if reason := over_budget(self._search, leaderboard.tokens(trials), seconds):
            self._stop.ask(reason)
        self._sweep.heartbeat(seconds=seconds)


def _end(sweep: Sweep, resolved: ResolvedSweep, trials: list[Trial], settings: Settings, console: Console) -> None:
    """Rank, publish, say where it is and how it goes on."""
    search, publish = resolved.config.search, resolved.config.publish
    stopped, first = sweep.insist(sweep.stop_requested), leaderboard.best(trials, search.mode)
    num_trials = resolved.num_trials
    wanted = [trial for trial in trials if trial.number <= num_trials]
    left = [trial.number for trial in wanted if trial.state not in ENDED]
    spent = stopped is not None and stopped.startswith(BUDGET)
    whole = not left and len(wanted) == num_trials
    published = publish and first and (spent or (whole and stopped is None))
    manifest = publish_best(sweep, publish.name, settings) if publish and published else None
    page = sweep.insist(lambda: write_leaderboard(sweep, resolved, trials, manifest.ref if manifest else None))
    console.print(summary(trials, search.metric, search.mode))
    for line in _startups(trials):
        _say(console, line)
    if first is None:
        _say(console, best_so_far(trials, search.metric, search.mode))
    elif manifest:
        _say(console, f"Best: trial {first.number}, published as {manifest.ref}  (sha256 {manifest.digest[:12]})")
    else:
        _say(console, f"Best: trial {first.number}. Publish its model: loray sweep publish {sweep.id} NAME")
    _say(console, f"Leaderboard: {page}")
    model = {"model": manifest.ref} if manifest else {}
    if stopped is not None and not (spent and whole):
        sweep.set_state(RunState.STOPPED, stopped, **model)
        more = " --set search.budget=null" if spent else ""
        _say(console, f"Stopped: {stopped}. Go on: loray sweep --resume {sweep.id}{more}")
    elif left:
        raise TrainingError(f"trials {left} of sweep {sweep.id} were interrupted: {'; '.join(_whys(trials))}.")
    elif first is None:
        raise TrainingError(f"no trial of sweep {sweep.id} has finished: {'; '.join(_whys(trials))}")
    else:
        sweep.set_state(RunState.SUCCEEDED, stopped or "", best=first.number, **model)


def _startups(trials: Sequence[Trial]) -> Iterator[str]:
    """What Tune and Train cost around a trial."""
    seconds = sorted(trial.startup_s for trial in trials if trial.startup_s is not None)
    if seconds:
        yield (
            f"From a trial's beginning to its first step: median {statistics.median(seconds):.1f} s, "
            f"shortest {seconds[0]:.1f} s, longest {seconds[-1]:.1f} s"
        )


def _whys(trials: Sequence[Trial]) -> list[str]:
    return [f"trial {trial.number} {trial.state}: {trial.why.splitlines()[0]}" for trial in trials if trial.why][:3]


def _changed(resolved: ResolvedSweep, overrides: Sequence[str]) -> ResolvedSweep:
    values: dict[str, Any] = resolved.config.model_dump(mode="json", by_alias=True)
    problems = []
    for key, value in map(override, overrides):
        if key.startswith(RESUMABLE):
            put(values, key, {"name": value} if key == "publish" and isinstance(value, str) else value)
        else:
            problems.append(f"{key}: a sweep that goes on keeps it. Changeable are {', '.join(RESUMABLE)}.")
    config, wrong = checked(SweepConfig, values)
    problems += across(config, resolved.space, resolved.base) if config else ()
    if config is None or problems:
        raise ConfigError(report("--set beside --resume", [*problems, *wrong]))
    return ResolvedSweep(config, resolved.space, resolved.base, resolved.text)


def _name(resolved: ResolvedSweep) -> str:
    publish = resolved.config.publish
    return ModelRef.parse(publish.name).name[:40].rstrip("._-") if publish else "sweep"


def _mark_failed(sweep: Sweep, error: BaseException) -> None:
    """The sweep's last status; where even that cannot be written, the error says so and the sweep will read as lost."""
    try:
        sweep.set_state(RunState.FAILED, f"{type(error).__name__}: {error}")
    except (ConflictError, StorageError) as another:
        error.add_note(f"and the sweep could not be marked as failed: {another}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
