"""What is done with a request whose replica is lost: asked once more while nothing has gone out, and counted as it was.

The engine's side is played; a real replica that is killed is in tests/integration/test_serve_replicas.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from serve.metrics import Metrics
from serve.openai_api import parse_chat
from serve.parts import Part, Started
from serve.routing import Target
from service.errors import ClusterError, LorayError, WorkerLostError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # importing ray.serve 2.60
LOST = WorkerLostError("the engine's replica was lost")
WHOLE = (Part(0, "all ", 1), Part(0, "of it", 1, "stop"))


class Answering:
    """The stream of one try: these parts, or an error in place of one."""

    def __init__(self, parts: tuple[Part | Exception, ...]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[Part]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        pass


class Engines:
    """What comes of each try: an error at once, parts, or, for None, nothing ever."""

    def __init__(self, *tries: Exception | tuple[Part | Exception, ...] | None) -> None:
        self._tries = list(tries)

    async def ask(self, *_: Any) -> tuple[Answering, Started]:
        one = self._tries.pop(0)
        if one is None:
            await asyncio.Event().wait()
        if isinstance(one, Exception):
            raise one
        assert one is not None
        return Answering(one), Started("red@1", "0" * 64, 3)

    @property
    def num_left(self) -> int:
        return len(self._tries)


def asked(engines: Engines, *, stream: bool = False) -> tuple[Response | LorayError, Callable[..., float]]:
    """The response or what was raised, and how to read the numbers."""
    from serve.responder import Responder

    metrics = Metrics()
    body = {"model": "red", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}

    async def find() -> tuple[Target, int]:
        return Target("red@1", "0" * 64, None), 1

    async def answer() -> Response | LorayError:
        try:
            response = await Responder(engines, metrics).respond(parse_chat(json.dumps(body).encode()), find, {}, 0.0)
        except LorayError as error:
            return error
        if isinstance(response, StreamingResponse):
            return Response("".join([str(chunk) async for chunk in response.body_iterator]))
        return response

    response = asyncio.run(answer())

    def count(name: str, *labels: str) -> float:
        rows = metrics.text([]).decode().splitlines()
        found = [row for row in rows if row.startswith(name) and all(label in row for label in labels)]
        return sum(float(row.rpartition(" ")[2]) for row in found)

    return response, count


@pytest.mark.parametrize("first", [LOST, (LOST,), (WHOLE[0], LOST)], ids=["before it began", "begun", "in the middle"])
def test_a_whole_answer_is_asked_of_another_replica_and_is_no_error(first: Any) -> None:
    response, count = asked(Engines(first, WHOLE))
    assert isinstance(response, Response) and response.status_code == 200
    assert json.loads(bytes(response.body))["choices"][0]["message"]["content"] == "all of it"
    assert count("loray_requests_sent_again_total") == count("loray_requests_total", 'end="ok"') == 1
    assert count("loray_requests_total", 'end="lost"') == (first is not LOST)
    assert count("loray_requests_total", 'end="error"') == count("loray_refused_requests_total") == 0
    assert count("loray_requests_in_flight") == 0


def test_a_stream_is_asked_again_before_it_began_only() -> None:
    response, count = asked(Engines(LOST, WHOLE), stream=True)
    assert isinstance(response, Response) and b"of it" in bytes(response.body) and b"[DONE]" in bytes(response.body)
    assert count("loray_requests_sent_again_total") == 1
    engines = Engines((WHOLE[0], LOST), WHOLE)
    response, count = asked(engines, stream=True)
    assert isinstance(response, Response) and b"was lost" in bytes(response.body) and b"[DONE]" not in response.body
    assert engines.num_left == 1 and count("loray_requests_total", 'end="error"') == 1
    assert count("loray_requests_sent_again_total") == count("loray_requests_total", 'end="lost"') == 0


def test_what_is_lost_twice_is_refused() -> None:
    engines = Engines(LOST, LOST, WHOLE)
    response, count = asked(engines)
    assert response is LOST and engines.num_left == 1
    assert count("loray_refused_requests_total", 'status="503"') == count("loray_requests_sent_again_total") == 1
    response, count = asked(Engines((LOST,), (LOST,), WHOLE))
    assert response is LOST
    assert count("loray_requests_total", 'end="lost"') == count("loray_requests_total", 'end="error"') == 1
    assert count("loray_refused_requests_total") == 0


def test_where_no_other_replica_is_the_loss_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import responder

    monkeypatch.setattr(responder, "AGAIN_WITHIN_S", 0.05)
    response, count = asked(Engines(LOST, None))
    assert response is LOST and count("loray_refused_requests_total", 'status="503"') == 1


def test_other_errors_are_not_asked_again() -> None:
    engines = Engines(ClusterError("no engine"), WHOLE)
    response, count = asked(engines)
    assert isinstance(response, ClusterError) and engines.num_left == 1
    assert count("loray_refused_requests_total", 'status="503"') == 1 and count("loray_requests_sent_again_total") == 0
