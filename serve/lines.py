"""Requests in line on a replica, each adapter's in a line of its own: a busy adapter delays, and refuses, only itself.

A line holds so many rows (answers) and refuses the request that would exceed them. Its first rows are at hand of the
engine, where `fair_queue.py` lets the lines take turns; the rest wait here, so that an adapter that has to make room for
another one is soon done. Belongs to one event loop. No Ray, no HTTP here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.openai_api import MAX_CHOICES
from serve.routing import Target
from service.errors import BusyError

LINE_TURNS = 32  # rows of a full line, in turns of the engine's slots
AT_HAND_TURNS = 2  # the slots' next rows are there when all of them end in one step
FULL_LINES = 8  # what a replica takes of all adapters together


def line_rows(slots: int) -> int:
    """The most rows in a line; never fewer than one request may ask for."""
    return max(LINE_TURNS * slots, MAX_CHOICES)


@dataclass(eq=False)
class Place:
    """A request's place: its `rows` that have not ended, and `turn`, which is done when they are at hand."""

    rows: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Lines:
    """The lines of one replica, by digest, each in the order in which its requests came."""

    def __init__(self, slots: int) -> None:
        self._most, self._at_hand = line_rows(slots), AT_HAND_TURNS * slots
        self._lines: dict[str, list[Place]] = {}

    @property
    def num_waiting(self) -> int:
        """Rows that are not at hand yet. May be read from any thread."""
        places = [place for line in list(self._lines.values()) for place in list(line)]
        return sum(place.rows for place in places if not place.turn.done())

    @contextmanager
    def join(self, target: Target, rows: int) -> Iterator[Place]:
        """A place in the line of `target`, until the request has ended. BusyError, at once: the line is full."""
        line, place = self._lines.get(target.digest, []), Place(rows)
        before = sum(other.rows for other in line)
        if before + rows > self._most:
            raise BusyError(
                f"{target.model} is busy: it has {before} answers running or in line, and with {rows} more they would be "
                f"more than {self._most}. Other models are not concerned. Send it again in a second."
            )
        self._lines[target.digest] = line
        line.append(place)
        self._advance(line)
        try:
            yield place
        finally:
            line.remove(place)
            if line:
                self._advance(line)
            else:
                del self._lines[target.digest]

    def row_ended(self, target: Target, place: Place) -> None:
        """One of the rows of a place has ended: the next in line is nearer."""
        place.rows -= 1
        self._advance(self._lines.get(target.digest, []))

    def _advance(self, line: list[Place]) -> None:
        at_hand = 0
        for place in line:
            if at_hand >= self._at_hand:
                return
            if not place.turn.done():
                place.turn.set_result(None)
            at_hand += place.rows
