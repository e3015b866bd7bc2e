"""Early stopping, as a function of the evaluations alone."""

from __future__ import annotations

import math

import pytest

from service.config import StopBlock
from service.training.stopping import Progress


def _steps_taken(losses: list[float], stop: StopBlock) -> tuple[int, Progress]:
    progress = Progress()
    for step, loss in enumerate(losses, start=1):
        progress = progress.after(step, {"eval/loss": loss}, stop)
        if progress.exhausted(stop):
            return step, progress
    return len(losses), progress


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stopped_after", "best_step"),
    [
        ([3.0, 2.0, 2.1, 2.2, 1.0], 2, 0.0, 4, 2),
        ([3.0, 2.0, 2.1, 1.9, 2.0], 2, 0.0, 5, 4),
        ([3.0, 2.99, 2.98, 2.97], 2, 0.1, 3, 3),  # the best, but not lower by min_delta
        ([1.0, 2.0, 3.0, 4.0], 0, 0.0, 4, 1),  # off
        ([1.0, 1.0, 1.0], 2, 0.0, 3, 1),  # equal is not better
        ([math.nan, 2.0, 1.5, 1.0], 3, 0.0, 4, 4),  # what is no number is no best
        ([2.0, math.inf, math.nan], 2, 0.0, 3, 1),
    ],
)
def test_a_run_stops_after_patience_evaluations_without_a_better_one(
    losses: list[float], patience: int, min_delta: float, stopped_after: int, best_step: int
) -> None:
    step, progress = _steps_taken(losses, StopBlock(patience=patience, min_delta=min_delta))
    assert (step, progress.best_step) == (stopped_after, best_step)


def test_a_step_without_an_evaluation_changes_nothing() -> None:
    progress = Progress(1.0, 4, 1.1, 1)
    assert progress.after(5, {"train/loss": 0.1}, StopBlock(patience=2)) is progress


def test_what_a_checkpoint_holds_gives_the_same_progress_again() -> None:
    progress = Progress(1.0, 4, 1.1, 1)
    assert Progress.from_json({**progress.as_json(), "loss_scale": 2.0}) == progress
    assert Progress.from_json(Progress().as_json()) == Progress()
