"""How an epoch is divided between sources: each rule against its formula, and always as many rows as there are."""

from __future__ import annotations

import random

import pytest

from service.config import MixBlock, SourceBlock
from service.data.mixing import shares
from service.errors import DataError

SIZES = [10_000, 1_000, 100, 7]
SOURCES = [SourceBlock(uri=f"{name}.jsonl", weight=weight) for name, weight in zip("abcd", (9, 1, 2, 8), strict=True)]


def _close(found: tuple[int, ...], weights: list[float]) -> bool:
    exact = [weight / sum(weights) * sum(SIZES) for weight in weights]
    return sum(found) == sum(SIZES) and all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))


def test_in_proportion_every_row_comes_once() -> None:
    assert shares(SIZES, SOURCES, MixBlock()) == tuple(SIZES)
    draw = random.Random(3)
    for _ in range(200):
        sizes = [draw.randint(1, 10**9) for _ in range(draw.randint(1, 8))]
        assert shares(sizes, [SOURCES[0]] * len(sizes), MixBlock()) == tuple(sizes)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7, 1e6])
def test_temperature_divides_by_the_root_of_the_sizes(temperature: float) -> None:
    block = MixBlock(by="temperature", temperature=temperature)
    assert _close(shares(SIZES, SOURCES, block), [size ** (1 / temperature) for size in SIZES])


@pytest.mark.parametrize("by", ["proportional", "temperature"])
def test_a_cap_counts_no_source_as_larger(by: str) -> None:
    block = MixBlock.model_validate({"by": by, "cap": 1000, "temperature": 2.0 if by == "temperature" else 1.0})
    assert _close(shares(SIZES, SOURCES, block), [min(size, 1000) ** (1 / block.temperature) for size in SIZES])


def test_weights_divide_whatever_the_sizes() -> None:
    assert _close(shares(SIZES, SOURCES, MixBlock(by="weights")), [9, 1, 2, 8])
    assert shares([900, 2_000], SOURCES[:2], MixBlock(by="weights")) == (2610, 290)  # a tenth is replayed


def test_remainders_go_to_the_largest() -> None:
    equal = [source.model_copy(update={"weight": 1.0}) for source in SOURCES[:3]]
    assert shares([5, 5, 1], equal, MixBlock(by="weights")) == (4, 4, 3)


def test_a_source_without_rows_is_named() -> None:
    with pytest.raises(DataError, match=r"c\.jsonl: no row is left to train on"):
        shares([5, 5, 0], SOURCES[:3], MixBlock())
