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
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from service import logs, storage
from service.domain import RunState, check_name
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError

LOST_AFTER_S = 60.0
_ATTEMPTS = 100
_ID = re.compile(r"(?P<time>\d{8}-\d{6})-.+-[0-9a-f]{4}")
_WRITER = re.compile(r"a(?P<attempt>\d+)-r(?P<rank>\d+)")
_TIME = "%Y%m%d-%H%M%S"
_ENDS = {RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED}
_NEXT: dict[RunState, set[RunState]] = {
    RunState.CREATED: {RunState.RUNNING, RunState.FAILED, RunState.STOPPED},
    RunState.RUNNING: _ENDS,
    RunState.LOST: {RunState.RUNNING, *_ENDS},  # resumed, or its driver was only paused
    RunState.FAILED: {RunState.RUNNING},
    RunState.STOPPED: {RunState.RUNNING},
    RunState.SUCCEEDED: set(),
}


class RunStatus(BaseModel):
    """What status.json says. Times are ISO 8601, UTC. `details` holds whatever else the driver wants shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: RunState
    created_at: str
    updated_at: str
    message: str = ""
    step: int | None = None
    details: dict[str, Any] = {}


def next_state_allowed(current: RunState, wanted: RunState) -> bool:
    """`created -> running -> succeeded | failed | stopped`; all but succeeded may run again."""
    return wanted in _NEXT[current]


class Run:
    """One run's directory: `Run.create` makes it, `Run.open` finds it. Holds no state: every call asks the store."""

    def __init__(self, home: str, id: str) -> None:
        self.home = home
        self.id = id
        self.uri = storage.join(home, "runs", id)

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @classmethod
    def create(cls, home: str, name: str, run_yaml: str, resolved: dict[str, Any], id: str | None = None) -> Run:
        """A new run in state `created`; its id (`new_id` unless given) sorts after every run made before it."""
        if id is not None and not _ID.fullmatch(check_name(id, "run id")):
            raise ConfigError(f"{id!r} is no run id. Leave it out, or write YYYYMMDD-HHMMSS-name-0a1b.")
        for _ in range(_ATTEMPTS if id is None else 1):
            run = cls(home, id or new_id(home, name))
            try:
                storage.create_exclusive(run.path("run.yaml"), run_yaml.encode())
            except ConflictError:
                continue
            storage.write_bytes(run.path("resolved.json"), json.dumps(resolved, indent=2).encode())
            storage.write_bytes(run.path("status.json"), _first_status().model_dump_json().encode())
            return run
        raise ConflictError(f"The run {id or name!r} exists already. Leave the id out, or give another.")

    @classmethod
    def open(cls, home: str, id_or_latest: str) -> Run:
        """The run of this id; `latest` is the greatest id. NotFoundError names the nearest."""
        ids = _ids(home)
        if id_or_latest == "latest" and ids:
            return cls(home, ids[-1])
        if id_or_latest in ids:
            return cls(home, id_or_latest)
        nearest = difflib.get_close_matches(id_or_latest, ids, n=1, cutoff=0.3)
        hint = f"the nearest is {nearest[0]}" if nearest else f"{len(ids)} runs are there"
        raise NotFoundError(f"No run {id_or_latest!r} below {home}: {hint}. List them with `loray runs list`.")

    def path(self, *parts: str) -> str:
        """The URI of something in this run: `run.path("metrics")`."""
        return storage.join(self.uri, *parts)

    def status(self, now: datetime | None = None) -> RunStatus:
        """The state as of `now`; `running` without a heartbeat for 60 s reads as `lost`."""
        return _seen_at(self._read_status()[0], now or datetime.now(UTC))

    def set_state(self, state: RunState, message: str = "", **fields: Any) -> RunStatus:
        """Moves to `state`, or ConflictError. `step` is a field of the status, all others join its `details`."""

        def move(now: RunStatus) -> RunStatus:
            seen = _seen_at(now, datetime.now(UTC))
            if not next_state_allowed(seen.state, state):
                wanted = ", ".join(sorted(_NEXT[seen.state])) or "nothing: start a new run"
                raise ConflictError(
                    f"Run {self.id} is {seen.state} (updated {seen.updated_at}) and cannot become {state}. "
                    f"Possible from here: {wanted}."
                )
            return _updated(now, {**fields, "state": state, "message": message})

        return self._change_status(move)

    def heartbeat(self, **fields: Any) -> None:
        """The driver lives; may carry `step`, `message` and details. Does nothing once the run has ended."""
        self._change_status(lambda now: now if now.state in _ENDS else _updated(now, fields))

    def set_resolved(self, resolved: dict[str, Any]) -> None:
        """Keep the config that a resumed run goes on with: what is learnt is the same, how it is spread may differ."""
        storage.write_bytes(self.path("resolved.json"), json.dumps(resolved, indent=2).encode())

    def resolved(self) -> dict[str, Any]:
        """The resolved config of the newest attempt."""
        content: dict[str, Any] = json.loads(storage.read_bytes(self.path("resolved.json")))
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

    def _read_status(self) -> tuple[RunStatus, str | None]:
        try:
            text, tag = storage.read_tagged(self.path("status.json"))
        except NotFoundError:
            if not storage.exists(self.path("run.yaml")):
                raise
            return _first_status(), None  # its creator is between run.yaml and status.json, or was killed there
        try:
            return RunStatus.model_validate_json(text), tag
        except ValidationError as error:
            raise StorageError(
                f"{self.path('status.json')} is no run status: {error}. Restore or delete it."
            ) from error

    def _change_status(self, change: Callable[[RunStatus], RunStatus]) -> RunStatus:
        # The driver is the single writer, but its heartbeat may be a thread of its own.
        for _ in range(_ATTEMPTS):
            before, tag = self._read_status()
            after = change(before)
            try:
                storage.compare_and_swap(self.path("status.json"), after.model_dump_json().encode(), tag)
                return after
            except ConflictError:
                continue
        raise ConflictError(f"{self.path('status.json')} kept changing. Make sure that only one driver runs {self.id}.")


