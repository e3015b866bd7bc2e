"""SIGTERM and Ctrl-C at a driver: they ask for a stop in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heard(ask: Callable[[str], None], asked: Callable[[], bool]) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT call `ask` with who asks; a SIGINT after one that was `asked` is a KeyboardInterrupt.

    Only the main thread may listen to signals; in another, as where a sweep trains, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked():
            raise KeyboardInterrupt
        ask(f"{signal.Signals(number).name} at the driver")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
