"""Where workers that stay find their next run: a small actor that loads no torch, so that it is there at once.

Runs are numbered by turn. What is handed over is pickled by whoever hands it over: this process need not know its classes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any


class Desk:
    """Jobs in, results out; every wait ends when the other side has come."""

    def __init__(self) -> None:
        self._jobs: defaultdict[int, asyncio.Future[bytes | None]] = defaultdict(_awaited)
        self._results: defaultdict[int, asyncio.Future[bytes]] = defaultdict(_awaited)

    async def give(self, turn: int, job: bytes | None) -> None:
        """The job of this turn; None where there is no other and the workers are to leave."""
        self._jobs[turn].set_result(job)

    async def job(self, turn: int) -> bytes | None:
        """What was given for this turn, as soon as it is: every worker asks."""
        return await self._jobs[turn]

    async def hand_in(self, turn: int, result: bytes) -> None:
        """What came of this turn: the first worker says it."""
        self._results[turn].set_result(result)

    async def result(self, turn: int) -> bytes:
        """What was handed in, as soon as it is."""
        return await self._results[turn]


def _awaited() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()
