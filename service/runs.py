"""Run directories: everything there is to know about one attempt to train one resolved config.

    runs/<id>/  run.yaml resolved.json   what was asked, and what it became
                status.json              state, step, message, heartbeat; one writer, the driver
                stop                     its content is the reason: workers look at it between micro-batches
                metrics/ events/ ledger/ logs (`logs.py`) of writers named a<attempt>-r<rank>
                logs/ checkpoints/ model/ report.md loss.png

A run is its directory; a database may only index it. How training goes is the business of `training/`; this file never
imports it. A `running` whose heartbeat is older than 60 s reads as `lost`.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from service import logs, storage
from service.domain import RunState, check_name
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError
from service.status import RunStatus, StatusFile, next_state_allowed

__all__ = ["Run", "RunStatus", "list_runs", "new_id", "next_state_allowed"]

RESOLVED = "resolved.json"
DRIVER_KILLED = "driver killed"  # `error` in the details of a run that failed; else the name of the error's class
_ATTEMPTS = 100
_ID = re.compile(r"(?P<time>\d{8}-\d{6})-.+-[0-9a-f]{4}")
_WRITER = re.compile(r"a(?P<attempt>\d+)-r(?P<rank>\d+)")
_TIME = "%Y%m%d-%H%M%S"


class Run:
    """One run's directory: `Run.create` makes it, `Run.open` finds it. Holds no state: every call asks the store."""

    def __init__(self, home: str, id: str) -> None:
        self.home = home
        self.id = id
        self.uri = storage.join(home, "runs", id)
        self._status = StatusFile(self.path("status.json"), f"Run {id}", self.path("run.yaml"))

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @classmethod
    def create(cls, home: str, name: str, run_yaml: str, resolved: dict[str, Any], id: str | None = None) -> Run:
        """A new run in state `created`; its id (`new_id` unless given) sorts after every run made before it."""
        for _ in range(_ATTEMPTS if id is None else 1):
            run = cls(home, check_id(id) if id is not None else new_id(home, name))
            try:
                keep_asked(run.path("run.yaml"), run_yaml, run.path(RESOLVED), resolved, is_given=id is not None)
            except ConflictError:
                continue
            run._status.create()
            return run
        raise ConflictError(f"The run {id or name!r} exists already. Leave the id out, or give another.")

    @classmethod
    def open(cls, home: str, id_or_latest: str) -> Run:
        """The run of this id; `latest` is the newest that was begun. NotFoundError names the nearest."""
        return cls(home, one_of(home, id_or_latest))

    def path(self, *parts: str) -> str:
        """The URI of something in this run: `run.path("metrics")`."""
        return storage.join(self.uri, *parts)

    def status(self, now: datetime | None = None) -> RunStatus:
        """The state as of `now`; `running` without a heartbeat for 60 s reads as `lost`."""
        return self._status.read(now)

    def set_state(self, state: RunState, message: str = "", **fields: Any) -> RunStatus:
        """Moves to `state`, or ConflictError. `step` is a field of the status, all others join its `details`."""
        return self._status.set_state(state, message, **fields)

    def heartbeat(self, **fields: Any) -> None:
        """The driver lives; may carry `step`, `message` and details. Does nothing once the run has ended.

        Raises ConflictError where another process drives it now.
        """
        self._status.heartbeat(**fields)

    def declare_dead(self) -> None:
        """Its driver is gone without a word: it has failed, and may be driven by another."""
        self._status.declare_dead(DRIVER_KILLED)

    def set_resolved(self, resolved: dict[str, Any]) -> None:
        """Keep the config that a resumed run goes on with: what is learnt is the same, how it is spread may differ."""
        storage.write_bytes(self.path(RESOLVED), json.dumps(resolved, indent=2).encode())

    def resolved(self) -> dict[str, Any]:
        """The resolved config of the newest attempt."""
        content: dict[str, Any] = json.loads(storage.read_bytes(self.path(RESOLVED)))
        return content

    def run_yaml(self) -> str:
        """The run file, byte for byte."""
        return storage.read_bytes(self.path("run.yaml")).decode()

    def request_stop(self, reason: str) -> None:
        """Asks the workers to checkpoint and stop."""
        storage.write_bytes(self.path("stop"), reason.encode())

    def propose_stop(self, reason: str) -> None:
        """Asks for the same, unless somebody has asked already."""
        try:
            asked, tag = storage.read_tagged(self.path("stop"))
        except NotFoundError:
            asked, tag = b"", None
        if not asked:
            with suppress(ConflictError):
                storage.compare_and_swap(self.path("stop"), reason.encode(), tag)

    def withdraw_stop(self, reason: str) -> None:
        """Takes back a stop for this reason; what somebody else has asked for meanwhile stays."""
        with suppress(NotFoundError, ConflictError):
            asked, tag = storage.read_tagged(self.path("stop"))
            if asked.decode() == reason:
                storage.compare_and_swap(self.path("stop"), b"", tag)

    def stop_requested(self) -> str | None:
        """The reason, where a stop was asked for."""
        try:
            return storage.read_bytes(self.path("stop")).decode() or None
        except NotFoundError:
            return None

    def clear_stop(self) -> None:
        """Forgets a stop, before resuming."""
        storage.delete_tree(self.path("stop"))

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step, ascending. Of several attempts at a step the last counts; a lower rank's value wins."""
        merged = []
        for step, rows in _by_step(self.path("metrics")):
            row: dict[str, Any] = {}
            for _, part in sorted(rows, key=lambda ranked: -ranked[0]):
                row.update(part)
            merged.append({"step": step, **row})
        return merged

    def figures(self, step: int) -> dict[str, float]:
        """What was measured at this step, without what was not finite."""
        rows = [row for row in self.metrics() if row["step"] == step]
        return {name: value for row in rows for name, value in row.items() if name != "step" and value is not None}

    def ledger(self) -> list[dict[str, Any]]:
        """`{"step", "ids"}` a step, ascending: the ids drawn, rank after rank, by the last attempt at that step alone.

        An attempt repeats all steps after its checkpoint, which was visible only when all workers had logged up to
        there. So up to the newest checkpoint it is whole; later steps may lack the rows of workers that were killed.
        """
        merged = []
        for step, rows in _by_step(self.path("ledger")):
            ids = [id for _, row in sorted(rows, key=lambda ranked: ranked[0]) for id in row["ids"]]
            merged.append({"step": step, "ids": ids})
        return merged

    def events(self) -> list[dict[str, Any]]:
        """All events; in order of their `time`, where each has one, else writer after writer."""
        rows = [row for _, row in logs.read_rows(self.path("events"))]
        return sorted(rows, key=lambda row: row["time"]) if all("time" in row for row in rows) else rows


