"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import random
from collections.abc import Iterator


def doubling(first_s: float, longest_s: float) -> Iterator[float]:
    """Seconds, without end: doubled up to `longest_s`, each shortened by up to half, so that many who wait do not come at once."""
    pause_s = first_s
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, longest_s)