def new_id(home: str, name: str) -> str:
    """An id that no run has: `YYYYMMDD-HHMMSS-<name>-<4 hex>`, after every id below `home`."""
    check_name(name, "run name")
    return f"{_next_time(_ids(home), datetime.now(UTC))}-{name}-{secrets.token_hex(2)}"


def list_runs(home: str) -> list[Run]:
    """All runs, oldest first."""
    return [Run(home, id) for id in _ids(home)]


def _ids(home: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(home, "runs")) if _ID.fullmatch(name)]


def _next_time(ids: list[str], now: datetime) -> str:
    """The id's time: this second, or the one after the newest run's, where several are made within a second.

    A newest run more than a minute ahead comes from a wrong clock, which one more wrong id would not help.
    """
    stamp = now.strftime(_TIME)
    newest = _ID.fullmatch(ids[-1]) if ids else None
    if newest and stamp <= newest["time"] <= (now + timedelta(minutes=1)).strftime(_TIME):
        return (datetime.strptime(newest["time"], _TIME).replace(tzinfo=UTC) + timedelta(seconds=1)).strftime(_TIME)
    return stamp


def _first_status() -> RunStatus:
    now = datetime.now(UTC).isoformat()
    return RunStatus(state=RunState.CREATED, created_at=now, updated_at=now)


def _seen_at(status: RunStatus, now: datetime) -> RunStatus:
    silent_s = (now - datetime.fromisoformat(status.updated_at)).total_seconds()
    if status.state is not RunState.RUNNING or silent_s <= LOST_AFTER_S:
        return status
    message = f"no heartbeat for {silent_s:.0f} s: the driver died or is cut off. Resume the run."
    return status.model_copy(update={"state": RunState.LOST, "message": message})


def _updated(status: RunStatus, fields: dict[str, Any]) -> RunStatus:
    own = {name: value for name, value in fields.items() if name in ("state", "message", "step")}
    rest = {name: value for name, value in fields.items() if name not in own}
    update = {**own, "details": {**status.details, **rest}, "updated_at": datetime.now(UTC).isoformat()}
    return status.model_copy(update=update)


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
