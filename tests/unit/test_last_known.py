"""What requests read of the store: fresh enough while it answers, the last known at once while it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from serve import last_known
from serve.last_known import LastKnown
from service.errors import StorageError

DEADLINE_S = 20.0


class Store:
    """Counts its readings; may fail, or keep silent until the test lets it answer."""

    def __init__(self) -> None:
        self.value, self.num_read, self.error = 1, 0, False
        self.answers = threading.Event()
        self.answers.set()

    def read(self) -> int:
        self.num_read += 1
        value = self.value
        assert self.answers.wait(DEADLINE_S)
        if self.error:
            raise StorageError("the store is away")
        return value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_value_is_read_again_when_it_is_old_or_was_changed_and_once_for_all() -> None:
    async def body() -> None:
        store = Store()
        known = LastKnown(store.read, "value")
        assert await asyncio.gather(*(known.get(60.0) for _ in range(5))) == [1] * 5
        assert store.num_read == 1
        store.value = 2
        assert await known.get(60.0) == 1
        assert await known.get(0.0) == 2
        store.value = 3
        known.changed()
        assert await known.get(60.0) == 3

    asyncio.run(body())


def test_a_value_that_is_followed_is_read_whether_anybody_asks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr(last_known, "AGAIN_S", 0.0)
        store = Store()
        known = LastKnown(store.read, "value")
        known.follow()
        await until(lambda: store.num_read > 3)
        store.error = True
        after = store.num_read
        await until(lambda: store.num_read > after + 3)
        store.error, store.value = False, 2
        after = store.num_read
        await until(lambda: store.num_read > after + 3)
        assert await known.get(60.0) == 2

    asyncio.run(body())


def test_a_change_while_it_is_read_is_not_missed() -> None:
    async def body() -> None:
        store = Store()
        known = LastKnown(store.read, "value")
        assert await known.get(0.0) == 1
        store.answers.clear()
        asking = asyncio.create_task(known.get(0.0))
        await until(lambda: store.num_read == 2)  # it has seen 1
        store.value = 2
        known.changed()
        store.answers.set()
        assert await asking == 2

    asyncio.run(body())


def test_a_store_that_fails_leaves_the_last_known_and_is_heard_again_when_it_is_back() -> None:
    async def body() -> None:
        store = Store()
        store.error = True
        known = LastKnown(store.read, "value")
        with pytest.raises(StorageError):
            await known.get(0.0)
        store.error = False
        assert await known.get(0.0) == 1
        store.error, store.value = True, 2
        assert [await known.get(0.0) for _ in range(3)] == [1] * 3
        store.error = False

        async def get() -> int:
            return await known.get(0.0)

        async with asyncio.timeout(DEADLINE_S):
            while await get() != 2:
                await asyncio.sleep(0.001)

    asyncio.run(body())


def test_a_silent_store_holds_up_one_request_for_a_while_and_the_next_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        store = Store()
        known = LastKnown(store.read, "value")
        assert await known.get(0.0) == 1
        store.answers.clear()
        store.value = 2
        monkeypatch.setattr(last_known, "PATIENCE_S", 0.01)
        assert await known.get(0.0) == 1
        monkeypatch.setattr(last_known, "PATIENCE_S", None)  # whoever waited now would wait for ever
        async with asyncio.timeout(DEADLINE_S):
            assert [await known.get(0.0) for _ in range(5)] == [1] * 5
        assert store.num_read == 2, "one reading at a time"
        store.answers.set()
        async with asyncio.timeout(DEADLINE_S):
            while await known.get(0.0) != 2:
                await asyncio.sleep(0.001)

    asyncio.run(body())


def test_a_store_that_is_back_is_noticed_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr(last_known, "AGAIN_S", 0.01)
        store = Store()
        known = LastKnown(store.read, "value")
        assert await known.get(0.0) == 1
        store.error, store.value = True, 2
        assert await known.get(0.0) == 1
        store.error, num_read = False, store.num_read
        await until(lambda: store.num_read > num_read and known._reading is None)
        assert await known.get(60.0) == 2

    asyncio.run(body())


def test_who_is_cancelled_does_not_take_the_reading_from_others() -> None:
    async def body() -> None:
        store = Store()
        known = LastKnown(store.read, "value")
        store.answers.clear()
        first, second = asyncio.create_task(known.get(0.0)), asyncio.create_task(known.get(0.0))
        await until(lambda: store.num_read == 1)
        first.cancel()
        store.answers.set()
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(body())
