"""One trial's road: its run is begun, gone on with or taken over from another's checkpoint, in a thread; what it measures
comes out row by row.

The run is trained by `training/driver.py`, as any run is. Knows nothing of Ray Tune: `tuner.py` calls it there.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from service.config import ResolvedRun, RunConfig
from service.domain import RunState
from service.errors import ConflictError, NotFoundError, StorageError
from service.logs import LogReader
from service.runs import Run, new_id
from service.settings import Settings
from service.status import LOST_AFTER_S
from service.sweep_config import AshaBlock, NoStopBlock, PbtBlock
from tune.directory import Sweep, TrialRecord, TrialRun
from tune.sweep_file import ResolvedSweep
from tune.trials import EARLY, ENDED, IN_THE_WAY, trial_state

if TYPE_CHECKING:
    from service.training.trainer import Crew, SharedCrew

LOOK_EVERY_S = 0.5
LOOK_FOR_STOP_EVERY_S = 2.0
LEFT = "left: goes on from another trial's checkpoint"
PBT_KEEPS = 4  # checkpoints: one that is being taken over must not be pruned


@dataclass(frozen=True)
class TrialJob:
    """What a trial needs, in plain values that travel between processes. `num_steps`: None where trials differ in it."""

    home: str
    cache: str
    directory: str  # where the data's relative paths begin
    sweep: str
    metric: str
    num_steps: int | None
    sharing: int


@dataclass(frozen=True)
class Report:
    """A measurement. `replayed`: an earlier attempt made it, and what followed from it has been decided."""

    step: int
    progress: float
    value: float
    replayed: bool


class TrialThread:
    """The newest run of a trial, being trained in a thread of this process, by the workers of `crew`.

    `donor`: (run, step) that it goes on from.
    """

    def __init__(
        self,
        job: TrialJob,
        number: int,
        draw: dict[str, Any],
        donor: tuple[str, int] | None,
        crew: Crew | SharedCrew,
        *,
        replay: bool,
    ) -> None:
        self._crew = crew
        self._job, self._draw, self._donor, self._replay = job, draw, donor, replay
        self._settings = Settings(job.home, Path(job.cache))
        self._sweep = Sweep(job.home, job.sweep)
        self._resolved = self._sweep.insist(self._sweep.resolved)
        self._record = self._sweep.insist(lambda: self._sweep.record(number))
        self._run: Run | None = None
        self._reader: LogReader | None = None
        self._reported = 0
        self._unread: list[tuple[str, dict[str, Any]]] = []
        self._look_for_stop_at = 0.0
        self._failure: BaseException | None = None
        self._decided: str | None = None  # by a stopping rule, of the run before it went on
        self._thread = threading.Thread(target=self._train, name=f"trial-{number}", daemon=True)
        self._thread.start()

    @property
    def run(self) -> Run | None:
        """The run, once there is one."""
        return self._run

    @property
    def alive(self) -> bool:
        """Whether it still trains."""
        return self._thread.is_alive()

    @property
    def failure(self) -> str | None:
        """What ended it, where it failed."""
        return None if self._failure is None else f"{type(self._failure).__name__}: {self._failure}"

    def new_reports(self) -> list[Report]:
        """What has been measured since the last call, ascending. Passes a stop of the sweep on to the run.

        Storage that is away is asked again next time: the run itself says when it stays away.
        """
        try:
            self._pass_stop_on()
            return list(self._read())
        except StorageError:
            return []

    def stop(self, reason: str, within_s: float) -> bool:
        """Ask the run to stop with a checkpoint, and wait; whether it did."""
        end = time.monotonic() + within_s
        while self.alive and time.monotonic() < end:
            with suppress(StorageError, NotFoundError):
                if self._run and self._run.status().state is RunState.RUNNING:
                    self._run.propose_stop(reason)
            self._thread.join(LOOK_EVERY_S)
        return not self.alive

    def _pass_stop_on(self) -> None:
        if time.monotonic() < self._look_for_stop_at or self._run is None:
            return
        self._look_for_stop_at = time.monotonic() + LOOK_FOR_STOP_EVERY_S
        reason = self._decided or self._sweep.stop_requested()
        if reason and self._run.status().state is RunState.RUNNING:
            self._run.propose_stop(reason)

    def _read(self) -> list[Report]:
        if self._run is None:
            return []
        self._reader = self._reader or LogReader(self._run.path("metrics"))
        self._unread += self._reader.new_rows()  # kept where the status cannot be read just now
        details = self._run.status().details if self._unread else {}
        rows, self._unread = self._unread, []
        found = []
        for writer, row in sorted(rows, key=lambda one: int(one[1]["step"])):
            step, value = int(row["step"]), row.get(self._job.metric)
            if value is None or step <= self._reported:
                continue
            self._reported = step
            old = int(writer.split("-")[0].removeprefix("a")) < int(details["attempt"])
            if self._replay or not old:
                found.append(Report(step, step / int(details["num_steps"]), float(value), replayed=old))
        return found

    def _train(self) -> None:
        try:
            with _log_of(self._settings, self._sweep.id, self._record.number) as console:
                self._train_on(console)
        except BaseException as error:
            self._failure = error
            if self._run is None:  # the run itself has nothing to say: the trial's record must
                again = _existing(self._job.home, self._record) or type(error).__name__ in IN_THE_WAY
                kind = "hindrance" if again else "problem"
                self._sweep.write_record(self._record.model_copy(update={kind: self.failure}))

    def _train_on(self, console: Console) -> None:
        from service.training.driver import train_run

        asked_at = time.time()
        os.chdir(self._job.directory)
        if self._record.hindrance:
            self._record = self._record.model_copy(update={"hindrance": ""})
            self._sweep.write_record(self._record)
        record = self._record
        existing = _existing(self._job.home, record)
        if self._donor and not _came_from(record, self._donor):
            existing = self._adopt(self._donor, asked_at)
        elif existing is None:
            self._record = record = _with_run(self._sweep, record, TrialRun(
                run=record.run or new_id(self._job.home, f"trial-{record.number}"), draw=self._draw, asked_at=asked_at
            ))  # fmt: skip
        assert self._record.run
        run = Run(self._job.home, self._record.run)
        if existing and trial_state("", existing.status()) in ENDED:
            self._run = run
            return
        asked_before = existing.stop_requested() if existing else None
        self._decided = asked_before if asked_before and asked_before.startswith(EARLY) else None
        resumed = _reopened(existing) if existing else None
        config = self._config_of(self._record)
        watch = threading.Thread(target=self._await_run, args=(run,), name="await-run", daemon=True)
        watch.start()
        train_run(
            config, self._settings, console,
            resume=resumed, run_id=run.id, asked_at=asked_at, sharing=self._job.sharing, crew=self._crew,
        )  # fmt: skip
        self._run = run

    def _await_run(self, run: Run) -> None:
        """From when the driver has marked the run as running here, what it logs may be read."""
        while self._run is None and self.alive:
            with suppress(NotFoundError, StorageError):
                status = run.status()
                if status.state is RunState.RUNNING and status.details.get("pid") == os.getpid():
                    self._run = run
                    return
            self._thread.join(LOOK_EVERY_S)

    def _config_of(self, record: TrialRecord) -> ResolvedRun:
        from service.training.plan import make_run_plan

        name = f"Trial {record.number} of sweep {self._sweep.id}"
        plain = self._resolved.trial(name, record.newest_draw, {})
        num_steps = self._job.num_steps or make_run_plan(plain, self._settings).num_steps
        return self._resolved.trial(name, record.newest_draw, set_in_trials(self._resolved, plain.config, num_steps))

    def _adopt(self, donor: tuple[str, int], asked_at: float) -> Run:
        from service.training.adoption import adopt

        source, step = donor
        name = f"trial-{self._record.number}"
        one = TrialRun(run=new_id(self._job.home, name), draw=self._draw, asked_at=asked_at, source=source)
        wanted = self._record.model_copy(update={"runs": (*self._record.runs, one)})
        config = self._config_of(wanted)
        run, there = adopt(Run(self._job.home, source), step, one.run, name, config)
        self._record = _with_run(self._sweep, self._record, one.model_copy(update={"source_step": there}))
        return run


@contextmanager
def _log_of(settings: Settings, sweep: str, number: int) -> Iterator[Console]:
    """What a run's driver prints goes into a file of this node."""
    path = settings.cache / "sweeps" / sweep / f"trial-{number:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        yield Console(file=file, width=160)


