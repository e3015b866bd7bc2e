"""Logs that grow on object stores: a directory of segments `<writer>-<n>.jsonl`, each written once and never changed.

A writer is one process's name, unique among the live ones; readers merge. A segment appears whole or not at all, so a
row is either readable or was never flushed. Non-finite floats are stored as null, because JSON has none. What the rows
mean (metrics, events, ledger) is the business of `runs.py`.

    with LogWriter(join(run.uri, "metrics"), "a1-r0") as log:
        log.append({"step": 1, "train/loss": 3.2})
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from service import storage
from service.domain import check_name
from service.errors import ConflictError, NotFoundError, StorageError

_SEGMENT = re.compile(r"(?P<writer>.+)-(?P<number>\d{6,})\.jsonl")


class LogWriter:
    """Appends rows to one writer's segments; continues the numbering it finds. Safe among threads.

    With `flush_every_s=math.inf` appending never touches storage: some other thread flushes, however long that takes.
    """

    def __init__(self, uri: str, writer: str, flush_every_s: float = 1.0) -> None:
        self.uri = uri
        self.writer = check_name(writer, "log writer")
        self.flush_every_s = flush_every_s
        self._next = 1 + max((n for _, name, n in _segments(uri) if name == writer), default=-1)
        self._lines: list[str] = []
        self._unwritten: bytes | None = None
        self._flushed_at = -math.inf
        self._keeping = threading.Lock()  # `_lines`: never held while storage is waited for
        self._writing = threading.Lock()  # all else: held by the one thread that writes

    def append(self, row: dict[str, Any]) -> None:
        """Keeps the row, and flushes when the last flush is `flush_every_s` old; no timer stands behind it."""
        line = _encode(row)
        with self._keeping:
            self._lines.append(line)
        due = math.isfinite(self.flush_every_s) and time.monotonic() - self._flushed_at >= self.flush_every_s
        if due and self._writing.acquire(
            blocking=False
        ):  # else the row goes with who is writing now, or with the next flush
            try:
                self._write()
            finally:
                self._writing.release()

    def flush(self) -> None:
        """Every row appended so far is readable afterwards. After a StorageError no row is lost: flush again."""
        with self._writing:
            self._write()

    def close(self) -> None:
        """The same as `flush`; the writer holds nothing open."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self) -> None:
        # A segment whose write failed is repeated with the same bytes, so that it is recognised if it did arrive.
        while self._unwritten is not None or self._take():
            assert self._unwritten is not None
            self._create(self._unwritten)
            self._next += 1
            self._unwritten = None
        self._flushed_at = time.monotonic()

    def _take(self) -> bool:
        with self._keeping:
            lines, self._lines = self._lines, []
        self._unwritten = "".join(lines).encode() if lines else None
        return bool(lines)

    def _create(self, data: bytes) -> None:
        segment = storage.join(self.uri, f"{self.writer}-{self._next:06d}.jsonl")
        try:
            storage.create_exclusive(segment, data)
        except ConflictError as error:
            try:
                there = storage.read_bytes(segment)
            except NotFoundError:  # S3 says so too while an earlier try, given up here, is still under way there
                raise StorageError(f"{segment} is being written by an earlier request. Flush again.") from error
            if there != data:
                raise ConflictError(
                    f"{segment} is by another live writer named {self.writer!r}. Give each writer its own name."
                ) from error


class LogReader:
    """Reads a growing log: each call returns what is new since the last one."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._seen: set[str] = set()

    def new_rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(writer, row) of segments not read before, each writer's in order. StorageError on a row that is no JSON."""
        fresh = [segment for segment in _segments(self.uri) if segment[0] not in self._seen]
        uris = [storage.join(self.uri, name) for name, _, _ in fresh]
        rows: list[tuple[str, dict[str, Any]]] = []
        for uri, (_, writer, _), data in zip(uris, fresh, storage.read_many(uris), strict=True):
            rows.extend((writer, row) for row in _decode(uri, data))
        self._seen.update(name for name, _, _ in fresh)
        return rows


def read_rows(uri: str) -> list[tuple[str, dict[str, Any]]]:
    """All (writer, row) of a log, each writer's in order; [] when there is no log."""
    return LogReader(uri).new_rows()


def figure(value: float | None) -> float:
    """A number of a row as it was: JSON has no word for one that is not finite, and null stands for it."""
    return math.nan if value is None else value


def _segments(uri: str) -> list[tuple[str, str, int]]:
    """(name, writer, number), ordered by writer and number."""
    matches = (_SEGMENT.fullmatch(name) for name in storage.list_names(uri))
    found = ((match[0], match["writer"], int(match["number"])) for match in matches if match)
    return sorted(found, key=lambda segment: segment[1:])


def _encode(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _decode(uri: str, data: bytes) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _damaged(uri, number, line) from error
        if not isinstance(row, dict):
            raise _damaged(uri, number, line)
        yield row


def _damaged(uri: str, number: int, line: bytes) -> StorageError:
    return StorageError(
        f"{uri} line {number} is no JSON object: {line[:80]!r}. Restore the segment, or delete it to lose its rows."
    )
