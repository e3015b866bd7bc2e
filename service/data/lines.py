"""Records from text: JSON lines, a list of JSON objects, CSV. Text comes in chunks of bytes; no more than a row is held.

`begin` finds where a file can be cut, `read` what stands in a part of it. A row that cannot be read is a Problem in its
place, and reading goes on with the next one. What is inside a row of JSON is in `json_rows.py`, and lists in `json_list.py`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from service.data.json_list import elements, list_marks, rows_of_list
from service.data.json_rows import decode, too_large
from service.data.records import MAX_ROW_BYTES, Mark, Piece, Record, check_columns
from service.data.rows import Problem
from service.errors import DataError

_BOM = b"\xef\xbb\xbf"
_OTHERS = {  # how files begin that are no text, and what to do with them
    b"PAR1": "is a Parquet file. Name it .parquet",
    b"ARROW1": "is an Arrow file. Name it .arrow",
    b"\x1f\x8b": "is a gzip file. Add .gz to its name",
    b"\x28\xb5\x2f\xfd": "is a zstd file. Add .zst to its name",
    b"PK\x03\x04": "is a zip or Excel file. Unpack it, or save it as CSV",
    b"\xff\xfe": "is UTF-16 or UTF-32. Save it as UTF-8",
    b"\xfe\xff": "is UTF-16. Save it as UTF-8",
}

csv.field_size_limit(MAX_ROW_BYTES)  # of the process, which has no other use of it; 128 KiB is too small for a text


def begin(chunks: Iterator[bytes], whole: Piece) -> tuple[Piece, Iterator[Mark]]:
    """The file with what its head says (kind, columns, where the rows start), and where it can be cut; no mark: no row."""
    first = next(chunks, b"")
    _check_text(first, whole.uri)
    text = chain([first], chunks)
    if whole.kind in ("csv", "tsv"):
        return _begin_csv(text, whole)
    rows = rows_of_list(first, whole) if whole.kind == "json" else None
    if rows:
        return rows, list_marks(text, rows)
    start = len(_BOM) if first.startswith(_BOM) else 0
    return replace(whole, kind="jsonl", start=start), _line_marks(text)


def read(chunks: Iterable[bytes], piece: Piece) -> Iterator[Record | Problem]:
    """The records in the text of a piece."""
    kinds = {"jsonl": _json_lines, "json": _json_elements}
    rows = kinds[piece.kind](chunks) if piece.kind in kinds else _csv_rows(chunks, piece)
    for number, row in enumerate(rows, piece.first):
        if isinstance(row, _NoRow):
            yield Problem(number, row.why, piece.file, row.line)
        elif row is not None:
            yield Record(number, row, piece.file)


class _NoRow(NamedTuple):
    """Why a row has no values, and its text, where that could be held."""

    why: str
    line: bytes = b""


Values = dict[str, Any] | _NoRow | None  # of a row; None: a blank line


def _json_lines(chunks: Iterable[bytes]) -> Iterator[Values]:
    for line in split_lines(chunks):
        yield None if isinstance(line, bytes) and (not line or line.isspace()) else _json_values(line)


def _json_elements(chunks: Iterable[bytes]) -> Iterator[Values]:
    for element, _ in elements(chunks):
        yield _json_values(element)


def _json_values(text: bytes | int) -> Values:
    """The values that a text holds; of one that is too large, its length is given."""
    if isinstance(text, int):
        return _NoRow(too_large(text))
    values = decode(text)
    return _NoRow(values, text) if isinstance(values, str) else values


def _csv_rows(chunks: Iterable[bytes], piece: Piece) -> Iterator[Values]:
    columns = piece.columns
    for row in _Csv(chunks, piece.kind).rows():
        if isinstance(row, str):
            yield _NoRow(row)
        elif len(row) != len(columns):
            why = f"has {len(row)} cells, and the heading has {len(columns)}. Quote cells that hold separators or newlines."
            yield _NoRow(why, json.dumps(row).encode())
        elif (broken := _broken_cell(row)) is not None:
            yield _NoRow(f"{columns[broken]} is no UTF-8. Save the file as UTF-8.", json.dumps(row).encode())
        else:
            yield dict(zip(columns, row, strict=True))


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | int]:
    """Lines without their end. Of one that is longer than MAX_ROW_BYTES only its length, and it is never held."""
    rest, lost = b"", 0
    for chunk in chunks:
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line if not lost and len(line) <= MAX_ROW_BYTES else lost + len(line)
            lost = 0
        if lost or len(rest) > MAX_ROW_BYTES:
            rest, lost = b"", lost + len(rest)
    if lost or rest:
        yield lost or rest


def _line_marks(chunks: Iterable[bytes]) -> Iterator[Mark]:
    """Behind the last line that ends in a chunk."""
    size = rows = 0
    last, blank = b"", True
    for last in chunks:
        blank = blank and not last.removeprefix(_BOM).strip()
        if (end := last.rfind(b"\n") + 1) and not blank:
            yield Mark(size + end, rows + last.count(b"\n"), size + end)
        rows += last.count(b"\n")
        size += len(last)
    if not blank and not last.endswith(b"\n"):
        yield Mark(size, rows + 1, size)


def _begin_csv(chunks: Iterable[bytes], whole: Piece) -> tuple[Piece, Iterator[Mark]]:
    table = _Csv(chunks, whole.kind)
    heading = next(table.rows(), [])
    if isinstance(heading, str) or _broken_cell(heading) is not None:
        raise DataError(f"{whole.uri}: the heading {heading if isinstance(heading, str) else 'is no UTF-8.'}")
    columns = (_first_name(heading[0]), *heading[1:]) if heading else ()
    check_columns(columns, whole.uri)
    return replace(whole, columns=columns, start=table.offset), _csv_marks(table)


def _first_name(cell: str) -> str:
    """The first column's name: behind a byte order mark its quotes are not read as such."""
    name = cell.removeprefix("\ufeff")
    quoted = name != cell and len(name) > 1 and name[0] == name[-1] == '"'
    return name[1:-1].replace('""', '"') if quoted else name


