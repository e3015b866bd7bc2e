"""Records from text: lines of JSON, a list of JSON objects, CSV. Bytes come in chunks; no more than a row is held.

Each kind is known by two functions: where its text can be cut, and what stands in a part of it. A row that cannot be read
is a Problem in its place, and reading goes on with the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from service.data.records import MAX_COLUMNS, MAX_DEPTH, MAX_ROW_BYTES, Mark, Piece, Record
from service.data.rows import Problem

_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


def marks(chunks: Iterable[bytes], whole: Piece) -> Iterator[Mark]:
    """Where the text of a file can be cut: behind some of its rows, and behind the last. None: it holds no row."""
    yield from _line_marks(chunks)


def read(chunks: Iterable[bytes], piece: Piece) -> Iterator[Record | Problem]:
    """The records in the text of a piece."""
    for number, line in enumerate(_lines(chunks), piece.first):
        if isinstance(line, int):
            yield Problem(number, _too_large(line), piece.file)
            continue
        text = line.removeprefix(_BOM) if piece.start == 0 and number == piece.first else line
        if not text or text.isspace():
            continue
        row = _decoded(text)
        yield Problem(number, row, piece.file) if isinstance(row, str) else Record(number, row, piece.file)


def _line_marks(chunks: Iterable[bytes]) -> Iterator[Mark]:
    """Behind the last line that ends in a chunk."""
    size = rows = 0
    last, blank = b"", True
    for chunk in chunks:
        blank = blank and not chunk.removeprefix(_BOM).strip()
        if (end := chunk.rfind(b"\n") + 1) and not blank:
            yield Mark(size + end, rows + chunk.count(b"\n"), size + end)
        rows += chunk.count(b"\n")
        size += len(chunk)
        last = chunk
    if not blank and not last.endswith(b"\n"):
        yield Mark(size, rows + 1, size)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | int]:
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


def _decoded(line: bytes) -> dict[str, Any] | str:
    """The object that stands in a row, or why there is none."""
    try:
        row = _JSON.decode(line.decode())
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the row is no UTF-8 ({error.reason}). Save the file as UTF-8."
    except RecursionError:
        return _too_deep()
    except ValueError as error:
        return f"no valid JSON: {error}. One JSON object a line."
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, wanted an object: its columns and their values."
    if len(row) > MAX_COLUMNS:
        return f"has {len(row)} columns, and a row has at most {MAX_COLUMNS}. Put long lists into one column."
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(row):
        return _too_deep()
    if b"\\u" in line and (field := _lone_surrogate(row)):
        return f"{field} has a lone surrogate, which is no text. Re-encode the row."
    return row


def _too_large(num_bytes: int) -> str:
    return f"has {num_bytes:,} bytes, and a row has at most {MAX_ROW_BYTES:,}. Is every row on a line of its own?"


def _too_deep() -> str:
    return f"has lists or objects more than {MAX_DEPTH} deep inside each other. Flatten the row."


def _is_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [value for value in level if isinstance(value, dict | list)]
    return bool(level)


def _lone_surrogate(row: dict[str, Any]) -> str | None:
    """The column in which there is one, in a key or in a value."""
    return next((key for key in row if _LONE_SURROGATE.search(json.dumps([key, row[key]], ensure_ascii=False))), None)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {json.dumps(twice)} stands twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is larger than any float")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
