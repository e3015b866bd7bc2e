"""Waiting for a condition with a deadline: tests never sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float, every_s: float = 0.1) -> None:
    """Ask again and again; the pause is an Event nobody sets. AssertionError says what did not happen."""
    pause, end = threading.Event(), time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        pause.wait(every_s)
