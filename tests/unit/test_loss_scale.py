"""fp16's search for its loss scale."""

from __future__ import annotations

from service.training.strategy import LossScale


def test_the_scale_is_halved_at_every_overflow_and_the_step_is_thrown_away() -> None:
    scale = LossScale()
    assert [scale.accept(False), scale.accept(False)] == [False, False]
    assert scale.value == LossScale.FIRST / 4


def test_the_scale_is_doubled_after_enough_good_steps_in_a_row() -> None:
    scale = LossScale()
    for _ in range(LossScale.GROW_EVERY - 1):
        assert scale.accept(True)
    assert scale.value == LossScale.FIRST
    scale.accept(True)
    assert scale.value == 2 * LossScale.FIRST


def test_a_gradient_that_is_not_finite_at_the_smallest_scale_is_not_hidden() -> None:
    scale = LossScale()
    scale.value = 1.0
    assert scale.accept(False)  # the caller sees the norm, and stops
