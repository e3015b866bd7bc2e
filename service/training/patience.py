"""Storage that is away for a while: the same thing is asked for again until it works or patience is over.

Which storage is waited for is decided here, for reads and for writes: S3 only, which has outages that pass. A directory is
never away: what fails there is damage, a full disk or a wrong path, and is told at once.
Only for threads that may wait. Says once that storage is away, and once that it is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from service import storage
from service.errors import StorageError
from service.pauses import doubling

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0

T = TypeVar("T")


class Patience:
    """For what is read or written at `places`: URIs, paths, names of models. It is waited for where one of them is on S3.

    `what` is being done, for messages. `event(kind, text)` hears `storage_away` and `storage_back`.
    """

    def __init__(self, places: Sequence[str], retry_s: float, what: str, event: Callable[[str, str], None]) -> None:
        self._retry_s = 0.0 if all(map(storage.is_local, places)) else retry_s
        self._what, self._event = what, event

    def insist(self, do: Callable[[], T]) -> T:
        """What `do` returns, however often it fails with StorageError until `retry_s` have passed since the first failure.

        Then the StorageError; on directories the first one. Every other error is raised at once. Pauses double, and differ between workers.
        """
        try:
            return do()
        except StorageError as error:
            if not self._retry_s:
                raise
            first, failure = time.monotonic(), error
        self._event("storage_away", f"{self._what}: {failure} Trying again for up to {self._retry_s:g} s.")
        pauses = doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while (left_s := first + self._retry_s - time.monotonic()) > 0:
            time.sleep(min(left_s, next(pauses)))
            try:
                result = do()
            except StorageError as error:
                failure = error
            else:
                self._event("storage_back", f"{self._what}: after {time.monotonic() - first:.1f} s")
                return result
        raise StorageError(
            f"{self._what}: storage was away for {time.monotonic() - first:.0f} s, checkpoint.retry_s allows "
            f"{self._retry_s:g}: {failure}"
        ) from failure
