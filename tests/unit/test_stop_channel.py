"""What the driver asks of its workers, beside what people ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.runs import Run
from service.training.stop_channel import GROW, LEAVE, StopChannel


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(str(tmp_path), "run", "model: x\n", {})


def test_a_move_is_nobodys_wish_to_stop_and_is_taken_back(run: Run) -> None:
    stop = StopChannel(run)
    stop.move(LEAVE)
    assert (run.stop_requested(), stop.wanted()) == (LEAVE, None)
    stop.forget_moves()
    assert run.stop_requested() is None


def test_a_persons_request_is_neither_overwritten_nor_forgotten(run: Run) -> None:
    stop = StopChannel(run)
    stop.move(GROW)
    run.request_stop("by a person")
    stop.move(LEAVE)
    stop.forget_moves()
    assert stop.wanted() == run.stop_requested() == "by a person"


def test_a_signal_is_remembered_at_once_delivered_once_and_stronger_than_a_move(run: Run) -> None:
    stop = StopChannel(run)
    stop.move(LEAVE)
    stop.ask("SIGTERM at the driver")
    assert (stop.wanted(), run.stop_requested()) == ("SIGTERM at the driver", LEAVE)
    stop.deliver()
    assert run.stop_requested() == "SIGTERM at the driver"
    run.clear_stop()
    stop.deliver()
    assert run.stop_requested() is None
