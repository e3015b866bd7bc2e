"""The lines of requests on a replica: bounded one by one, and the engine is handed their beginnings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest

from serve.lines import AT_HAND_TURNS, LINE_TURNS, Lines, line_rows
from serve.openai_api import MAX_CHOICES
from serve.routing import Target
from service.errors import BusyError

SLOTS = 4
MOST = line_rows(SLOTS)
AT_HAND = AT_HAND_TURNS * SLOTS
RED, BLUE = Target("red@1", "1" * 64, "red"), Target("blue@1", "2" * 64, "blue")


def run(test: Callable[[Lines, ExitStack], Awaitable[None]]) -> None:
    async def body() -> None:
        lines = Lines(SLOTS)
        with ExitStack() as stack:
            await asyncio.wait_for(test(lines, stack), 20)
        assert lines._lines == {} and lines.num_waiting == 0, "an empty line is forgotten"

    asyncio.run(body())


def test_a_line_is_as_long_as_its_turns_and_never_shorter_than_a_request() -> None:
    assert line_rows(16) == 16 * LINE_TURNS
    assert line_rows(1) == MAX_CHOICES


def test_a_full_line_refuses_its_own_and_names_it_and_no_other_line_notices() -> None:
    async def test(lines: Lines, stack: ExitStack) -> None:
        for _ in range(MOST - 1):
            stack.enter_context(lines.join(RED, 1))
        with pytest.raises(BusyError, match=f"red@1 is busy: it has {MOST - 1} answers .* with 2 more"):
            stack.enter_context(lines.join(RED, 2))
        stack.enter_context(lines.join(RED, 1))
        assert stack.enter_context(lines.join(BLUE, MAX_CHOICES)).turn.done()

    run(test)


def test_who_leaves_makes_room() -> None:
    async def test(lines: Lines, stack: ExitStack) -> None:
        with lines.join(RED, MOST), pytest.raises(BusyError):
            stack.enter_context(lines.join(RED, 1))
        stack.enter_context(lines.join(RED, MOST))

    run(test)


def test_the_first_are_at_hand_and_the_next_follow_in_their_order() -> None:
    async def test(lines: Lines, stack: ExitStack) -> None:
        ahead = [ExitStack() for _ in range(AT_HAND)]
        for one in ahead:
            stack.push(one)
            assert one.enter_context(lines.join(RED, 1)).turn.done()
        later = [stack.enter_context(lines.join(RED, rows)).turn for rows in (3, 1)]
        assert lines.num_waiting == 4 and not any(turn.done() for turn in later)
        assert stack.enter_context(lines.join(BLUE, 1)).turn.done(), "another's line is not concerned"
        ahead.pop(3).close()
        await later[0]
        assert lines.num_waiting == 1
        for _ in range(2):  # the request of three takes the places of three
            ahead.pop().close()
            assert not later[1].done()
        ahead.pop().close()
        await later[1]

    run(test)


def test_the_rows_of_a_request_that_have_ended_make_room_before_the_request_ends() -> None:
    async def test(lines: Lines, stack: ExitStack) -> None:
        first = stack.enter_context(lines.join(RED, MOST))
        with pytest.raises(BusyError):
            stack.enter_context(lines.join(RED, 1))
        lines.row_ended(RED, first)
        second = stack.enter_context(lines.join(RED, 1))
        for _ in range(MOST - AT_HAND):
            assert not second.turn.done()
            lines.row_ended(RED, first)
        await second.turn

    run(test)


def test_a_caller_that_leaves_while_it_waits_keeps_nobody_waiting() -> None:
    async def waiting(lines: Lines) -> None:
        with lines.join(RED, 1) as place:
            await place.turn

    async def test(lines: Lines, stack: ExitStack) -> None:
        with lines.join(RED, AT_HAND):
            callers = [asyncio.ensure_future(waiting(lines)) for _ in range(2)]
            await asyncio.sleep(0)
            callers[0].cancel()
        await callers[1]
        assert callers[0].cancelled()

    run(test)
