"""From a request that was read to its response: asked of the engine, and once more where its replica is lost meanwhile.

Nothing may have gone out to the client by then: of a stream that has begun the loss is an event (`chunks.py`). No names are
looked up here, and no bodies checked.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from starlette.responses import JSONResponse, Response

from serve.chunks import Events, completion
from serve.http_errors import status_of
from serve.metrics import Metrics
from serve.openai_answers import Answer
from serve.openai_api import Ask
from serve.parts import Started
from serve.routing import Target
from service.errors import WorkerLostError

AGAIN_WITHIN_S = 60.0  # another replica takes a lost one's request, or there is none
_log = logging.getLogger(__name__)


class Engines(Protocol):
    """What is asked: `engine_calls.EngineCalls`."""

    async def ask(self, ask: Ask, target: Target, epoch: int) -> tuple[object, Started]:
        """The stream of parts, and who answers."""


class Responder:
    """Asks the engine and counts what comes of it."""

    def __init__(self, engines: Engines, metrics: Metrics) -> None:
        self._engines, self._metrics = engines, metrics

    async def respond(
        self,
        ask: Ask,
        find: Callable[[], Awaitable[tuple[Target, int]]],
        headers: Mapping[str, str],
        since: float,
    ) -> Response:
        """The engine's answer: complete, or a stream that has begun. Raises what is wrong with the request.

        `find` says who answers now, and the epoch that says so; `since` is when the request came, by the metrics' clock.
        """
        try:
            return await self._answer(ask, find, headers, since)
        except WorkerLostError as lost:
            _log.warning("a request is sent once more: %s", lost)
            self._metrics.sent_again()
            return await self._answer(ask, find, headers, since, lost)

    async def _answer(
        self,
        ask: Ask,
        find: Callable[[], Awaitable[tuple[Target, int]]],
        headers: Mapping[str, str],
        since: float,
        lost: WorkerLostError | None = None,
    ) -> Response:
        """One try. WorkerLostError: there may be one more, with this as `lost`."""
        try:
            target, epoch = await find()
            if target.split is not None and not target.has_key and not lost:
                self._metrics.keyless(target.split)
            async with asyncio.timeout(AGAIN_WITHIN_S if lost else None):  # there may be no other replica
                parts, started = await self._engines.ask(ask, target, epoch)
        except Exception as error:
            told = lost if lost and isinstance(error, TimeoutError) else error
            if lost or not isinstance(error, WorkerLostError):
                self._metrics.refused(status_of(told))
            if told is error:
                raise
            raise told from error
        series = (started.model, target.split or "", target.arm or "")
        may_be_lost = not lost and not ask.stream
        stream = self._metrics.observed(parts, started, series, since, ask.n, may_be_lost=may_be_lost)
        name = f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        answer = Answer(name, int(time.time()), started.model, started.digest, ask.is_chat, target.split, target.arm)
        own = {**headers, **answer.headers()}
        if ask.stream:
            return Events(stream, ask, answer, started, own)
        return JSONResponse(await completion(stream, ask, answer, started), headers=own)
