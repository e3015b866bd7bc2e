"""What one worker says, kept with the run: `logs/rank-00000.log`, so that it outlives the worker and its node.

A plain text file in the node's cache, copied whole into the run's directory at checkpoints and at the end, because object
stores cannot append. Everything logged by any library in this process goes into it too.
"""

from __future__ import annotations

import logging
from pathlib import Path

from service import storage
from service.runs import Run

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankLog:
    """The log of one worker's attempt. `keep` copies it to the run; `close` keeps it a last time."""

    def __init__(self, run: Run, cache: Path, rank: int, attempt: int) -> None:
        self._uri = run.path("logs", f"a{attempt}-rank-{rank:05d}.log")
        self._file = cache / "runs" / run.id / f"a{attempt}-rank-{rank:05d}.log"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self._file, mode="w", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(FORMAT))
        self._logger = logging.getLogger("loray.train")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        for logger in (self._logger, logging.getLogger()):
            logger.addHandler(self._handler)

    def say(self, line: str) -> None:
        """One line."""
        self._logger.info(line)

    def failed(self) -> None:
        """The exception being handled, with its traceback."""
        self._logger.exception("failed")

    def keep(self) -> None:
        """Copy what there is into the run's directory."""
        self._handler.flush()
        storage.put_file(self._file, self._uri)

    def close(self) -> None:
        """Keep it and stop listening."""
        for logger in (self._logger, logging.getLogger()):
            logger.removeHandler(self._handler)
        self._handler.close()
        storage.put_file(self._file, self._uri)
