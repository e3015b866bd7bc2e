"""Between a gateway and its engines, with the processes' border left out: streams open, end and break, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from serve import outbox
from serve.openai_api import Ask, parse_chat
from serve.outbox import Batch, Outboxes
from serve.parts import Part, Started, Taken
from serve.routing import Target
from service.errors import BusyError, ClusterError, RequestError, WorkerLostError

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

    def __init__(self, answer: Callable[[Say], Awaitable[None]], name: str = "one") -> None:
        self.name, self.outboxes, self.answer = name, Outboxes(), answer
        self.num_streams = 0
        self.avoided: frozenset[str] = frozenset()
        self.cancelled = asyncio.Event()

    async def generate(
        self, gateway: str, request: str, asked: Ask, target: Target, epoch: int, to: str | None, lost: frozenset[str]
    ) -> AsyncIterator[Taken]:
        self.avoided = lost
        box = self.outboxes.of(gateway)
        if box is None:
            yield Taken(self.name, is_heard=False)
            return
        with box.request():
            yield Taken(self.name, is_heard=True)
            try:
                await self.answer(lambda message: box.put(request, message))
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

    async def stream(self, gateway: str, replica: str) -> AsyncIterator[Batch]:
        self.num_streams += 1
        async for batch in self.outboxes.read(gateway):
            yield batch


class Call:
    """A streaming call as a handle returns it: carried out by one task, which `cancel` cancels."""

    def __init__(self, generator: AsyncIterator[Any]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.ensure_future(self._carry_out(generator))

    async def _carry_out(self, generator: AsyncIterator[Any]) -> None:
        try:
            async for item in generator:
                self._items.put_nowait((item, None))
            self._items.put_nowait((None, StopAsyncIteration()))
        except BaseException as error:
            self._items.put_nowait((None, error))

    def cancel(self) -> None:
        self.task.cancel()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        item, error = await self._items.get()
        if error is not None:
            raise error
        return item


class Handle:
    """A deployment handle onto replicas in this process; requests that want no replica go to the first."""

    def __init__(self, *replicas: Replica) -> None:
        self._replicas = {replica.name: replica for replica in replicas}
        self.streams: list[Call] = []
        self.generate = SimpleNamespace(remote=self._generate)
        self.stream = SimpleNamespace(remote=self._stream)

    def options(self, stream: bool) -> Handle:
        return self

    def _generate(self, *args: Any) -> Call:
        return Call(self._replicas[args[5] or next(iter(self._replicas))].generate(*args))

    def _stream(self, gateway: str, replica: str) -> Call:
        self.streams.append(Call(self._replicas[replica].stream(gateway, replica)))
        return self.streams[-1]


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


def run(test: Callable[[Any, Handle, Replica], Awaitable[None]], answer: Callable[[Say], Awaitable[None]]) -> None:
    from serve.engine_calls import EngineCalls

    async def body() -> None:
        replica = Replica(answer)
        handle = Handle(replica)
        await asyncio.wait_for(test(EngineCalls(handle), handle, replica), 20)

    asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_many_requests_at_once_share_one_stream() -> None:
    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        texts = await asyncio.gather(*(text_of(calls) for _ in range(20)))
        assert texts == [{0: "0 1 2 3 4 "}] * 20
        assert replica.num_streams == 1

    run(test, counting)


def test_a_stream_ends_when_idle_and_the_next_request_opens_one(short_idle: None) -> None:
    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        for _ in range(2):
            assert await text_of(calls) == {0: "0 1 2 3 4 "}
            await until(lambda: calls._streams == {})
        assert replica.num_streams == 2

    run(test, counting)


def test_what_is_wrong_with_a_request_is_raised_before_it_starts() -> None:
    async def refuse(say: Say) -> None:
        raise RequestError("too long", "messages")

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        with pytest.raises(RequestError, match="too long"):
            await text_of(calls)
        assert calls._answering == {}

    run(test, refuse)


def test_what_ray_serve_would_answer_itself_is_raised_as_ours() -> None:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    raised: list[Exception] = []

    async def refuse(say: Say) -> None:
        raise raised[-1]

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        raised.append(BackPressureError(num_queued_requests=1, max_queued_requests=1))
        with pytest.raises(BusyError, match="full"):
            await text_of(calls)
        raised.append(DeploymentUnavailableError(SimpleNamespace(name="Engine")))
        with pytest.raises(ClusterError, match="being replaced"):
            await text_of(calls)

    run(test, refuse)


def test_a_failure_on_the_way_is_raised_after_what_came_before_it() -> None:
    async def break_off(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        say(Part(0, "half", 1))
        await asyncio.sleep(0.05)  # so that it is on its way
        raise ClusterError("gone")

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        assert (await anext(answering)).text == "half"
        with pytest.raises(ClusterError, match="gone"):
            await anext(answering)

    run(test, break_off)


async def for_ever(say: Say) -> None:
    say(Started("base", "0" * 64, 3))
    say(Part(0, "half", 1))
    await asyncio.Event().wait()


def test_a_caller_that_goes_away_cancels_its_request_in_the_replica() -> None:
    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        answering.cancel()
        await replica.cancelled.wait()
        await until(lambda: calls._answering == {})
        assert answering.task is not None and answering.task.cancelled()

    run(test, for_ever)


def test_requests_that_nobody_hears_any_more_fail_and_are_cancelled() -> None:
    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        assert (await anext(answering)).text == "half"
        handle.streams[0].cancel()  # the stream alone breaks
        with pytest.raises(WorkerLostError):
            await anext(answering)
        await replica.cancelled.wait()
        await until(lambda: calls._answering == {})
        replica.answer = counting
        assert await text_of(calls) == {0: "0 1 2 3 4 "}, "the next one opens another"

    run(test, for_ever)


@pytest.mark.parametrize("death", ["ActorDiedError", "OutOfMemoryError"])
def test_a_replica_that_dies_is_told_from_what_is_wrong_with_a_request_and_avoided(
    death: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.exceptions

    from serve import engine_calls

    async def die(say: Say) -> None:
        raise getattr(ray.exceptions, death)("killed") if death == "OutOfMemoryError" else ray.exceptions.ActorDiedError

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        with pytest.raises(WorkerLostError, match="Send the request again"):
            await text_of(calls)
        assert replica.avoided == frozenset()
        replica.answer = counting
        await text_of(calls)
        assert replica.avoided == {"one"}
        monkeypatch.setattr(engine_calls, "AVOIDED_S", 0.0)
        await text_of(calls)
        assert replica.avoided == frozenset(), "for a while only"

    run(test, die)


def test_a_replica_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import engine_calls

    monkeypatch.setattr(engine_calls, "SILENCE_S", 0.1)

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        assert (await anext(answering)).text == "half"
        with pytest.raises(WorkerLostError, match="lost"):
            await anext(answering)
        await until(lambda: calls._streams == {} and calls._answering == {})

    run(test, for_ever)


def test_a_replica_with_a_silent_request_is_not_given_up(short_idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import engine_calls

    monkeypatch.setattr(engine_calls, "SILENCE_S", 0.25)  # five times IDLE_S

    async def slow(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        await asyncio.sleep(0.6)
        say(Part(0, "late", 1, "stop"))

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        assert await text_of(calls) == {0: "late"}
        assert replica.num_streams == 1

    run(test, slow)


def test_requests_that_come_while_a_stream_opens_wait_for_it() -> None:
    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        may_open, open_now = asyncio.Event(), replica.stream

        async def late(gateway: str, name: str) -> AsyncIterator[Batch]:
            await may_open.wait()
            async for batch in open_now(gateway, name):
                yield batch

        replica.stream = late  # type: ignore[method-assign,assignment]
        first = asyncio.ensure_future(text_of(calls))
        await until(lambda: calls._num_streams == 1)
        second = asyncio.ensure_future(text_of(calls))  # told that there is no stream, after the first was sent for
        await asyncio.sleep(0.02)
        may_open.set()
        assert await first == await second == {0: "0 1 2 3 4 "}
        assert replica.num_streams == 1

    run(test, counting)


def test_answers_and_prompts_of_several_choices_keep_apart() -> None:
    async def echo(say: Say) -> None:
        say(Part(1, "one", 1, "stop"))  # before Started: the engine's thread may be quicker
        say(Started("base", "0" * 64, 3, ("prompt ",)))
        say(Part(0, "zero", 1, "stop"))

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        assert await text_of(calls, 2) == {0: "prompt zero", 1: "prompt one"}

    run(test, echo)


def test_a_slow_reader_gets_joined_parts_and_misses_nothing() -> None:
    async def chatter(say: Say) -> None:
        say(Started("base", "0" * 64, 3))
        for number in range(200):
            say(Part(0, f"{number} ", 1))
        say(Part(0, "", 1, "stop"))

    async def test(calls: Any, handle: Handle, replica: Replica) -> None:
        answering, _ = await calls.ask(ask(), BASE, 0)
        await until(answering.is_whole.is_set)
        parts = [part async for part in answering]
        assert len(parts) < 5
        assert "".join(part.text for part in parts) == "".join(f"{number} " for number in range(200))
        assert sum(part.num_tokens for part in parts) == 201

    run(test, chatter)
