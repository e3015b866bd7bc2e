"""The status of what a driver works on, a run or a sweep: one JSON file with one writer, read by everybody.

A `running` whose heartbeat is older than 60 s reads as `lost`. The driver's process is in the details: one that was cut off
and comes back after another has gone on in its place is refused, and changes nothing any more.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from service import storage
from service.domain import RunState
from service.errors import ConflictError, LorayError, NotFoundError, StorageError

LOST_AFTER_S = 60.0
HEARTBEAT_EVERY_S = 10.0
LOOK_EVERY_S = 1.0
_ATTEMPTS = 100
ENDS = {RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED}
_NEXT: dict[RunState, set[RunState]] = {
    RunState.CREATED: {RunState.RUNNING, RunState.FAILED, RunState.STOPPED},
    RunState.RUNNING: ENDS,
    RunState.LOST: {RunState.RUNNING, *ENDS},  # resumed, or its driver was only paused
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


class StatusFile:
    """The file at `uri`, of `what`, which is there as soon as `made` is: its creator may be killed between the two."""

    def __init__(self, uri: str, what: str, made: str) -> None:
        self._uri, self._what, self._made = uri, what, made

    def create(self) -> None:
        """The first status, `created`."""
        storage.write_bytes(self._uri, _first().model_dump_json().encode())

    def read(self, now: datetime | None = None) -> RunStatus:
        """The state as of `now`."""
        return _seen_at(self._read()[0], now or datetime.now(UTC))

    def set_state(self, state: RunState, message: str = "", **fields: Any) -> RunStatus:
        """Moves to `state`, or ConflictError. `step` is a field of the status, all others join its `details`.

        What another process drives only that one ends, unless it is known to be dead (`declare_dead`).
        """

        def move(now: RunStatus) -> RunStatus:
            if state in ENDS:
                self._demand_own(now)
            seen = _seen_at(now, datetime.now(UTC))
            if not next_state_allowed(seen.state, state):
                wanted = ", ".join(sorted(_NEXT[seen.state])) or "nothing: start a new one"
                raise ConflictError(
                    f"{self._what} is {seen.state} (updated {seen.updated_at}) and cannot become {state}. "
                    f"Possible from here: {wanted}."
                )
            return _updated(now, {**fields, "state": state, "message": message})

        return self._change(move)

    def heartbeat(self, **fields: Any) -> None:
        """The driver lives. Does nothing after the end; ConflictError where another process drives it now."""

        def beat(now: RunStatus) -> RunStatus:
            self._demand_own(now)
            return now if now.state in ENDS else _updated(now, fields)

        self._change(beat)

    def declare_dead(self, error: str) -> None:
        """The driver is gone without a word: what it drove has failed, and may be driven by another."""
        fields = {"state": RunState.FAILED, "message": "its driver was killed", "error": error}
        self._change(lambda now: now if now.state in ENDS else _updated(now, fields))

    def _demand_own(self, now: RunStatus) -> None:
        driver = {name: now.details.get(name) for name in ("pid", "born", "host")}
        if driver["pid"] is not None and driver != this_process():
            raise ConflictError(
                f"{self._what} is driven by process {driver['pid']} on {driver['host']} now, and not by this one, which was "
                "not heard of for too long. What this one has trained since is not kept."
            )

    def _read(self) -> tuple[RunStatus, str | None]:
        try:
            text, tag = storage.read_tagged(self._uri)
        except NotFoundError:
            if not storage.exists(self._made):
                raise
            return _first(), None
        try:
            return RunStatus.model_validate_json(text), tag
        except ValidationError as error:
            raise StorageError(f"{self._uri} is no run status: {error}. Restore or delete it.") from error

    def _change(self, change: Callable[[RunStatus], RunStatus]) -> RunStatus:
        # The driver is the single writer, but its heartbeat may be a thread of its own.
        for _ in range(_ATTEMPTS):
            before, tag = self._read()
            after = change(before)
            try:
                storage.compare_and_swap(self._uri, after.model_dump_json().encode(), tag)
                return after
            except ConflictError:
                continue
        raise ConflictError(f"{self._uri} kept changing. Make sure that only one driver works on {self._what}.")


@contextmanager
def beating(heartbeat: Callable[[], None]) -> Iterator[None]:
    """Tell the world, from a thread of its own, that this driver lives. Storage that hiccups, or a mount that is away for a
    moment, is asked again."""
    with repeating(heartbeat, HEARTBEAT_EVERY_S, "heartbeat"):
        yield


@contextmanager
def repeating(work: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Do this again and again in a thread of this name, beside the block. What LorayError ends is tried the next time."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            with suppress(LorayError):
                work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def this_process() -> dict[str, Any]:
    """What `life` tells this process by."""
    return {"pid": os.getpid(), "born": _own_birth(os.getpid()), "host": socket.gethostname()}


def life(driver: dict[str, Any]) -> str:
    """`alive` or `dead` for a driver on this host; on another host, `unknown`."""
    pid = driver.get("pid")
    if driver.get("host") != socket.gethostname() or not isinstance(pid, int):
        return "unknown"
    return "alive" if _born(pid) == driver.get("born") != "" else "dead"


def is_driven(status: RunStatus) -> bool:
    """Whether somebody works on it, as far as can be told from here."""
    if status.state not in (RunState.RUNNING, RunState.LOST):
        return False
    seen = life(status.details)
    return seen == "alive" or (seen == "unknown" and status.state is RunState.RUNNING)


def told_apart(read: Callable[[], RunStatus]) -> RunStatus:
    """The status, once a driver that has just died with its node is told from one that lives.

    Both read as running until the heartbeat is old: waits until it beats again or is lost.
    """
    first = status = read()
    while status.state is RunState.RUNNING and status.updated_at == first.updated_at:
        if life(status.details) != "unknown":
            break
        time.sleep(LOOK_EVERY_S)
        status = read()
    return status


def _born(pid: int) -> str:
    """When a process of this host began, in the kernel's own words, so that a reused pid is told apart; "" without one."""
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip()


@functools.cache
def _own_birth(pid: int) -> str:
    return _born(pid)


def _first() -> RunStatus:
    now = datetime.now(UTC).isoformat()
    return RunStatus(state=RunState.CREATED, created_at=now, updated_at=now)


def _seen_at(status: RunStatus, now: datetime) -> RunStatus:
    silent_s = (now - datetime.fromisoformat(status.updated_at)).total_seconds()
    if status.state is not RunState.RUNNING or silent_s <= LOST_AFTER_S:
        return status
    message = f"no heartbeat for {silent_s:.0f} s: the driver died or is cut off. Resume it."
    return status.model_copy(update={"state": RunState.LOST, "message": message})


def _updated(status: RunStatus, fields: dict[str, Any]) -> RunStatus:
    own = {name: value for name, value in fields.items() if name in ("state", "message", "step")}
    rest = {name: value for name, value in fields.items() if name not in own}
    update = {**own, "details": {**status.details, **rest}, "updated_at": datetime.now(UTC).isoformat()}
    return status.model_copy(update=update)
