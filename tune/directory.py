"""Sweep directories: all that a sweep is, so that another driver can go on with it. Trials are runs, in `runs/`.

    sweeps/<id>/  sweep.yaml resolved.json   what was asked, and what it became
                  status.json                state, message, heartbeat; one writer, the sweep's driver
                  stop                       its content is the reason: every trial looks at it
                  trials/00001.json          the values of a trial and its runs; its driver is the one writer
                  leaderboard.md leaderboard.json metric.png parallel.png importance.png

How a trial stands is read off its newest run (`trials.py`) and is not written here: two places could differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from service import storage
from service.domain import RunState
from service.errors import ConflictError, NotFoundError
from service.runs import DRIVER_KILLED, RESOLVED, RunStatus, check_id, ids_below, keep_asked, new_id, one_of
from service.status import StatusFile
from service.training.patience import Patience
from tune.sweep_file import ResolvedSweep, sweep_from_json

RETRY_S = 300.0  # as checkpoint.retry_s is unless given
T = TypeVar("T")


class TrialRun(BaseModel):
    """One run of a trial: under population-based training there may be several, each from another's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    draw: dict[str, Any]
    asked_at: float = 0.0  # seconds since the epoch
    source: str = ""  # the run whose checkpoint it began with
    source_step: int = 0


class TrialRecord(BaseModel):
    """What a trial is. `problem`: why it could not even become a run. `hindrance`: why its run could not go on, the last time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    draw: dict[str, Any]
    runs: tuple[TrialRun, ...] = ()
    problem: str = ""
    hindrance: str = ""

    @property
    def run(self) -> str | None:
        """The id of its newest run."""
        return self.runs[-1].run if self.runs else None

    @property
    def newest_draw(self) -> dict[str, Any]:
        """The values that it has now."""
        return self.runs[-1].draw if self.runs else self.draw


class Sweep:
    """One sweep's directory: `Sweep.create` makes it, `Sweep.open` finds it. Holds no state: every call asks the store."""

    def __init__(self, home: str, id: str) -> None:
        self.home = home
        self.id = id
        self.uri = storage.join(home, "sweeps", id)
        self._status = StatusFile(self.path("status.json"), f"Sweep {id}", self.path("sweep.yaml"))

    @classmethod
    def create(cls, home: str, name: str, resolved: ResolvedSweep, id: str | None = None) -> Sweep:
        """A new sweep in state `created`."""
        sweep = cls(home, check_id(id, "sweep") if id is not None else new_id(home, name, "sweeps"))
        asked, became = sweep.path("sweep.yaml"), sweep.path(RESOLVED)
        keep_asked(asked, resolved.text, became, resolved.as_json(), is_given=id is not None)
        sweep._status.create()
        return sweep

    @classmethod
    def open(cls, home: str, id_or_latest: str) -> Sweep:
        """The sweep of this id; `latest` is the newest that was begun. NotFoundError names the nearest."""
        return cls(home, one_of(home, id_or_latest, "sweeps"))

    def path(self, *parts: str) -> str:
        """The URI of something in this sweep."""
        return storage.join(self.uri, *parts)

    def resolved(self) -> ResolvedSweep:
        """What it became."""
        return sweep_from_json(json.loads(storage.read_bytes(self.path(RESOLVED))))

    def set_resolved(self, resolved: ResolvedSweep) -> None:
        """Keep what it goes on with."""
        storage.write_bytes(self.path(RESOLVED), json.dumps(resolved.as_json(), indent=2).encode())

    def status(self) -> RunStatus:
        """Its state; `running` without a heartbeat for 60 s reads as `lost`."""
        return self._status.read()

    def set_state(self, state: RunState, message: str = "", **details: Any) -> RunStatus:
        """Moves to `state`, or ConflictError."""
        return self._status.set_state(state, message, **details)

    def heartbeat(self, **details: Any) -> None:
        """The driver lives."""
        self._status.heartbeat(**details)

    def declare_dead(self) -> None:
        """Its driver is gone without a word: it has failed, and may be driven by another."""
        self._status.declare_dead(DRIVER_KILLED)

    def write_record(self, record: TrialRecord) -> None:
        """Keep what a trial is now."""
        storage.write_bytes(self.path("trials", _name(record.number)), record.model_dump_json(indent=2).encode())

    def record(self, number: int) -> TrialRecord:
        """Trial `number`. Raises NotFoundError."""
        return TrialRecord.model_validate_json(storage.read_bytes(self.path("trials", _name(number))))

    def records(self, known: Collection[int] = ()) -> list[TrialRecord]:
        """All trials that there are so far, in order, but those whose numbers are `known`."""
        skipped = {_name(number) for number in known}
        names = [name for name in storage.list_names(self.path("trials")) if name.endswith(".json")]
        names = [name for name in names if name not in skipped]
        found = storage.read_many([self.path("trials", name) for name in names])
        return [TrialRecord.model_validate_json(text) for text in found]

    def insist(self, do: Callable[[], T]) -> T:
        """What `do` returns, asked for again while storage is away: a trial that trains waits for it as long."""
        return Patience([self.uri], RETRY_S, f"sweep {self.id}", lambda kind, text: None).insist(do)

    def request_stop(self, reason: str) -> None:
        """Asks every trial to stop with a checkpoint, and that no other begins. The first reason stays."""
        try:
            storage.create_exclusive(self.path("stop"), reason.encode())
        except ConflictError:
            return

    def stop_requested(self) -> str | None:
        """The reason, where a stop was asked for."""
        try:
            return storage.read_bytes(self.path("stop")).decode()
        except NotFoundError:
            return None

    def clear_stop(self) -> None:
        """Forgets a stop, before going on."""
        storage.delete_tree(self.path("stop"))


def list_sweeps(home: str) -> list[Sweep]:
    """All sweeps, oldest first."""
    return [Sweep(home, id) for id in ids_below(home, "sweeps")]


def _name(number: int) -> str:
    return f"{number:05d}.json"
