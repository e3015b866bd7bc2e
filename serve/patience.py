"""What a start waits for: a store, a hub or a network that is away for a moment, and nothing else.

Serve is handed a config once: a start that fails stays failed until somebody edits the file. So what may pass by itself is
tried again here, for MOST_S. Wrong input does not get better, and is told at once.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from service.errors import StorageError
from service.pauses import doubling

MOST_S = 300.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_BUSY = (408, 429, 500, 502, 503, 504)
_log = logging.getLogger(__name__)
T = TypeVar("T")


def patiently(do: Callable[[], T], what: str) -> T:
    """What `do` returns, however often it fails with what may pass until MOST_S are over. Every other error is raised at once.

    `what` is being done, for the log. Pauses double, and differ between replicas.
    """
    deadline, pauses = time.monotonic() + MOST_S, doubling(FIRST_PAUSE_S, LONGEST_PAUSE_S)
    while True:
        try:
            return do()
        except Exception as error:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not may_pass(error):
                raise
            _log.warning("%s: %s Trying again for up to %.0f s.", what, error, left_s)
        time.sleep(min(left_s, next(pauses)))


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help. The hub's errors are ModelErrors, so what stands behind an error counts too."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = list(_chain(error))
    return not any(isinstance(link, OfflineModeIsEnabled) for link in chain) and any(map(_passes, chain))


def _passes(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, as its version has it

    if isinstance(error, HTTPError):
        response = getattr(error, "response", None)  # None where the connection failed
        return response is None or response.status_code in _BUSY
    if isinstance(error, (StorageError, *_NETWORK)):
        return True
    return isinstance(error, OSError) and error.errno in _UNREACHABLE


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