def new_id(home: str, name: str, kind: str = "runs") -> str:
    """An id that no other of its kind has: `YYYYMMDD-HHMMSS-<name>-<4 hex>`, after every id below `home`."""
    check_name(name, "run name")
    return f"{_next_time(ids_below(home, kind), datetime.now(UTC))}-{name}-{secrets.token_hex(2)}"


def check_id(id: str, kind: str = "run") -> str:
    """The id of a run or of a sweep, or ConfigError."""
    if not _ID.fullmatch(check_name(id, f"{kind} id")):
        raise ConfigError(f"{id!r} is no {kind} id. Leave it out, or write YYYYMMDD-HHMMSS-name-0a1b.")
    return id


def list_runs(home: str) -> list[Run]:
    """All runs, oldest first."""
    return [Run(home, id) for id in ids_below(home)]


def ids_below(home: str, kind: str = "runs") -> list[str]:
    """All ids of a kind (runs, sweeps), oldest first."""
    return [name for name in storage.list_names(storage.join(home, kind)) if _ID.fullmatch(name)]


def one_of(home: str, id_or_latest: str, kind: str = "runs") -> str:
    """The id itself, for `latest` the greatest that was begun; NotFoundError names the nearest."""
    ids, one = ids_below(home, kind), kind.removesuffix("s")
    if id_or_latest == "latest" and (newest := next((id for id in reversed(ids) if is_begun(home, id, kind)), None)):
        return newest
    if id_or_latest in ids:
        if not is_begun(home, id_or_latest, kind):
            raise NotFoundError(
                f"{one.capitalize()} {id_or_latest} was never begun: its driver is just writing down what was asked, or was killed "
                "in it. Try again, or start anew."
            )
        return id_or_latest
    nearest = difflib.get_close_matches(id_or_latest, ids, n=1, cutoff=0.3)
    hint = f"the nearest is {nearest[0]}" if nearest else f"{len(ids)} {kind} are there"
    command = {"runs": "runs", "sweeps": "sweep"}[kind]
    raise NotFoundError(f"No {one} {id_or_latest!r} below {home}: {hint}. List them with `loray {command} list`.")


def keep_asked(asked: str, text: str, became: str, resolved: dict[str, Any], *, is_given: bool) -> None:
    """Write what was asked and then what it became, at these URIs. ConflictError: another has this id.

    Who writes the second owns the run or sweep. Where a creator was killed between the two, one to whom the same id was given
    begins anew.
    """
    try:
        storage.create_exclusive(asked, text.encode())
    except ConflictError:
        if not is_given or storage.exists(became):
            raise
        storage.write_bytes(asked, text.encode())
    storage.create_exclusive(became, json.dumps(resolved, indent=2).encode())


def is_begun(home: str, id: str, kind: str = "runs") -> bool:
    """Whether all is there that it can be gone on with."""
    return storage.exists(storage.join(home, kind, id, RESOLVED))


def _next_time(ids: list[str], now: datetime) -> str:
    """The id's time: this second, or the one after the newest run's, where several are made within a second.

    A newest run more than a minute ahead comes from a wrong clock, which one more wrong id would not help.
    """
    stamp = now.strftime(_TIME)
    newest = _ID.fullmatch(ids[-1]) if ids else None
    if newest and stamp <= newest["time"] <= (now + timedelta(minutes=1)).strftime(_TIME):
        return (datetime.strptime(newest["time"], _TIME).replace(tzinfo=UTC) + timedelta(seconds=1)).strftime(_TIME)
    return stamp


def _by_step(uri: str) -> list[tuple[int, list[tuple[int, dict[str, Any]]]]]:
    """(step, [(rank, row)]) ascending, with the rows of the highest attempt at each step only."""
    steps: dict[int, tuple[int, list[tuple[int, dict[str, Any]]]]] = {}
    for writer, row in logs.read_rows(uri):
        match = _WRITER.fullmatch(writer)
        if not match or not isinstance(row.get("step"), int):
            raise StorageError(
                f"{uri}: writer {writer!r} wrote {row}; a writer is named a<attempt>-r<rank>, a row has a step."
            )
        attempt, rank = int(match["attempt"]), int(match["rank"])
        if attempt > steps.get(row["step"], (-1,))[0]:
            steps[row["step"]] = (attempt, [])
        if attempt == steps[row["step"]][0]:
            steps[row["step"]][1].append((rank, row))
    return [(step, rows) for step, (_, rows) in sorted(steps.items())]
