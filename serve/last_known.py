"""A value out of the store that requests need: read anew when it is old, and the last one known while no store answers.

One reading at a time, on a thread. A store that keeps silent, or fails, holds a request up once at most, for PATIENCE_S:
until it answers again, requests get the last known value at once. It is asked again every AGAIN_S, whether requests come
or not; a value that is followed always is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from service.errors import StorageError

PATIENCE_S = 2.0
AGAIN_S = 1.0
_log = logging.getLogger(__name__)
ValueT = TypeVar("ValueT")


class LastKnown(Generic[ValueT]):
    """What `read` returns, at most as old as the caller wants. Belongs to one event loop."""

    def __init__(self, read: Callable[[], ValueT], what: str) -> None:
        self._read, self._what = read, what
        self._value: ValueT | None = None
        self._read_at = 0.0  # when the reading that gave the value began
        self._changed_at = 0.0
        self._away = False  # the last reading failed, or is not done after PATIENCE_S
        self._reading: asyncio.Task[Exception | None] | None = None
        self._followed = False
        self._asking: asyncio.Task[None] | None = None  # while the store is away, or for ever

    def follow(self) -> None:
        """Read every AGAIN_S from now on. To be called on the event loop."""
        self._followed = True
        self._asking = asyncio.create_task(self._ask_again())

    def changed(self) -> None:
        """Somebody here has just written to the store: what was read before is old, and the store answers."""
        self._changed_at, self._away = time.monotonic(), False

    async def get(self, age_s: float) -> ValueT:
        """The value, at most `age_s` old if the store answers. Its own error while nothing is known at all."""
        asked_at = time.monotonic()
        # Read once more where somebody has changed something while it was read.
        while self._value is None or self._read_at < max(self._changed_at, asked_at - age_s):
            if self._reading is None:
                self._reading = asyncio.create_task(self._refresh())
            reading = self._reading
            patience_s = None if self._value is None else 0.0 if self._away else PATIENCE_S
            await asyncio.wait({reading}, timeout=patience_s)
            if not reading.done():
                self._gone("it is silent")
                break
            error = reading.result()
            if error is not None:
                if self._value is None or not isinstance(error, StorageError):
                    raise error
                break
        assert self._value is not None
        return self._value

    async def _refresh(self) -> Exception | None:
        """Read once; the error, where there was one."""
        began = time.monotonic()
        try:
            self._value = await asyncio.to_thread(self._read)
        except Exception as error:
            if isinstance(error, StorageError):
                self._gone(str(error))
            return error
        else:
            self._read_at, self._away = began, False
            return None
        finally:
            self._reading = None

    def _gone(self, why: str) -> None:
        """The store does not answer: say so once, and ask it until it does."""
        if self._value is not None and not self._away:
            _log.warning("answering from the last known %s, the store does not answer: %s", self._what, why)
            self._away = True
        if self._asking is None and self._away:
            self._asking = asyncio.create_task(self._ask_again())

    async def _ask_again(self) -> None:
        said = ""
        while self._away or self._followed:
            await asyncio.sleep(AGAIN_S)
            if self._reading is None:
                self._reading = asyncio.create_task(self._refresh())
            reading = self._reading
            await asyncio.wait({reading})
            error = reading.result()
            if error is not None and str(error) != said and not isinstance(error, StorageError):
                _log.warning("the %s cannot be read: %s", self._what, error)
                said = str(error)
        self._asking = None
