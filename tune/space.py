"""Which values a trial has: drawn by number, or the next of a grid. Pure: the same seed and number give the same values.

A *draw* has a value for every dimension, a *change* is what becomes of it in the run file: ratios are multiplied out, and
what has no part in this trial is left out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from service.config_blocks import RunConfig
from service.config_problems import annotations_of
from service.config_values import value_at
from service.sweep_config import Dimension

Space = Mapping[str, Dimension]
Draw = dict[str, Any]
DIGITS = 4  # of a drawn number: more would only be noise to read


def draw(space: Space, seed: int, number: int) -> Draw:
    """The values of trial `number`. Another dimension more or less leaves those of the others."""
    return {key: _value(key, dimension, random.Random(f"{seed}:{number}:{key}")) for key, dimension in space.items()}


def grid(space: Space, base: Mapping[str, Any]) -> list[Draw]:
    """Every combination of listed values, the last dimension fastest; those that come to the same run only once."""
    values = [_listed(dimension) for dimension in space.values()]
    found: dict[str, Draw] = {}
    for combination in itertools.product(*values):
        one = dict(zip(space, combination, strict=True))
        found.setdefault(repr(changes(space, one, base)), one)
    return list(found.values())


def num_combinations(space: Space) -> int:
    """Of listed values: as many as `grid` has, or more."""
    return math.prod(len(_listed(dimension)) for dimension in space.values())


def changes(space: Space, one: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What a draw sets in the run file `base`, by dotted name."""
    found: dict[str, Any] = {}
    for key, dimension in space.items():
        if not _takes_part(dimension, found, base):
            continue
        value = one[key]
        if dimension.ratio_of:
            value = value * found.get(dimension.ratio_of, value_at(base, dimension.ratio_of))
            value = round(value) if takes_integers_only(key) else value
        found[key] = value
    return found


def clipped(space: Space, one: Mapping[str, Any]) -> Draw:
    """A draw whose numbers were multiplied, back within its ranges and as whole and as short as drawn ones."""
    return {key: _within(key, space[key], value) for key, value in one.items()}


def corners(space: Space) -> Iterator[Draw]:
    """Draws that together hold every listed value and both ends of every range: if these are valid, so is each dimension."""
    extremes = {key: list(dimension.ends or dimension.choose or ()) for key, dimension in space.items()}
    first = {key: values[0] for key, values in extremes.items()}
    for key, values in extremes.items():
        meeting = first | _meeting(space, key)
        yield from (meeting | {key: _whole(key, value, space[key])} for value in values)


def _meeting(space: Space, key: str) -> Draw:
    """Values of other dimensions with which this one takes part, as far as they are drawn as they are written."""
    found: Draw = {}
    for other, wanted in space[key].when.items():
        if (drawn := space.get(other)) and not drawn.ratio_of:
            possible = [want for want in (wanted if isinstance(wanted, list) else [wanted]) if may_be(drawn, want)]
            found |= _meeting(space, other) | ({other: possible[0]} if possible else {})
    return found


def may_be(dimension: Dimension, value: Any) -> bool:
    """Whether a value is one of those that are drawn."""
    low, high = dimension.ends or (1, 0)
    return value in (dimension.choose or ()) or (isinstance(value, int | float) and low <= value <= high)


def takes_numbers(key: str) -> bool:
    """Whether a field of a run takes numbers."""
    return bool({int, float} & _number_types(key))


def takes_integers_only(key: str) -> bool:
    """Whether a number in this field must be whole."""
    return _number_types(key) == {int}


def _takes_part(dimension: Dimension, found: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    for other, wanted in dimension.when.items():
        value = found.get(other, value_at(base, other))
        if value not in wanted if isinstance(wanted, list) else value != wanted:
            return False
    return True


def _value(key: str, dimension: Dimension, rng: random.Random) -> Any:
    if dimension.choose is not None:
        return rng.choice(dimension.choose)
    if dimension.integer:
        return rng.randint(*dimension.integer)
    if dimension.log:
        low, high = map(math.log, dimension.log)
        return _whole(key, _rounded(math.exp(rng.uniform(low, high)), dimension.log), dimension)
    assert dimension.uniform, "a dimension has one of four ranges"
    low, high = dimension.uniform
    if takes_integers_only(key) and not dimension.ratio_of:  # the ends as often as what is between
        return rng.randint(math.ceil(low), math.floor(high))
    return _whole(key, _rounded(rng.uniform(low, high), dimension.uniform), dimension)


def _within(key: str, dimension: Dimension, value: Any) -> Any:
    return _whole(key, _rounded(value, dimension.ends), dimension) if dimension.ends else value


def _rounded(value: float, ends: tuple[float, float]) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), ends[0]), ends[1])


def _whole(key: str, value: Any, dimension: Dimension) -> Any:
    """A whole number where the field takes no other; a ratio is made whole when it has been multiplied."""
    whole = takes_integers_only(key) and dimension.ends and not dimension.ratio_of
    return round(value) if whole else value


def _listed(dimension: Dimension) -> Sequence[Any]:
    if dimension.integer:
        return range(dimension.integer[0], dimension.integer[1] + 1)
    return dimension.choose or ()


def _number_types(key: str) -> set[type]:
    return {kind for annotation in annotations_of(RunConfig, key) for kind in _types_in(annotation)}


def _types_in(annotation: Any) -> Iterator[type]:
    if annotation in (int, float):
        yield annotation
    for part in get_args(annotation):
        if isinstance(part, type) or get_args(part):
            yield from _types_in(part)
