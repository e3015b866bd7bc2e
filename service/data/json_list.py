"""A JSON document that is one list of objects, or an object that holds one, cut into the texts of its elements.

Streamed: of the document only an element is ever held, so it may be larger than memory. A chunk may end anywhere, and a
part of the list reads like all of it. Whether an element is JSON, `json_rows.py` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

from service.data.json_rows import decode
from service.data.records import MAX_ROW_BYTES, Mark, Piece
from service.errors import DataError

_BOM = b"\xef\xbb\xbf"
_MAX_TAIL_CHUNKS = 4  # of what follows the list in its object
_BEHIND = b"behind"
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')


def rows_of_list(first: bytes, whole: Piece) -> Piece | None:
    """The document, from the first byte inside its list. None where it is JSON lines in spite of its name."""
    text = first.removeprefix(_BOM)
    line, _, others = text.strip().partition(b"\n")
    if not line:
        return None  # and no row either
    if line.startswith(b"{") and isinstance(decode(line), dict) and (others or _list_start(line) is None):
        return None
    start = _list_start(text)
    if start is None:
        raise DataError(
            f"{whole.uri}: no list of rows begins in its first {len(first):,} bytes. A .json file is a list of objects, "
            "or an object with one list; one object a line is a .jsonl file."
        )
    return replace(whole, start=len(first) - len(text) + start)


def list_marks(chunks: Iterable[bytes], rows: Piece) -> Iterator[Mark]:
    """Behind each element. Raises DataError at the end where the list is not closed, or not the only one."""
    text = iter(chunks)
    head = next(text)
    parts = _parts(chain([head[rows.start :]], text))
    number = 0
    for number, (_, size) in enumerate(_elements(parts), 1):
        yield Mark(rows.start + size, number, size)
    _check_frame(head[: rows.start].removeprefix(_BOM), _tail(parts), rows.uri)


def elements(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | int, int]]:
    """The text of each element, or its length where that is over MAX_ROW_BYTES, and how far the chunks were read by then."""
    return _elements(_parts(chunks))


def _elements(parts: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes | int, int]]:
    text, lost, size = b"", 0, 0
    for part, end in parts:
        size += len(part) + len(end)
        text += part
        if lost or len(text) > MAX_ROW_BYTES:
            text, lost = b"", lost + len(text)
        if end:
            if lost or text.strip() or end == b",":  # nothing stands in an empty list, or behind a last comma
                yield lost or text, size
            text, lost = b"", 0
        if end == b"]":
            return
    if lost or text.strip():
        yield lost or text, size


def _parts(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The text between commas and chunk ends, and what ended it: a comma, the list's bracket, or nothing, the chunk's end.

    What stands behind the list is said to end BEHIND.
    """
    depth, inside, escaped = 0, False, False
    for chunk in chunks:
        start, at = 0, int(escaped)
        escaped = False
        while depth >= 0 and (found := (_INSIDE if inside else _OUTSIDE).search(chunk, at)):
            sign, at = found[0], found.end()
            if sign == b"\\":
                at += 1
                escaped = at > len(chunk)
            elif sign == b'"':
                inside = not inside
            elif sign != b",":
                depth += 1 if sign in b"[{" else -1
            if (sign == b"," and depth == 0) or depth < 0:
                yield chunk[start : at - 1], b"," if depth == 0 else b"]"
                start = at
        yield chunk[start:], b"" if depth >= 0 else _BEHIND


def _list_start(text: bytes) -> int | None:
    """Where the first list of the document begins that is all of it, or a value of its object."""
    depth, inside, at = 0, False, 0
    while found := (_INSIDE if inside else _OUTSIDE).search(text, at):
        sign, at = found[0], found.end()
        if sign == b"\\":
            at += 1
        elif sign == b'"':
            inside = not inside
        elif sign == b"[" and depth <= 1:
            return at
        elif sign != b",":
            depth += 1 if sign in b"[{" else -1
    return None


def _tail(parts: Iterator[tuple[bytes, bytes]]) -> bytes | None:
    """What stands behind the list, as far as it is looked at; None where the list is not closed."""
    behind = [part for part, end in islice(parts, _MAX_TAIL_CHUNKS) if end == _BEHIND]
    return b"".join(behind) if behind else None


def _check_frame(head: bytes, tail: bytes | None, uri: str) -> None:
    """What stands around the list is JSON, and holds no second one."""
    if tail is None:
        raise DataError(f"{uri}: the list of rows is not closed: the file ends before its bracket. Copy it again.")
    try:
        frame = json.loads(head + b"]" + tail)
    except (ValueError, RecursionError):
        raise DataError(
            f"{uri}: the list of rows is followed by {tail[:60].decode(errors='replace')!r}, which is not how JSON goes on. "
            "One object a line is a .jsonl file."
        ) from None
    lists = [key for key, value in frame.items() if isinstance(value, list)] if isinstance(frame, dict) else []
    if len(lists) > 1:
        raise DataError(f"{uri}: the object holds {len(lists)} lists, {lists[:8]}, and one is wanted: the rows.")
