"""Where every worker of a run stands: asking for the Python stacks of its threads, writing them down, reading them.

Whoever asks writes an id into `runs/<id>/stacks/request`; every worker's watch (`watch.py`) answers it once with
`logs/stacks-a<attempt>-rank-<rank>-<id>.txt`. A worker that notices a stall writes one unasked, with the id `stall`.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from service import storage
from service.errors import NotFoundError
from service.runs import Run

QUIET_S = 12.0  # no further worker has answered for so long: more than twice as long as a watch looks the other way
LOOK_EVERY_S = 0.2
_ID = re.compile(r"[a-z0-9-]{1,64}")
_NAME = re.compile(r"stacks-a(?P<attempt>\d+)-rank-(?P<rank>\d+)-(?P<id>[a-z0-9-]+)\.txt")


class Doing(NamedTuple):
    """What a worker does, and since when: `at` in seconds since the epoch, `tick` on the monotonic clock."""

    what: str
    at: float
    tick: float

    @classmethod
    def now(cls, what: str) -> Doing:
        """`what`, beginning now."""
        return cls(what, time.time(), time.monotonic())

    def __str__(self) -> str:
        return f"{self.what}, since {datetime.fromtimestamp(self.at, UTC):%Y-%m-%d %H:%M:%S} UTC"


@dataclass(frozen=True)
class Stacks:
    """One worker's answer."""

    attempt: int
    rank: int
    id: str
    text: str


def request(run: Run) -> str:
    """Ask all workers of a run; the id that their answers will have."""
    id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    storage.write_bytes(run.path("stacks", "request"), id.encode())
    return id


def requested(run: Run) -> str | None:
    """The id of the open request, if there is one."""
    try:
        id = storage.read_bytes(run.path("stacks", "request")).decode(errors="replace").strip()
    except NotFoundError:
        return None
    return id if _ID.fullmatch(id) else None


def withdraw(run: Run, id: str) -> None:
    """Take a request back, unless another has taken its place."""
    if requested(run) == id:
        storage.delete_tree(run.path("stacks", "request"))


def uri(run: Run, attempt: int, rank: int, id: str) -> str:
    """Where a worker's answer belongs."""
    return run.path("logs", f"stacks-a{attempt}-rank-{rank:05d}-{id}.txt")


def read(run: Run, id: str | None = None) -> list[Stacks]:
    """The answers to one request, or everything that was ever written: by attempt, then by rank."""
    matches = (_NAME.fullmatch(name) for name in storage.list_names(run.path("logs")))
    found = sorted((int(m["attempt"]), int(m["rank"]), m["id"], m[0]) for m in matches if m and id in (None, m["id"]))
    texts = storage.read_many([run.path("logs", name) for *_, name in found])
    return [
        Stacks(attempt, rank, of, text.decode(errors="replace"))
        for (attempt, rank, of, _), text in zip(found, texts, strict=True)
    ]


def await_answers(
    run: Run, id: str, *, workers: int | None, timeout_s: float, quiet_s: float = QUIET_S
) -> list[Stacks]:
    """The answers to a request: of all `workers`, or those that came before `timeout_s`.

    Where the number of workers is not known, it is over when none has followed the last one for `quiet_s`.
    """
    answers: list[Stacks] = []
    end = time.monotonic() + timeout_s
    quiet = end
    while time.monotonic() < min(end, quiet):
        found = read(run, id)
        if len(found) > len(answers) and workers is None:
            quiet = time.monotonic() + quiet_s
        answers = found
        if workers is not None and len({a.rank for a in answers}) >= workers:
            break
        time.sleep(LOOK_EVERY_S)
    return answers


def of_all_threads(first: threading.Thread) -> str:
    """The Python stacks of all threads of this process, innermost call last; `first` is the one of interest."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident in sorted(frames, key=lambda ident: (ident != first.ident, ident)):
        title = names.get(ident, "a thread that Python did not start") + (" (trains)" if ident == first.ident else "")
        parts.append(f"{title}:\n{''.join(traceback.format_stack(frames[ident]))}")
    return "\n".join(parts)


def of_thread(thread: threading.Thread) -> str:
    """One thread's Python stack; empty when it has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def document(rank: int, attempt: int, why: str, doing: Doing, training: threading.Thread) -> str:
    """What an answer says: who, where, why, what it was doing, and all stacks."""
    seconds = time.monotonic() - doing.tick
    head = [
        f"worker {rank}, attempt {attempt}: pid {os.getpid()} on {socket.gethostname()}",
        f"written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {why}",
        f"doing: {doing} ({seconds:.1f} s)",
    ]
    return "\n".join(head) + "\n\n" + of_all_threads(training)
