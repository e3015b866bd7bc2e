"""How many rows of each source an epoch of several sources has. Which rows these are, `planner.py` draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.config import MixBlock, SourceBlock
from service.errors import DataError


def shares(num_rows: Sequence[int], sources: Sequence[SourceBlock], block: MixBlock) -> tuple[int, ...]:
    """Rows of each source in an epoch: together as many as there are, divided as `block.by` says, largest remainder.

    proportional: by rows, so that an epoch has each row once. temperature: by rows ^ (1 / temperature), arXiv:1910.10683
    section 3.5.2, which is by rows at 1 and equal shares far above. Both take no source for larger than `block.cap` rows.
    weights: by the sources' weights. That also replays what a model has learnt before: a source of it with weight 1 beside
    the new one with 9 makes a tenth of every step's rows, on average, whatever the sizes of the files. Raises DataError for
    a source without rows.
    """
    if empty := [source.uri for source, rows in zip(sources, num_rows, strict=True) if not rows]:
        raise DataError(
            f"{', '.join(empty)}: no row is left to train on. Look at its filters and split, or leave it out."
        )
    sizes = np.minimum(np.asarray(num_rows, dtype=np.float64), block.cap or np.inf)
    if block.by == "weights":
        sizes = np.asarray([source.weight for source in sources], dtype=np.float64)
    elif block.by == "temperature":
        sizes = sizes ** (1 / block.temperature)
    exact = sizes / sizes.sum() * sum(num_rows)
    whole = np.floor(exact.round(6)).astype(np.int64)  # 300 rows of 300 are not 299.99999999999994
    left = sum(num_rows) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
    return tuple(whole.tolist())
