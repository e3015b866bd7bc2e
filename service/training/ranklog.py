"""What one worker says, kept with the run, so that it outlives the worker and its node.

`logs/a1-rank-00000.log`, and when that is full `a1-rank-00000.part-0001.log` and so on: object stores cannot append, so
the last part is written whole again and again until it has SEGMENT_BYTES, and never after. A worker holds only what is
not final yet, however long it runs. Warnings of the libraries that log through Python's root logger go into it too.
Saying is for every thread and never waits for storage; when to keep is decided by `watch.py`.
"""

from __future__ import annotations

import logging
import re
import threading

from service import storage
from service.runs import Run

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SEGMENT_BYTES = 256 * 1024
_NAME = re.compile(r"a(?P<attempt>\d+)-rank-(?P<rank>\d+)(\.part-(?P<part>\d+))?\.log")


def log_names(run: Run) -> list[str]:
    """Names below `logs/` of all that the workers have said: by attempt, then by rank, each in order."""
    matches = (_NAME.fullmatch(name) for name in storage.list_names(run.path("logs")))
    found = [(int(m["attempt"]), int(m["rank"]), int(m["part"] or 0), m[0]) for m in matches if m]
    return [name for *_, name in sorted(found)]


class RankLog:
    """The log of one worker's attempt. `keep` writes it to the run; `close` keeps it a last time."""

    def __init__(self, run: Run, rank: int, attempt: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._uri = run.path("logs", f"a{attempt}-rank-{rank:05d}")
        self._text = _Text(segment_bytes)
        self._text.setFormatter(logging.Formatter(FORMAT))
        self._keeping = threading.Lock()
        self._part = 0  # the first that is not final in the run
        self._kept = ""
        # What a storage library says of a write at a lower level would make the next write necessary.
        self._text.addFilter(lambda record: record.name == "loray.train" or record.levelno >= logging.WARNING)
        self._logger = logging.getLogger("loray.train")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        for logger in (self._logger, logging.getLogger()):
            logger.addHandler(self._text)

    def say(self, line: str) -> None:
        """One line."""
        self._logger.info(line)

    def failed(self) -> None:
        """The exception being handled, with its traceback."""
        self._logger.exception("failed")

    def keep(self, now: str = "") -> None:
        """Write what is new into the run's directory, below it `now`: what the worker is doing, until the next keep.

        Nothing is written where nothing has changed. After a StorageError nothing is lost: keep again.
        """
        with self._keeping:
            full, last = self._text.segments()
            for text in full:
                self._write(text)
                self._text.drop_first()
                self._part, self._kept = self._part + 1, ""
            if last + now != self._kept:
                self._write(last + now)
                self._kept = last + now

    def close(self) -> None:
        """Keep it and stop listening."""
        for logger in (self._logger, logging.getLogger()):
            logger.removeHandler(self._text)
        self.keep()

    def _write(self, text: str) -> None:
        part = f".part-{self._part:04d}" if self._part else ""
        storage.write_bytes(f"{self._uri}{part}.log", text.encode(errors="backslashreplace"))


class _Text(logging.Handler):
    """Lines in memory, cut into segments. Its lock is never held while storage is written."""

    def __init__(self, segment_bytes: int) -> None:
        super().__init__()
        self._segment_bytes = segment_bytes
        self._guard = threading.RLock()  # a signal handler may say something while this very thread says something
        self._full: list[str] = []
        self._lines: list[str] = []
        self._size = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging` for every record."""
        try:
            line = self.format(record) + "\n"
        except Exception:  # a library's own mistake in its arguments: treated as all handlers of `logging` treat it
            self.handleError(record)
            return
        with self._guard:
            self._lines.append(line)
            self._size += len(line)
            if self._size >= self._segment_bytes:
                self._full.append("".join(self._lines))
                self._lines, self._size = [], 0

    def segments(self) -> tuple[list[str], str]:
        """The full segments that were not dropped, and the one being written."""
        with self._guard:
            return list(self._full), "".join(self._lines)

    def drop_first(self) -> None:
        """Forget the first full segment."""
        with self._guard:
            del self._full[0]
