"""A request whose schema is read on another thread while its caller goes away: nothing runs for nobody, nothing is freed early."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from service.errors import RequestError
from service.inference.engine import GenerationRequest, OnChunk, SamplingParams

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # importing ray.serve 2.60
REQUEST = GenerationRequest("r", (1,), SamplingParams(max_tokens=1, json_schema="{}"))


class Engine:
    """Takes as long over a submit as the test wants."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_submit, self.submitting = threading.Event(), threading.Event()
        self.cancelled: list[str] = []
        self.error = error

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        self.submitting.set()
        assert self.may_submit.wait(20)
        if self.error:
            raise self.error

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def close(self) -> None: ...


async def _leave_while_submitting(engine: Engine, released: list[bool]) -> Any:
    """What `generate` does around a submit, with a caller that goes away; the countdown afterwards."""
    from serve.replica import EngineReplica, _Countdown

    replica = EngineReplica.__new__(EngineReplica)
    replica._engine = engine  # type: ignore[assignment]
    running = _Countdown(1, lambda: released.append(True))
    task = asyncio.ensure_future(replica._submit_aside(REQUEST, lambda chunk: None, running))
    assert await asyncio.to_thread(engine.submitting.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    running.down(1)  # generate counts down what it did not submit
    assert released == [], "the thread may still submit it"
    engine.may_submit.set()
    for _ in range(1000):
        if engine.cancelled or released:
            break
        await asyncio.sleep(0.01)
    return running


def test_what_is_submitted_after_its_caller_left_is_cancelled() -> None:
    engine, released = Engine(), []  # type: ignore[var-annotated]
    running = asyncio.run(_leave_while_submitting(engine, released))
    assert engine.cancelled == ["r"] and released == []
    running.down()  # the last chunk of the cancelled request
    assert released == [True]


def test_a_schema_that_fails_after_its_caller_left_frees_the_adapter() -> None:
    engine, released = Engine(RequestError("no such schema")), []  # type: ignore[var-annotated]
    asyncio.run(_leave_while_submitting(engine, released))
    assert engine.cancelled == [] and released == [True]
