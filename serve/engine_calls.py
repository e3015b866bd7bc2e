"""A gateway's side of the engine: a call for every request, and one long-lived stream from every replica.

The call stays open while its request runs, so that Ray Serve counts it, carries its errors, and cancels it; what the
request says comes on the stream of the replica that took it (`outbox.py`). A replica that has no stream to this gateway
says so at once: the gateway opens one and asks again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import time
import uuid
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from serve.openai_api import Ask
from serve.outbox import IDLE_S
from serve.parts import Part, Started
from serve.routing import Target
from service.errors import BusyError, ClusterError, WorkerLostError

MAX_TRIES = 5  # replicas that say they have no stream, for one request
SILENCE_S = 3 * IDLE_S  # a replica with requests is never silent for longer than IDLE_S: its node is gone
LEAVING_S = 1.0  # Serve cancels the calls of a client that has left before it cancels who waits for them
LAST_PARTS_S = 30.0  # between the end of a call and the last parts, on their way through the stream
AVOIDED_S = 60.0  # a lost replica may stand in Serve's list until Serve has looked three times
_DEATHS = (RayActorError, OutOfMemoryError)  # by the hand of Ray's memory monitor it is no RayActorError
_LOST = "the engine's replica was lost while it answered. Send the request again."
_log = logging.getLogger(__name__)


class Answering:
    """The parts of a request's answers, as they come; those that nobody took yet are joined. Belongs to one event loop."""

    def __init__(self, num_prompts: int, n: int) -> None:
        self.started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.replica: str | None = None  # the one that answers
        self.call: Any = None
        self.task: asyncio.Task[None] | None = None
        self.is_whole = asyncio.Event()  # every part is here
        self._n = n
        self._open = set(range(num_prompts * n))
        self._parts: dict[int, Part] = {}
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    def take(self, message: Started | Part) -> None:
        """A message of the stream."""
        if isinstance(message, Started):
            for choice in range(len(message.echoed) * self._n):
                echoed, come = Part(choice, message.echoed[choice // self._n]), self._parts.get(choice)
                self._parts[choice] = echoed.joined(come) if come else echoed
            if not self.started.done():
                self.started.set_result(message)
            return
        before = self._parts.get(message.choice)
        self._parts[message.choice] = before.joined(message) if before else message
        if message.finish_reason is not None:
            self._open.discard(message.choice)
        if not self._open:
            self.is_whole.set()
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """The request has failed."""
        self._error = error
        if not self.started.done():
            self.started.set_exception(error)
        self._news.set()

    def cancel(self) -> None:
        """The caller wants no more: the request ends in the engine, too, unless it has ended."""
        if self.task is not None and not self.task.done() and not self.is_whole.is_set():
            if self.call is not None:
                self.call.cancel()
            self.task.cancel()

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> Part:
        while not self._parts:
            if not self._open:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._parts.pop(next(iter(self._parts)))


class _Stream:
    """One replica's stream: its number among all that were opened, and whether it has begun (or failed)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.has_begun = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class EngineCalls:
    """The engine deployment as this gateway calls it. Belongs to one event loop."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True)
        self._gateway = secrets.token_hex(8)
        self._answering: dict[str, Answering] = {}
        self._streams: dict[str, _Stream] = {}  # by replica
        self._num_streams = 0
        self._lost_at: dict[str, float] = {}  # replicas, by a monotonic clock

    async def ask(self, ask: Ask, target: Target, epoch: int) -> tuple[Answering, Started]:
        """Send a request to a replica. Raises what is wrong with it; parts come once it has started.

        WorkerLostError, here or instead of a part: the replica was lost, and the same may be asked of another.
        """
        request, answering = uuid.uuid4().hex, Answering(len(ask.prompts), ask.n)
        self._answering[request] = answering
        answering.task = asyncio.create_task(self._carry(request, answering, ask, target, epoch))
        try:
            return answering, await answering.started
        except BaseException:
            answering.cancel()
            raise

    async def _carry(self, request: str, answering: Answering, ask: Ask, target: Target, epoch: int) -> None:
        """The call of one request, from its sending until its last part is here."""
        replica: str | None = None
        try:
            for _ in range(MAX_TRIES):
                known = self._num_streams
                call = self._handle.generate.remote(
                    self._gateway, request, ask, target, epoch, replica, self._lately_lost()
                )
                answering.call = call
                taken = await anext(call)
                if taken.is_heard:
                    answering.replica = taken.replica
                    async for _ in call:  # says no more, and ends with the request
                        pass
                    return await _last_parts(answering)
                replica = taken.replica
                await self._open(replica, known)
            raise ClusterError("no replica of the engine could be heard. Try again in some seconds.")
        except (asyncio.CancelledError, RequestCancelledError, TaskCancelledError):
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            await asyncio.sleep(LEAVING_S)
            answering.fail(WorkerLostError("the engine gave the request up: it was not heard. Send it again."))
        except Exception as error:
            if isinstance(error, _DEATHS) and answering.replica:
                self._lost_at[answering.replica] = time.monotonic()
            answering.fail(_ours(error))
        finally:
            del self._answering[request]

    async def _open(self, replica: str, known: int) -> None:
        """Read the replica's stream from now on, unless another request is opening it, or has after `known`."""
        stream = self._streams.get(replica)
        if stream is None or (stream.number <= known and stream.has_begun.is_set()):
            self._num_streams += 1
            stream = self._streams[replica] = _Stream(self._num_streams)
            # In a context of its own: Serve would end it with the request that happened to open it.
            stream.task = asyncio.create_task(self._read(replica, stream), context=contextvars.Context())
        await stream.has_begun.wait()

    async def _read(self, replica: str, stream: _Stream) -> None:
        batches = self._handle.stream.remote(self._gateway, replica)
        reason = "it has ended"
        try:
            while True:
                async with asyncio.timeout(SILENCE_S if stream.has_begun.is_set() else None):
                    batch = await anext(batches)
                stream.has_begun.set()
                for request, message in batch:
                    if request in self._answering:
                        self._answering[request].take(message)
        except StopAsyncIteration:
            pass
        except TimeoutError:
            reason = f"nothing came for {SILENCE_S:g} s"
        except Exception as error:
            reason = str(error)
        finally:
            batches.cancel()
            stream.has_begun.set()
            if self._streams.get(replica) is stream:
                del self._streams[replica]
                self._give_up(replica, reason)

    def _lately_lost(self) -> frozenset[str]:
        now = time.monotonic()
        self._lost_at = {replica: at for replica, at in self._lost_at.items() if now < at + AVOIDED_S}
        return frozenset(self._lost_at)

    def _give_up(self, replica: str, reason: str) -> None:
        """The replica is not heard any more: what it has not finished saying has failed."""
        lost = [one for one in self._answering.values() if one.replica == replica and not one.is_whole.is_set()]
        if lost:
            self._lost_at[replica] = time.monotonic()
            _log.warning("%d requests are lost with the stream of replica %s: %s", len(lost), replica, reason)
        for answering in lost:
            answering.fail(WorkerLostError(_LOST))
            answering.cancel()


def _ours(error: Exception) -> Exception:
    """Ray Serve's errors as ours where, raised in a gateway, it would answer them itself: in plain text, with 503."""
    if isinstance(error, BackPressureError):
        return BusyError("the endpoint is full: no more requests can wait. Send it again in a second.")
    if isinstance(error, DeploymentUnavailableError):
        return ClusterError("the engine is down or being replaced. Try again in some seconds.")
    if isinstance(error, _DEATHS):
        return WorkerLostError(_LOST)
    return error


async def _last_parts(answering: Answering) -> None:
    try:
        async with asyncio.timeout(LAST_PARTS_S):
            await answering.is_whole.wait()
    except TimeoutError:
        raise WorkerLostError("the end of the answer was lost on its way. Send the request again.") from None