def _csv_marks(table: _Csv) -> Iterator[Mark]:
    for number, _ in enumerate(table.rows(), 1):
        yield Mark(table.offset, number, table.offset)


class _Csv:
    """The rows of CSV text, and how far it was read. A row has several lines where a quoted cell has."""

    def __init__(self, chunks: Iterable[bytes], kind: str) -> None:
        self.offset = 0  # bytes of the rows so far; with the last line's end, whether it is there or not
        self._row_bytes = 0
        self._lines = split_lines(chunks)
        self._reader = csv.reader(self, delimiter="\t" if kind == "tsv" else ",", strict=True)

    def rows(self) -> Iterator[list[str] | str]:
        """Cells, or why there are none. Blank lines are no rows. Bytes that are no UTF-8 stand as surrogates."""
        while True:
            self._row_bytes = 0
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except _TooLargeError:
                yield too_large(self._row_bytes)
            except csv.Error as error:
                yield f"is no valid CSV: {error}. Quote cells that hold quotes, and double those."
            else:
                if row:
                    yield row

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next line, for csv.reader."""
        line = next(self._lines)
        size = 1 + (line if isinstance(line, int) else len(line))
        self.offset += size
        self._row_bytes += size
        if isinstance(line, int) or self._row_bytes > MAX_ROW_BYTES:
            raise _TooLargeError
        return line.decode("utf-8", "surrogateescape") + "\n"


class _TooLargeError(Exception):
    """A row has more than MAX_ROW_BYTES."""


def _broken_cell(row: list[str]) -> int | None:
    """The first cell with bytes that are no UTF-8."""
    for index, cell in enumerate(row):
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return index
    return None


def _check_text(first: bytes, uri: str) -> None:
    """DataError where a file begins as no text does."""
    for magic, what in _OTHERS.items():
        if first.startswith(magic):
            raise DataError(f"{uri} {what}.")
    if b"\0" in first:
        wide = first.count(b"\0") > len(first) // 4
        what = (
            "is UTF-16 or UTF-32. Save it as UTF-8."
            if wide
            else "is a binary file, and text was wanted. Is it the right one?"
        )
        raise DataError(f"{uri}: byte {first.index(0)} is 0, so it {what}")
