"""What comes out of a file before it has a meaning: records, and the parts of a file that can be read alone.

Values and limits only. `lines.py` reads them from text, `tables.py` from Parquet and Arrow, `hub.py` from a hub;
`files.py` finds the files, `formats.py` says what a record means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.errors import DataError

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "hub"]
Compression = Literal["", "gzip", "zstd"]

MAX_ROW_BYTES = 16 * 2**20  # of one row as it is written: 4 million tokens of text
MAX_COLUMNS = 10_000  # of one row
MAX_DEPTH = 64  # of lists and objects inside each other
PIECE_BYTES = 8 * 2**20  # a piece ends with the first row after so many: to tokenise it takes a worker some ten seconds


@dataclass(frozen=True)
class Record:
    """One row as it is written: its number in its source, from 1, and its columns."""

    number: int
    values: dict[str, Any]
    file: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read alone, on any machine that reaches `uri`.

    `start` to `end` are bytes, of a compressed file those that come out of it; of a table, row groups or batches.
    """

    uri: str
    kind: Kind
    file_bytes: int  # when it was opened: a file that has another size by now is another file
    file: str = ""  # its name in a directory
    compression: Compression = ""
    columns: tuple[str, ...] = ()  # the heading of a CSV file
    first: int = 1  # number of its first row
    start: int = 0
    end: int = 0
    stamp: str = ""  # when it was opened (`storage.stamp`): one of another is another file, of the same size too


@dataclass(frozen=True)
class Mark:
    """A place where a file can be cut: how far it is from the beginning, in the units of Piece, in rows and in bytes."""

    position: int
    rows: int
    num_bytes: int


def cut(whole: Piece, marks: Iterable[Mark]) -> tuple[list[Piece], int, int]:
    """Pieces of at least PIECE_BYTES, and the rows and bytes of all. What is compressed stays whole: it cannot be sought."""
    pieces: list[Piece] = []
    begin = end = Mark(whole.start, 0, 0)
    for end in marks:
        if end.num_bytes - begin.num_bytes >= PIECE_BYTES and not whole.compression:
            pieces.append(_between(whole, begin, end))
            begin = end
    if end.rows > begin.rows:
        pieces.append(_between(whole, begin, end))
    return pieces, end.rows, end.num_bytes


def check_columns(columns: Sequence[str], uri: str) -> None:
    """DataError where a table has too many columns, or two of one name."""
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{uri} has {len(columns):,} columns, and a table has at most {MAX_COLUMNS:,}. Is it transposed?"
        )
    twice = sorted({name for name, times in Counter(columns).items() if times > 1})
    if twice:
        raise DataError(f"{uri} has more than one column of the name(s) {twice[:8]}. Rename or remove them.")


def _between(whole: Piece, begin: Mark, end: Mark) -> Piece:
    return replace(whole, first=whole.first + begin.rows, start=begin.position, end=end.position)
