"""Who is next: requests wait in one line per adapter, and the lines take turns by the tokens they were served.

Deficit round robin (Shreedhar and Varghese 1995, section 3): a line may begin requests while its balance is positive,
prompt and answer tokens are taken off the balance as they are computed, and when no line that waits has any left, all of
them get the same quantum. So a line with a thousand requests does not delay another's one. Pure: no clock, no threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

QUANTUM = 512  # tokens

ItemT = TypeVar("ItemT")


@dataclass
class _Line(Generic[ItemT]):
    waiting: deque[ItemT] = field(default_factory=deque)
    balance: int = QUANTUM
    running: int = 0


class FairQueue(Generic[ItemT]):
    """Lines by key. An item that was popped runs until `done`; its line is charged for it meanwhile."""

    def __init__(self) -> None:
        self._lines: dict[str | None, _Line[ItemT]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    def push(self, key: str | None, item: ItemT) -> None:
        """To the end of its line."""
        self._lines.setdefault(key, _Line()).waiting.append(item)

    def pop(self) -> ItemT | None:
        """The next item, which runs from now on; None when nothing waits."""
        waiting = {key: line for key, line in self._lines.items() if line.waiting}
        if not waiting:
            return None
        richest = max(line.balance for line in waiting.values())
        if richest <= 0:
            rounds = -richest // QUANTUM + 1
            for line in waiting.values():
                line.balance += rounds * QUANTUM
        key, line = next((key, line) for key, line in waiting.items() if line.balance > 0)
        self._lines[key] = self._lines.pop(key)  # to the end of the turns
        line.running += 1
        return line.waiting.popleft()

    def charge(self, key: str | None, tokens: int) -> None:
        """This line was served so many tokens."""
        self._lines[key].balance -= tokens

    def done(self, key: str | None) -> None:
        """One of its items runs no more. A line without any is forgotten, with its debts."""
        self._lines[key].running -= 1
        self._forget(key)

    def remove(self, key: str | None, item: ItemT) -> bool:
        """Take a waiting item out of its line; whether it was there."""
        line = self._lines.get(key)
        if line is None or item not in line.waiting:
            return False
        line.waiting.remove(item)
        self._forget(key)
        return True

    def _forget(self, key: str | None) -> None:
        line = self._lines[key]
        if not line.waiting and not line.running:
            del self._lines[key]
