"""How the trials of a sweep stand, read from their runs: for the table, the leaderboard, the budget and going on.

`Trials.look` reads only what is new; what it gives is plain values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.domain import RunState
from service.errors import NotFoundError
from service.logs import LogReader
from service.runs import DRIVER_KILLED, Run, RunStatus
from tune.directory import Sweep, TrialRecord, TrialRun
from tune.sweep_file import ResolvedSweep

EARLY = "early stopping: "  # the reason of every trial that a stopping rule has ended begins so
TOKENS = "train/tokens"
# Errors of what a run stands on, not of the run: going on may help.
IN_THE_WAY = (DRIVER_KILLED, "WorkerLostError", "ClusterError", "StorageError", "KeyboardInterrupt")


class TrialState(StrEnum):
    """`waiting -> running -> finished | stopped | failed`; an interrupted one goes on when its sweep does."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


ENDED = (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)
_PLAIN = {
    RunState.CREATED: TrialState.WAITING,
    RunState.RUNNING: TrialState.RUNNING,
    RunState.LOST: TrialState.INTERRUPTED,
    RunState.SUCCEEDED: TrialState.FINISHED,
}


def trial_state(problem: str, run: RunStatus | None) -> TrialState:
    """What the newest run of a trial makes of it. Failures of what a run stands on (workers, storage) are interruptions."""
    if problem:
        return TrialState.FAILED
    if run is None:
        return TrialState.WAITING
    if run.state is RunState.STOPPED:
        return TrialState.STOPPED if run.message.startswith(EARLY) else TrialState.INTERRUPTED
    if run.state is RunState.FAILED:
        return TrialState.INTERRUPTED if run.details.get("error") in IN_THE_WAY else TrialState.FAILED
    return _PLAIN[run.state]


@dataclass(frozen=True)
class Trial:
    """One trial as it stands. `curve` has the metric by share of the run's steps, `tokens` what all its runs have read."""

    number: int
    changes: dict[str, Any]
    state: TrialState
    why: str
    run: str | None
    step: int
    num_steps: int
    tokens: int
    curve: tuple[tuple[float, float], ...]
    steps: tuple[int, ...]  # of the points of the curve
    startup_s: float | None  # from the trial's beginning to its first step
    model_step: int | None = None  # of a finished one: what its model has learnt, which may be an earlier step's

    @property
    def value(self) -> float | None:
        """The metric of its model; of a trial that has none, as it was measured last."""
        measured = dict(zip(self.steps, (value for _, value in self.curve), strict=True))
        return measured.get(self.model_step or max(self.steps, default=0))

    @property
    def progress(self) -> float:
        """The share of its steps that are made."""
        return self.step / self.num_steps if self.num_steps else 0.0


class Trials:
    """The trials of a sweep, looked at again and again."""

    def __init__(self, sweep: Sweep, resolved: ResolvedSweep) -> None:
        self._sweep, self._resolved = sweep, resolved
        self._rows: dict[str, _Rows] = {}
        self._ended: dict[int, Trial] = {}
        self._startups_s: dict[str, float] = {}

    def look(self) -> list[Trial]:
        """All trials, in order. Those that have ended are not read again."""
        found = dict(self._ended)
        for record in self._sweep.records(known=self._ended):
            trial = found[record.number] = self._one(record)
            if trial.state in ENDED:
                self._ended[record.number] = trial
        return [found[number] for number in sorted(found)]

    def _one(self, record: TrialRecord) -> Trial:
        status = _status(self._sweep.home, record.run)
        rows: dict[int, dict[str, Any]] = {}
        tokens = 0
        for one in record.runs:
            reader = self._rows.setdefault(one.run, _Rows(Run(self._sweep.home, one.run)))
            rows = reader.read()
            tokens += int(reader.tokens)
        metric = self._resolved.config.search.metric
        num_steps = int(status.details.get("num_steps", 0)) if status else 0
        known = sorted(rows.items()) if num_steps else []  # a run that begins with another's rows does not say yet
        measured = [(step, row[metric]) for step, row in known if row.get(metric) is not None]
        return Trial(
            number=record.number,
            changes=self._resolved.changes(record.newest_draw),
            state=trial_state(record.problem, status),
            why=record.problem or record.hindrance or (status.message if status else ""),
            run=record.run if status else None,
            step=max(rows, default=0),
            num_steps=num_steps,
            tokens=tokens,
            curve=tuple((step / num_steps, value) for step, value in measured),
            steps=tuple(step for step, _ in measured),
            startup_s=self._startup_s(record.runs[0]) if rows else None,
            model_step=status.step if status and status.state is RunState.SUCCEEDED else None,
        )

    def _startup_s(self, first: TrialRun) -> float | None:
        if first.run not in self._startups_s:
            events = Run(self._sweep.home, first.run).events()
            ready = [event["time"] for event in events if event["kind"] == "ready"]
            if not ready:
                return None
            self._startups_s[first.run] = ready[0] - first.asked_at
        return self._startups_s[first.run]


@dataclass
class _Rows:
    """The metric rows of a run as they come, one a step: a later attempt's stands. `tokens` are those of all attempts."""

    run: Run
    tokens: float = 0.0
    rows: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    reader: LogReader | None = None

    def read(self) -> dict[int, dict[str, Any]]:
        self.reader = self.reader or LogReader(self.run.path("metrics"))
        for writer, row in self.reader.new_rows():
            attempt = int(writer.split("-")[0].removeprefix("a"))
            self.tokens += row.get(TOKENS, 0)
            if attempt >= self.rows.get(row["step"], (-1, {}))[0]:
                self.rows[row["step"]] = (attempt, row)
        return {step: row for step, (_, row) in self.rows.items()}


def _status(home: str, run: str | None) -> RunStatus | None:
    try:
        return Run(home, run).status() if run else None
    except NotFoundError:
        return None  # its driver is about to make it, or was killed before
