"""A mapping of bounded bytes: what was not used for longest makes room."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class ByteLru(Generic[KeyT, ValueT]):
    """Values with their sizes. What is larger than all of it is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._values: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()

    def __contains__(self, key: KeyT) -> bool:
        return key in self._values

    def get(self, key: KeyT) -> ValueT | None:
        """The value, which counts as used now."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: KeyT, value: ValueT, num_bytes: int) -> None:
        """Keep a value of this size; one that is here already stays."""
        if key in self._values or num_bytes > self.max_bytes:
            return
        self._values[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self.num_bytes -= dropped