def set_in_trials(resolved: ResolvedSweep, config: RunConfig, num_steps: int) -> dict[str, Any]:
    """What the sweep sets in a trial's run file: a stopping rule needs measurements when it decides, and checkpoints to copy."""
    rule, also = resolved.config.stop, dict[str, Any]()
    if not isinstance(rule, AshaBlock | PbtBlock):
        return also
    share = rule.grace if isinstance(rule, AshaBlock) else rule.every
    every = config.evaluate.every.steps or max(1, math.ceil(num_steps * share))
    if resolved.config.search.metric.startswith("eval/"):
        also["evaluate.every.steps"] = every
    if isinstance(rule, PbtBlock):
        also["checkpoint.every.steps"] = every
        also["checkpoint.keep_last"] = max(PBT_KEEPS, config.checkpoint.keep_last)
    return also


def never_stops(resolved: ResolvedSweep, config: RunConfig, num_steps: int) -> str | None:
    """Why the stopping rule would have nothing to decide by."""
    every, rule = config.evaluate.every.steps, resolved.config.stop
    if isinstance(rule, NoStopBlock) or not resolved.config.search.metric.startswith("eval/") or every < num_steps:
        return None
    return (
        f"evaluate.every.steps: {every}, and a trial has {num_steps} steps: stop: {rule.type} would have nothing to decide by. "
        "Lower it, leave it out, or set stop: none."
    )


def _with_run(sweep: Sweep, record: TrialRecord, one: TrialRun) -> TrialRecord:
    """The record with one more run, or with one that was never made replaced; kept before the run is."""
    before = tuple(run for run in record.runs if run.run != one.run)
    kept = record.model_copy(update={"runs": (*before, one)})
    sweep.write_record(kept)
    return kept


def _came_from(record: TrialRecord, donor: tuple[str, int]) -> bool:
    """Whether the newest run is the donor, or went on from it already: Tune asks again where a trial's actor was killed."""
    source, step = donor
    newest = record.runs[-1] if record.runs else None
    return newest is not None and (newest.run == source or (newest.source == source and step <= newest.source_step))


def _existing(home: str, record: TrialRecord) -> Run | None:
    try:
        return Run.open(home, record.run) if record.run else None
    except NotFoundError:
        return None


def _reopened(run: Run) -> Run:
    """A run that can be gone on with, once its driver before is gone: a killed one's heart is heard for a minute."""
    from service.training.driver import reopen

    end = time.monotonic() + 2 * LOST_AFTER_S
    while True:
        try:
            return reopen(run.home, run.id)
        except ConflictError:
            if time.monotonic() > end:
                raise
            time.sleep(LOOK_EVERY_S)
