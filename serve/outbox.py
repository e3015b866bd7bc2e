"""What an engine replica has to say, gathered by gateway: one long-lived stream to each carries the parts of all requests.

A message between processes costs more than a token of a small model: a step of 16 rows makes one instead of 16. A
stream ends by itself once no request has been in flight for IDLE_S, so that a replica that is to go can go; the next
request is told so and opens one again (`engine_calls.py`). No Ray here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager

from serve.parts import Part, Started

IDLE_S = 10.0
GATHER_S = 0.002  # a step's rows speak one after the other, within this time

Batch = list[tuple[str, Started | Part]]  # what was said, by request


class Outbox:
    """What is to be said to one gateway. `put` may be called from any thread; the rest belongs to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._said: dict[tuple[str, int], Started | Part] = {}
        self._news = asyncio.Event()
        self._requests: set[asyncio.Task[None]] = set()
        self._reader = 0
        self.is_read = False

    def put(self, request: str, message: Started | Part) -> None:
        """Say something; parts of one answer that no batch has taken yet become one."""
        with self._lock:
            first = not self._said
            if isinstance(message, Started):
                self._said[request, -1] = message
            else:
                before = self._said.get((request, message.choice))
                self._said[request, message.choice] = before.joined(message) if isinstance(before, Part) else message
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    @contextmanager
    def request(self) -> Iterator[None]:
        """While the current task answers a request of this gateway: it is cancelled if nobody can hear it any more."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)

    async def batches(self) -> AsyncGenerator[Batch]:
        """First an empty batch, then all that is said, as it comes; an empty one when nothing is for IDLE_S.

        Ends instead when no request is in flight then, or when another reader has come.
        """
        self._reader += 1
        mine, self.is_read = self._reader, True
        try:
            yield []
            while mine == self._reader:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._news.wait()
                except TimeoutError:
                    if not self._requests and not self._said:
                        return
                    yield []
                    continue
                await asyncio.sleep(GATHER_S)
                if mine == self._reader:
                    yield self._taken()
        finally:
            if mine == self._reader:
                self.is_read = False
                for task in self._requests:
                    task.cancel()

    def _taken(self) -> Batch:
        self._news.clear()
        with self._lock:
            said, self._said = self._said, {}
        return [(request, message) for (request, _), message in said.items()]


class Outboxes:
    """The outboxes of a replica, by gateway: those that have a reader."""

    def __init__(self) -> None:
        self._open: dict[str, Outbox] = {}

    def of(self, gateway: str) -> Outbox | None:
        """The outbox that this gateway reads, if it does."""
        return self._open.get(gateway)

    async def read(self, gateway: str) -> AsyncIterator[Batch]:
        """All that is said to this gateway from now on."""
        outbox = self._open.setdefault(gateway, Outbox(asyncio.get_running_loop()))
        batches = outbox.batches()
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()
            if not outbox.is_read and self._open.get(gateway) is outbox:
                del self._open[gateway]
