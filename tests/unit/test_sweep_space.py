"""What a trial's values are: drawn by seed and number, multiplied out, left out where they have no part."""

from __future__ import annotations

import math
import statistics

import pytest

from service.config import checked, validated
from service.errors import ConfigError
from service.sweep_config import Dimension
from tune import space as spaces

BASE = {"model": "base", "data": {"train": "rows.jsonl"}, "method": {"r": 8}}


def space(**ranges: object) -> dict[str, Dimension]:
    """Dimensions by their dotted names, with `__` for the dot."""
    found = {}
    for name, values in ranges.items():
        written = {"choose": values} if isinstance(values, list) else values
        dimension, problems = checked(Dimension, written)  # type: ignore[arg-type]
        assert dimension, problems
        found[name.replace("__", ".")] = dimension
    return found


LOG = space(
    optim__lr={"log": [1e-5, 1e-3]}, method__r=[4, 8, 16], method__alpha={"ratio_of": "method.r", "choose": [1, 2]}
)


def test_the_same_seed_and_number_give_the_same_values_and_others_give_others() -> None:
    assert spaces.draw(LOG, 1, 5) == spaces.draw(LOG, 1, 5)
    rates = {spaces.draw(LOG, seed, number)["optim.lr"] for seed in range(3) for number in range(10)}
    assert len(rates) == 30


def test_one_more_dimension_leaves_the_values_of_the_others() -> None:
    more = {**LOG, **space(optim__weight_decay={"uniform": [0, 0.1]})}
    assert spaces.draw(more, 0, 3).items() >= spaces.draw(LOG, 0, 3).items()


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    rates = [spaces.draw(LOG, 0, number)["optim.lr"] for number in range(400)]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-3
    logs = [math.log10(rate) for rate in rates]
    # Of 400 even draws over two decades the mean is off by more than 0.13 (4.5 standard errors) in under one of 10**5.
    assert statistics.mean(logs) == pytest.approx(-4.0, abs=0.13)


def test_numbers_are_whole_where_the_field_takes_no_others() -> None:
    ranges = space(method__r={"log": [4, 64]}, optim__max_steps={"integer": [3, 4]}, optim__epochs={"uniform": [1, 2]})
    draws = [spaces.draw(ranges, 0, number) for number in range(50)]
    assert {type(draw["method.r"]) for draw in draws} == {int}
    assert {draw["optim.max_steps"] for draw in draws} == {3, 4}
    assert {type(draw["optim.epochs"]) for draw in draws} == {float}


def test_the_ends_of_a_range_of_whole_numbers_come_as_often_as_what_lies_between() -> None:
    ranges = space(method__r={"uniform": [0.6, 4.4]})
    drawn = [spaces.draw(ranges, 0, number)["method.r"] for number in range(800)]
    # Of 800 even draws of four numbers one comes fewer than 140 times (4.9 standard errors) in under one of 10**5.
    assert set(drawn) == {1, 2, 3, 4} and min(map(drawn.count, set(drawn))) > 140


def test_a_ratio_is_of_the_drawn_value_or_of_the_bases() -> None:
    draw = {"optim.lr": 1e-4, "method.r": 16, "method.alpha": 2}
    assert spaces.changes(LOG, draw, BASE)["method.alpha"] == 32
    alone = space(method__alpha={"ratio_of": "method.r", "choose": [2]})
    assert spaces.changes(alone, {"method.alpha": 2}, BASE) == {"method.alpha": 16}


def test_a_field_whose_condition_does_not_hold_keeps_what_the_base_says() -> None:
    ranges = space(method__r=[4, 16], method__dropout={"uniform": [0.1, 0.2], "when": {"method.r": [16, 32]}})
    assert spaces.changes(ranges, {"method.r": 4, "method.dropout": 0.15}, BASE) == {"method.r": 4}
    assert spaces.changes(ranges, {"method.r": 16, "method.dropout": 0.15}, BASE)["method.dropout"] == 0.15


def test_a_grid_has_every_combination_once() -> None:
    ranges = space(method__r=[4, 16], method__dropout={"choose": [0.1, 0.2], "when": {"method.r": 16}})
    runs = [spaces.changes(ranges, draw, BASE) for draw in spaces.grid(ranges, BASE)]
    assert runs == [
        {"method.r": 4},
        {"method.r": 16, "method.dropout": 0.1},
        {"method.r": 16, "method.dropout": 0.2},
    ]


def test_a_multiplied_draw_comes_back_within_its_ranges() -> None:
    draw = {"optim.lr": 0.00123456, "method.r": 4, "method.alpha": 1}
    assert spaces.clipped(LOG, draw) == {**draw, "optim.lr": 1e-3}
    assert spaces.clipped(LOG, {**draw, "optim.lr": 0.000123456})["optim.lr"] == 0.0001235


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({}, "holds none; give one of log, uniform, integer or choose"),
        ({"log": [1, 2], "choose": [1]}, "holds log and choose; give one"),
        ({"uniform": [2, 1]}, r"uniform \[2, 1\] is empty"),
        ({"log": [0, 1]}, "must begin above 0"),
        ({"choose": []}, "at least 1 item"),
        ({"ratio_of": "method.r", "choose": ["a"]}, "multiplies method.r, which 'a' cannot"),
    ],
)
def test_a_range_that_holds_nothing_is_refused(written: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validated(Dimension, written, "space")
