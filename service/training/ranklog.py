"""What one worker says, kept with the run: `logs/a1-rank-00000.log`, so that it outlives the worker and its node.

Held in memory and written whole into the run's directory at checkpoints and at the end, because object stores cannot
append. Warnings of the libraries that log through Python's root logger go into it too.
"""

from __future__ import annotations

import io
import logging

from service import storage
from service.runs import Run

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankLog:
    """The log of one worker's attempt. `keep` writes it to the run; `close` keeps it a last time."""

    def __init__(self, run: Run, rank: int, attempt: int) -> None:
        self._uri = run.path("logs", f"a{attempt}-rank-{rank:05d}.log")
        self._text = io.StringIO()
        self._handler = logging.StreamHandler(self._text)
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
        """Write what there is into the run's directory."""
        storage.write_bytes(self._uri, self._text.getvalue().encode())

    def close(self) -> None:
        """Keep it and stop listening."""
        for logger in (self._logger, logging.getLogger()):
            logger.removeHandler(self._handler)
        self.keep()
