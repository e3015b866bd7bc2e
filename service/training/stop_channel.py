"""The driver's end of a run's one stop channel: what people and signals ask for, and our own requests to move.

Workers look at `runs/<id>/stop` only. A move (more workers can be had, a node goes) takes the same road, and must never
overwrite or swallow a person's request: it is written only where there is none, and taken back when the attempt has ended,
however it ended.
"""

from __future__ import annotations

from contextlib import suppress

from service.errors import StorageError
from service.runs import Run

GROW = "more workers can be had: going on with them"
LEAVE = "a node is about to be taken away: going on without it"
MOVES = (GROW, LEAVE)


class StopChannel:
    """One driver's. Only `ask` may be called from a signal handler: it touches no storage."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.asked: str | None = None  # in this process, by a signal
        self._delivered = False

    def ask(self, reason: str) -> None:
        """Remember a request; `deliver` passes it on."""
        self.asked = self.asked or reason

    def deliver(self) -> None:
        """To be called often: tells the workers what a signal has asked for. Storage that is away is tried again next time."""
        if self.asked and not self._delivered:
            with suppress(StorageError):
                self._run.request_stop(self.asked)
                self._delivered = True

    def move(self, reason: str) -> None:
        """Ask the workers to stop so that the run can go on elsewhere. Storage that is away is tried again by the caller."""
        if not self.asked:
            with suppress(StorageError):
                self._run.propose_stop(reason)

    def wanted(self) -> str | None:
        """Why a person or a signal wants the run to stop; a move of ours is none. Raises StorageError."""
        reason = self.asked or self._run.stop_requested()
        return None if reason in MOVES else reason

    def forget_moves(self) -> None:
        """Take a move back. Raises StorageError."""
        for reason in MOVES:
            self._run.withdraw_stop(reason)
