"""Which side of a split a row is on: to train, to evaluate, or to test once at the end.

    sides = Sides.of(SplitBlock(eval=0.1), rows)
    sides(row)  # "train" | "eval" | "test"

A row's key is a hash of what it holds, or of its `group`. Without `stratify` and folds the side follows from the key
alone, so a row never changes sides, whatever comes or goes around it. With them it follows from where the key stands among
all keys, which one pass over the rows finds out; their order never matters. Rows of one key, duplicates and groups, are
always on one side. Nothing is drawn: the same rows have the same sides on every machine.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.config import SplitBlock
from service.data.rows import Row, fingerprint
from service.errors import DataError

Side = Literal["train", "eval", "test"]

_ALL = ""  # the class of every row where nothing is stratified
_END = 2**64  # past every key
_SHOWN = 20


@dataclass(frozen=True)
class _Cuts:
    """The keys of one class by side: below `test` to test, from `eval` to below `eval_end` to evaluate, others to train."""

    test: int
    eval: int
    eval_end: int


@dataclass(frozen=True)
class Sides:
    """The decision for every row. Pickles, and is small: a few numbers for each class."""

    group: str | None
    stratify: str | None
    cuts: Mapping[str, _Cuts]

    @classmethod
    def of(cls, block: SplitBlock, rows: Callable[[], Iterator[Row]], fold: tuple[int, int] | None = None) -> Sides:
        """The sides of `rows()`, all rows of all sources. `fold` (from 1, of k): that one of k is what evaluates.

        Shares are of different keys: of a class within one, and of all rows with `stratify` within one too; folds are
        equal within one. One pass where there is `group`, `stratify` or a fold, in some 40 bytes a row. Raises DataError that names the rows without the field, or where there are fewer keys than folds.
        """
        test, held_out = round(block.test * _END), round((block.test + block.eval) * _END)
        by_hash = _Cuts(test, test, held_out)
        if not (block.group or block.stratify or fold):
            return cls(None, None, {_ALL: by_hash})
        classes = _keys_by_class(rows(), block)
        if block.stratify:
            cuts = dict(zip(classes, _ranked(classes.values(), block, fold), strict=True))
        elif fold:
            cuts = {_ALL: _fold(classes[_ALL][classes[_ALL] >= test], test, fold, 0)}
        else:
            cuts = {_ALL: by_hash}
        if fold and sum(map(len, classes.values())) < fold[1]:
            raise _too_few(classes, block, fold[1])
        return cls(block.group, block.stratify, cuts)

    def __call__(self, row: Row) -> Side:
        """The side of a row, one of those that `of` has seen."""
        key = _key(row, self.group)
        cuts = self.cuts[_class(row, self.stratify)]
        if key < cuts.test:
            return "test"
        return "eval" if cuts.eval <= key < cuts.eval_end else "train"

    @property
    def digest(self) -> str:
        """sha256 over all that decides a side, but for the row itself."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


Keys = npt.NDArray[np.uint64]


def _key(row: Row, group: str | None) -> int:
    if group is None:
        return int.from_bytes(fingerprint(row.content))
    return int.from_bytes(hashlib.blake2b(_class(row, group).encode(), digest_size=8).digest())


def _class(row: Row, field: str | None) -> str:
    return _ALL if field is None else json.dumps(row.value(field), sort_keys=True, default=str)


def _keys_by_class(rows: Iterable[Row], block: SplitBlock) -> dict[str, Keys]:
    """The different keys of every class, ascending; classes by name. Raises DataError where a row lacks its field."""
    needed = block.group or block.stratify
    keys, classes, names = array("Q"), array("Q"), dict[str, int]()
    missing, num_missing = list[str](), 0
    for row in rows:
        if needed and row.value(needed) in (None, ""):  # an empty cell of CSV
            num_missing += 1
            missing += [f"{row.file} {row.number}".strip()] if num_missing <= _SHOWN else []
        keys.append(_key(row, block.group))
        classes.append(names.setdefault(_class(row, block.stratify), len(names)))
    if num_missing:
        key = "group" if block.group else "stratify"
        more = f" and {num_missing - _SHOWN:,} more" if num_missing > _SHOWN else ""
        raise DataError(
            f"data.split.{key} is {needed}, and {num_missing:,} row(s) have no such field: {', '.join(missing)}{more}. "
            f"Add it to them, name another field, or leave data.split.{key} out."
        )
    every, of_class = np.frombuffer(keys, np.uint64), np.frombuffer(classes, np.uint64)
    order = np.lexsort((every, of_class))
    parts = np.split(every[order], np.cumsum(np.bincount(of_class.astype(np.int64), minlength=len(names)))[:-1])
    return {name: np.unique(parts[names[name]]) for name in sorted(names)}


def _ranked(classes: Iterable[Keys], block: SplitBlock, fold: tuple[int, int] | None) -> Iterator[_Cuts]:
    """The cuts of class after class. What is rounded off in one is made up for in the next, so that the whole is right too."""
    seen = dealt = 0
    for keys in classes:
        num_test = _share(block.test, seen, len(keys))
        test = _at(keys, num_test)
        if fold:
            yield _fold(keys[num_test:], test, fold, dealt)
            dealt += len(keys) - num_test
        else:
            num_eval = min(_share(block.eval, seen, len(keys)), len(keys) - num_test)
            yield _Cuts(test, test, _at(keys, num_test + num_eval))
        seen += len(keys)


def _share(share: float, seen: int, more: int) -> int:
    """So many of `more` keys that of all seen until then it is the share, rounded: within one of `more * share`."""
    return round((seen + more) * share) - round(seen * share)


def _fold(keys: Keys, test: int, fold: tuple[int, int], dealt: int) -> _Cuts:
    """One fold of these keys. The keys left over go to one fold each, on from where `dealt` keys before had come to."""
    number, of = fold
    each, over = divmod(len(keys), of)
    with_one_more = {(dealt + i) % of for i in range(over)}
    sizes = [each + (i in with_one_more) for i in range(number)]
    end = sum(sizes)
    return _Cuts(test, _at(keys, end - sizes[-1]), _at(keys, end))


def _at(keys: Keys, rank: int) -> int:
    return int(keys[rank]) if rank < len(keys) else _END


def _too_few(classes: Mapping[str, Keys], block: SplitBlock, folds: int) -> DataError:
    what = f"values of {block.group}" if block.group else "different rows"
    return DataError(
        f"run.folds is {folds}, and there are only {sum(map(len, classes.values()))} {what}: a fold would be empty. "
        "Lower run.folds."
    )
