"""From a part of a source to shards of examples: what a CPU worker does, or this process where there is little.

    block = tokenise(pieces, recipe, renderer, root, "digest/attempt/tokens-00007")

Streams: rows are read, divided, filtered, copied and rendered a few at a time, and nothing but the index and the counts is
kept of them. The same pieces give the same bytes, whoever does them. What is wrong with rows is collected, not raised.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from service.config import AugmentBlock, FilterBlock, Format, ReadingBlock
from service.data import augment, filters, formats
from service.data.augment import Synonyms
from service.data.files import Piece, read_piece
from service.data.records import Record
from service.data.rendered import examples_of_rows
from service.data.rows import Problem, Row, texts
from service.data.shards import Index, Shard, ShardWriter
from service.data.split import Side, Sides
from service.errors import ModelError
from service.render import Example, Renderer, TrainOn

PREPARE_VERSION = 3  # of what rows become: another one prepares all data again
KEPT = 20  # messages of a kind; the others are counted
CHUNK_ROWS = 512  # rendered at once
CHUNK_CHARACTERS = 2**22  # and no more than these, but for a single row


@dataclass(frozen=True)
class Recipe:
    """All that decides which examples the rows of a source become, but for the rows and the renderer. Pickles."""

    reading: ReadingBlock
    train_on: TrainOn
    seq_len: int
    over_long: Literal["error", "drop", "truncate"]
    sides: Sides | None = None  # None: the source is not divided
    side: Side = "train"
    filter: FilterBlock = field(default_factory=FilterBlock)
    augment: AugmentBlock = field(default_factory=AugmentBlock)
    synonyms: Synonyms = field(default_factory=dict)
    seed: int = 0  # of the copies
    score: str | None = None  # the field of data.curriculum

    def digest(self, source_sha256: str, kind: str, renderer_digest: str) -> str:
        """sha256 over all that decides, with these."""
        parts = {
            "version": PREPARE_VERSION,
            "source": [source_sha256, kind],
            "renderer": renderer_digest,
            "reading": ReadingBlock(
                **{name: getattr(self.reading, name) for name in ReadingBlock.model_fields}
            ).model_dump(),
            "train_on": self.train_on,
            "length": [self.seq_len, self.over_long],
            "side": [self.side, self.sides.digest] if self.sides else None,
            "filter": self.filter.model_dump(mode="json"),
            "augment": [self.augment.model_dump(), self.synonyms, self.seed] if self.augment.copies else None,
            "score": self.score,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Found:
    """Messages for a user: how many there were, and the first ones."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """One more."""
        self.number += 1
        if len(self.first) < KEPT:
            self.first.append(text)

    def __add__(self, other: Found) -> Found:
        return Found(self.number + other.number, [*self.first, *other.first][:KEPT])


@dataclass
class Tally:
    """What became of rows. Adds up over the blocks of a source, in their order."""

    rows: int = 0  # of this side, before filters
    split_by_turn: int = 0
    truncated: int = 0
    dropped: int = 0
    copied: int = 0
    last_row: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    problems: Found = field(default_factory=Found)  # with unreadable rows
    over_long: Found = field(default_factory=Found)
    refused: str = ""  # by the template, which would refuse others too

    def __add__(self, other: Tally) -> Tally:
        both = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        return Tally(
            **{**both, "last_row": max(self.last_row, other.last_row), "refused": self.refused or other.refused}
        )


@dataclass(frozen=True)
class Block:
    """The examples of a part of a source, and what became of its rows."""

    tally: Tally
    index: Index
    shards: list[Shard]


def tokenise(
    pieces: Sequence[Piece], shape: Format, recipe: Recipe, renderer: Renderer, root: str, prefix: str
) -> Block:
    """The examples of these pieces, written below `root` in shards whose names begin with `prefix`."""
    tally, writer = Tally(), ShardWriter(root, prefix)
    for rows in _chunks(_rows(pieces, shape, recipe, tally)):
        for row, rendered in zip(rows, examples_of_rows(rows, renderer, recipe.train_on), strict=True):
            if isinstance(rendered, list):
                _add(row, rendered, recipe, tally, writer)
            elif isinstance(rendered, ModelError):
                tally.refused = f"{_named(row)}: {rendered}"
                return Block(tally, writer.close(), writer.shards)
            else:
                tally.problems.add(f"{_named(row)}: {rendered}")
    return Block(tally, writer.close(), writer.shards)


def _rows(pieces: Iterable[Piece], shape: Format, recipe: Recipe, tally: Tally) -> Iterator[Row]:
    """The rows of this side that stay, each with its copies after it."""
    for record in (record for piece in pieces for record in read_piece(piece)):
        tally.last_row = record.number
        parsed = formats.parse(record, shape, recipe.reading) if isinstance(record, Record) else [record]
        if not isinstance(parsed, Row):
            for problem in parsed:
                tally.problems.add(f"{_named(problem)}: {problem.text}")
            continue
        if recipe.sides and recipe.sides(parsed) != recipe.side:
            continue
        tally.rows += 1
        if why := filters.reason(parsed, recipe.filter):
            tally.filtered[why] += 1
            continue
        yield parsed
        if recipe.augment.copies:
            copies = augment.copies(parsed, recipe.augment, recipe.seed, recipe.synonyms)
            tally.copied += len(copies)
            yield from copies


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(text) for _, text in texts(row.content))
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _add(row: Row, examples: Sequence[Example], recipe: Recipe, tally: Tally, writer: ShardWriter) -> None:
    """Write a row's examples, as far as its length allows."""
    score = _score(row, recipe, tally)
    longest = max(len(example.ids) for example in examples)
    kept = [(example.ids, example.mask) for example in examples]
    if longest > recipe.seq_len:
        if recipe.over_long == "truncate":
            tally.truncated += 1
            kept = [(ids[: recipe.seq_len], mask[: recipe.seq_len]) for ids, mask in kept]
        else:
            tally.over_long.add(f"{_named(row)} ({longest})")
            kept = []
    kept = [(ids, mask) for ids, mask in kept if True in mask[1:]]  # a first token has nothing to be predicted from
    if longest > recipe.seq_len and not kept:
        tally.dropped += 1
    elif not kept:
        tally.problems.add(f"{_named(row)}: no token of it is trained. Check its train and weight flags.")
    tally.split_by_turn += len(kept) > 1
    for ids, mask in kept:
        writer.add(ids, mask, row.number, score)


def _score(row: Row, recipe: Recipe, tally: Tally) -> float | None:
    if recipe.score is None:
        return None
    value: Any = row.value(recipe.score)
    with suppress(ValueError, TypeError):
        number = math.nan if isinstance(value, bool) or value is None else float(value)  # a cell of CSV is text
        if math.isfinite(number):
            return number
    shown = "missing" if value is None else f"{value!r}"[:60]
    tally.problems.add(
        f"{_named(row)}: field {recipe.score!r} is {shown}, wanted a number: data.curriculum goes by it."
    )
    return 0.0


def _named(row: Row | Problem) -> str:
    return f"row {row.number}{f' of {row.file}' if row.file else ''}"
