"""What a report warns of."""

from __future__ import annotations

import pytest

from service.training.report import got_worse


@pytest.mark.parametrize(
    "losses", [[2.8], [2.8, 2.9, 3.1], [0.02, 0.05], [3.0] * 10 + [1.0] * 10, [1.0, 9.0, 9.0, 1.1], []]
)
def test_losses_that_end_about_where_they_began_or_below_are_no_warning(losses: list[float]) -> None:
    assert got_worse(losses) is None


def test_a_loss_that_ends_clearly_above_its_beginning_is_one() -> None:
    said = got_worse([2.8, *[10.8] * 5])
    assert said is not None and "rose from 2.8 to 10.8 nats" in said and "optim.lr" in said
    assert got_worse([1.0] * 10 + [1.0] * 9 + [9.0] * 2) is not None
