"""Signals at a driver: the first asks, a second Ctrl-C gives up, and afterwards they mean what they meant before."""

from __future__ import annotations

import os
import signal
import threading
from itertools import islice

import pytest

from service.pauses import doubling
from service.stop_signals import heard


def test_the_first_signal_asks_and_a_second_ctrl_c_gives_up() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    asked: list[str] = []
    with pytest.raises(KeyboardInterrupt), heard(asked.append, lambda: bool(asked)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as an operator may: no reason to give up
        assert asked == ["SIGTERM at the driver"] * 2
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_first_ctrl_c_asks() -> None:
    asked: list[str] = []
    with heard(asked.append, lambda: bool(asked)):
        os.kill(os.getpid(), signal.SIGINT)
    assert asked == ["SIGINT at the driver"]


def test_another_thread_does_not_listen() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[object] = []

    def listen() -> None:
        with heard(inside.append, lambda: False):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert inside == [before]


def test_pauses_double_up_to_the_longest_and_differ() -> None:
    pauses = list(islice(doubling(1.0, 10.0), 200))
    for pause, whole in zip(pauses, [1.0, 2.0, 4.0, 8.0] + [10.0] * 196, strict=True):
        assert whole / 2 <= pause <= whole
    assert len(set(pauses)) == 200
