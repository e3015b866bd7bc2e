"""Between a gateway and its engines, with the processes' border left out: streams open, end and break, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from serve import outbox
from serve.openai_api import Ask, parse_chat
from serve.outbox import Batch, Outboxes
from serve.parts import Part, Started
from serve.routing import Target
from service.errors import ClusterError, RequestError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # importing ray.serve 2.60
BASE = Target("base", "0" * 64, None)
Say = Callable[[Started | Part], None]


def ask(n: int = 1) -> Ask:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "n": n}
    return parse_chat(json.dumps(body).encode())


class Replica:
    """What `EngineReplica` is to its gateways, with an answer that the test writes."""

    def __init__(self, answer: Callable[[Say], Awaitable[None]]) -> None:
        self.name, self.outboxes, self.answer = "one", Outboxes(), answer
        self.num_streams = 0
        self.cancelled = False
        self.readers: list[Any] = []

    async def generate(self, gateway: str, request: str, asked: Ask, target: Target, epoch: int, to: Any) -> str | None:
        box = self.outboxes.of(gateway)
        if box is None:
            return self.name
        with box.request():
            try:
                await self.answer(lambda message: box.put(request, message))
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return None

    async def stream(self, gateway: str, replica: str) -> AsyncIterator[Batch]:
        self.num_streams += 1
        batches = self.outboxes.read(gateway)
        self.readers.append(batches)
        async for batch in batches:
            yield batch


class Handle:
    """A deployment handle onto one replica in this process: `.method.remote(...)`, `.options(stream=True)`."""

    def __init__(self, replica: Replica) -> None:
        self.generate = self.stream = self
        self._replica = replica

    def options(self, stream: bool) -> Any:
        return type("Streaming", (), {"stream": type("Method", (), {"remote": self._replica.stream})})

    def remote(self, *args: Any) -> Any:
        return asyncio.ensure_future(self._replica.generate(*args))


@pytest.fixture
def short_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outbox, "IDLE_S", 0.05)
    yield


async def counting(say: Say) -> None:
    say(Started("base", "0" * 64, 3))
    for number in range(5):
        await asyncio.sleep(0.001)
        say(Part(0, f"{number} ", 1, "stop" if number == 4 else None))


async def text_of(calls: Any, n: int = 1) -> dict[int, str]:
    answering, started = await calls.ask(ask(n), BASE, 0)
    assert started.model == "base"
    texts: dict[int, str] = {}
    async for part in answering:
        texts[part.choice] = texts.get(part.choice, "") + part.text
    return texts


def run(test: Callable[[Any, Replica], Awaitable[None]], answer: Callable[[Say], Awaitable[None]]) -> None:
    from serve.engine_calls import EngineCalls

    async def body() -> None:
        replica = Replica(answer)
        await asyncio.wait_for(test(EngineCalls(Handle(replica)), replica), 20)

    asyncio.run(body())


def test_many_requests_at_once_share_one_stream() -> None:
    async def test(calls: Any, replica: Replica) -> None:
        texts = await asyncio.gather(*(text_of(calls) for _ in range(20)))
        assert texts == [{0: "0 1 2 3 4 "}] * 20
        assert replica.num_streams == 1

    run(test, counting)


def test_a_stream_ends_when_idle_and_the_next_request_opens_one(short_idle: None) -> None:
    async def test(calls: Any, replica: Replica) -> None:
        for _ in range(2):
            assert await text_of(calls) == {0: "0 1 2 3 4 "}
            await asyncio.sleep(0.3)
            assert calls._streams == {}
        assert replica.num_streams == 2

    run(test, counting)


def test_a_stream_does_not_end_under_a_request_that_is_silent(short_idle: None) -> None:
    async def slow(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        await asyncio.sleep(0.4)
        say(Part(0, "late", 1, "stop"))

    async def test(calls: Any, replica: Replica) -> None:
        assert await text_of(calls) == {0: "late"}
        assert replica.num_streams == 1

    run(test, slow)


def test_what_is_wrong_with_a_request_is_raised_before_it_starts() -> None:
    async def refuse(say: Say) -> None:
        raise RequestError("too long", "messages")

    async def test(calls: Any, replica: Replica) -> None:
        with pytest.raises(RequestError, match="too long"):
            await text_of(calls)
        assert calls._answering == {}

    run(test, refuse)


def test_a_failure_on_the_way_is_raised_after_what_came_before_it() -> None:
    async def break_off(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        say(Part(0, "half", 1))
        await asyncio.sleep(0.05)
        raise ClusterError("gone")

    async def test(calls: Any, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        assert (await anext(answering)).text == "half"
        with pytest.raises(ClusterError, match="gone"):
            await anext(answering)

    run(test, break_off)


def test_a_caller_that_goes_away_cancels_its_request_in_the_replica() -> None:
    async def for_ever(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        await asyncio.sleep(3600)

    async def test(calls: Any, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        answering.cancel()
        await asyncio.sleep(0.05)
        assert replica.cancelled and calls._answering == {}

    run(test, for_ever)


def test_requests_that_nobody_hears_any_more_are_cancelled() -> None:
    async def for_ever(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        await asyncio.sleep(3600)

    async def test(calls: Any, replica: Replica) -> None:
        await calls.ask(ask(), BASE, 0)
        for stream in calls._streams.values():
            stream.task.cancel()  # as when the gateway's process goes
        await asyncio.sleep(0.05)
        for reader in replica.readers:
            await reader.aclose()
        await asyncio.sleep(0.05)
        assert replica.cancelled

    run(test, for_ever)


def test_answers_and_prompts_of_several_choices_keep_apart() -> None:
    async def echo(say: Say) -> None:
        say(Part(1, "one", 1, "stop"))  # before Started: the engine's thread may be quicker
        say(Started("base", "0" * 64, 3, ("prompt ",)))
        say(Part(0, "zero", 1, "stop"))

    async def test(calls: Any, replica: Replica) -> None:
        assert await text_of(calls, 2) == {0: "prompt zero", 1: "prompt one"}

    run(test, echo)


def test_a_slow_reader_gets_joined_parts_and_misses_nothing() -> None:
    async def chatter(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        for number in range(200):
            say(Part(0, f"{number} ", 1))
        say(Part(0, "", 1, "stop"))

    async def test(calls: Any, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        await asyncio.sleep(0.2)
        parts = [part async for part in answering]
        assert len(parts) < 5
        assert "".join(part.text for part in parts) == "".join(f"{number} " for number in range(200))
        assert sum(part.num_tokens for part in parts) == 201

    run(test, chatter)
