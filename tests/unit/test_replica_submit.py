"""A request whose schema is read on another thread while its caller goes away: nothing runs for nobody, nothing is freed early."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.openai_api import parse_text
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
    replica._schemas = ThreadPoolExecutor(1)
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


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": [1] * 100, "max_tokens": 1000, "logprobs": 20, "n": 13}, "max_tokens"),
        ({"prompt": [1] * 100, "max_tokens": 0, "echo": True, "logprobs": 20, "n": 125}, "prompt"),
    ],
)
def test_log_probabilities_beyond_what_one_answer_may_hold_are_refused(body: dict[str, Any], field: str) -> None:
    from serve.replica import MAX_SCORES, _check_answer_scores, _check_scores

    def check(n: int, stream: bool = False) -> None:
        ask = parse_text(json.dumps({"model": "m", **body, "n": n, "stream": stream}).encode())
        _check_scores(ask, 100)
        _check_answer_scores(ask, [SamplingParams(max_tokens=body["max_tokens"] or 1)] * n)

    check(body["n"] - 1)
    with pytest.raises(RequestError, match=f"{field}: .* more than {MAX_SCORES} log-probabilities"):
        check(body["n"])
    if field == "max_tokens":
        check(body["n"], stream=True)
