"""One thread a worker that does all slow looking and writing, so that the training thread never waits for storage.

It looks for a request to stop (`runs/<id>/stop`), writes the logs, answers requests for stacks (`stacks.py`), and says so
when nothing has moved for too long. All of that goes on while the training thread is inside a collective that will never
return. It decides nothing: the training thread reads `stop_reason` and calls `raise_if_failed` when it sees fit.
Storage that fails is asked again until it has failed for `retry_s`, and only then is that an error of the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service import storage
from service.errors import StorageError
from service.logs import LogWriter
from service.runs import Run
from service.training import stacks
from service.training.ranklog import RankLog
from service.training.stacks import Doing

STOP_LOOK_SHARE = 0.01  # of the time, at most, is spent on looking: a local file costs 20 us, an object store 50 ms
FLUSH_EVERY_S = 1.0
KEEP_EVERY_S = 10.0
QUIET_S = 2.0  # nothing has moved for so long: the log is kept at once, with the training thread's stack below it
RETRY_EVERY_S = 1.0
HANGS_S = 60.0  # a single call to storage that takes longer, and longer than `retry_s`, counts as failed


def look_pause(cost_s: float, least_s: float = 0.05, most_s: float = 5.0) -> float:
    """Seconds between two looks, each of which takes `cost_s`."""
    return min(max(cost_s / STOP_LOOK_SHARE, least_s), most_s)


@dataclass
class _Chore:
    """Something to do again and again. `pause` gives the seconds until the next time from what this time has cost."""

    what: str
    do: Callable[[], None]
    pause: Callable[[float], float]
    due: float = 0.0
    trouble: tuple[float, StorageError] | None = None  # since when (monotonic), and the last error


class Watch:
    """Made by the training thread, which it then watches. Starts at once; a stop asked for before is seen at once."""

    def __init__(
        self, run: Run, rank: int, attempt: int, log: RankLog, writers: Sequence[LogWriter], stall_s: float, retry_s: float
    ) -> None:  # fmt: skip
        self.stop_reason: str | None = None
        self._run, self._rank, self._attempt, self._log = run, rank, attempt, log
        self._writers, self._stall_s, self._retry_s = writers, stall_s, retry_s
        self._training = threading.current_thread()
        self._doing = Doing.now("starting")
        self._quiet_kept: Doing | None = None
        self._keep_at = time.monotonic() + KEEP_EVERY_S
        self._stalled: Doing | None = None
        self._num_stalls = 0
        self._answered: str | None = None
        self._unwritten: list[tuple[str, str]] = []  # stacks: URI and text
        self._failure: Exception | None = None
        self._calling: tuple[float, str] | None = None
        self._closing = threading.Event()
        self._logs = _Chore("writing the metrics, the ledger and the events", self._flush, lambda cost: FLUSH_EVERY_S)
        self._log_text = _Chore("writing the log", self._keep_log, lambda cost: FLUSH_EVERY_S)
        self._answers = _Chore("writing stacks", self._write_stacks, lambda cost: 0.25)
        self._chores = [
            _Chore("looking for a stop", self._look_for_stop, look_pause),
            _Chore("looking for a request for stacks", self._look_for_request, lambda cost: look_pause(cost, 0.5)),
            _Chore("looking for a stall", self._notice_stall, lambda cost: min(1.0, stall_s / 4)),
            self._answers,
            self._logs,
            self._log_text,
        ]
        self._do(self._chores[0])
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def moved(self, what: str) -> None:
        """The training thread goes on with `what`. About a microsecond."""
        self._doing = Doing.now(what)

    def raise_if_failed(self) -> None:
        """Raises StorageError when storage has failed for longer than `retry_s`, and whatever else broke in here."""
        if self._failure:
            raise self._failure
        now = time.monotonic()
        for chore in self._chores:
            trouble = chore.trouble
            if trouble and now - trouble[0] > self._retry_s:
                raise self._lasting(now - trouble[0], chore.what, str(trouble[1])) from trouble[1]
        calling = self._calling
        if calling and now - calling[0] > max(self._retry_s, HANGS_S):
            raise self._lasting(now - calling[0], calling[1], "no answer. Check the network and the storage.")

    def close(self) -> None:
        """Write everything a last time, again and again for `retry_s` if it must be; raises what could not be written."""
        self._closing.set()
        self._thread.join(max(self._retry_s, HANGS_S))
        if self._thread.is_alive():
            self.raise_if_failed()
        self._chores = [self._answers, self._logs, self._log_text]  # looking has ended, whatever its trouble was
        self._log_text.do = self._log.keep  # nothing is under way any more: it ends with its last line
        pause = threading.Event()
        while True:
            for chore in self._chores:
                self._do(chore)
            if not self._failure and not any(chore.trouble for chore in self._chores):
                return
            self.raise_if_failed()
            pause.wait(RETRY_EVERY_S)

    def _work(self) -> None:
        while not self._closing.is_set():
            for chore in self._chores:
                if chore.due <= time.monotonic() and not self._closing.is_set():
                    self._do(chore)
            self._closing.wait(max(0.0, min(chore.due for chore in self._chores) - time.monotonic()))

    def _do(self, chore: _Chore) -> None:
        began = time.monotonic()
        self._calling = (began, chore.what)
        try:
            chore.do()
        except StorageError as error:
            if chore.trouble is None:
                self._say(f"storage fails while {chore.what}; trying again for {self._retry_s:g} s: {error}")
            chore.trouble = (chore.trouble[0] if chore.trouble else began, error)
        except Exception as error:  # raised by `raise_if_failed`: a thread that ended in silence would hide it
            if self._failure is None:
                self._say(f"failed while {chore.what}: {type(error).__name__}: {error}")
                self._failure = error
        else:
            if chore.trouble:
                self._say(f"storage works again after {began - chore.trouble[0]:.1f} s, {chore.what}")
                chore.trouble = None
        self._calling = None
        ended = time.monotonic()
        chore.due = ended + max(chore.pause(ended - began), RETRY_EVERY_S if chore.trouble else 0.0)

    def _say(self, line: str) -> None:
        """Into the log, which is kept next."""
        self._log.say(line)
        self._keep_at = 0.0

    def _lasting(self, seconds: float, what: str, why: str) -> StorageError:
        return StorageError(
            f"worker {self._rank}: storage has failed for {seconds:.0f} s while {what}, and checkpoint.retry_s is "
            f"{self._retry_s:g}: {why} Then go on from the newest checkpoint: loray train --resume {self._run.id}"
        )

    def _look_for_stop(self) -> None:
        if self.stop_reason is None:
            self.stop_reason = self._run.stop_requested()

    def _look_for_request(self) -> None:
        id = stacks.requested(self._run)
        if id is not None and id != self._answered:
            self._dump(id, f"request {id}", self._doing)
            self._answered = id

    def _notice_stall(self) -> None:
        doing, stalled = self._doing, self._stalled
        if stalled and doing is not stalled:
            self._say(f"moving again, after {doing.tick - stalled.tick:.1f} s of: {stalled}")
            self._stalled = None
        seconds = time.monotonic() - doing.tick
        if seconds < self._stall_s or doing is stalled:
            return
        self._stalled = doing
        self._num_stalls += 1
        id = "stall" if self._num_stalls == 1 else f"stall-{self._num_stalls}"
        text = f"worker {self._rank} has not moved for {seconds:.1f} s (scale.stall_s is {self._stall_s:g}): {doing}"
        uri = self._dump(id, text, doing)
        self._say(f"stalled: {text}. Stacks: {uri}")
        events = self._run.path("events")
        for writer in self._writers:
            if writer.uri == events:
                writer.append({"time": time.time(), "kind": "stalled", "text": text})

    def _dump(self, id: str, why: str, doing: Doing) -> str:
        """Take the stacks now; they are written next, and again if that fails."""
        uri = stacks.uri(self._run, self._attempt, self._rank, id)
        self._unwritten.append((uri, stacks.document(self._rank, self._attempt, why, doing, self._training)))
        return uri

    def _write_stacks(self) -> None:
        while self._unwritten:
            uri, text = self._unwritten[0]
            storage.write_bytes(uri, text.encode(errors="backslashreplace"))
            del self._unwritten[0]

    def _flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def _keep_log(self) -> None:
        """Every KEEP_EVERY_S, and as soon as a worker has gone quiet, because its process may be killed for a peer's death.

        What it does stands at the end: the only trace of where it was, if it never comes to say anything again.
        """
        doing, now = self._doing, time.monotonic()
        quiet = now - doing.tick >= QUIET_S
        if now < self._keep_at and (not quiet or self._quiet_kept is doing):
            return
        self._log.keep(f"now: {doing}\n" + (stacks.of_thread(self._training) if quiet else ""))
        self._keep_at, self._quiet_kept = now + KEEP_EVERY_S, doing if quiet else None
