"""Keys and values of prompts seen before, kept in blocks of tokens, so that what many prompts begin with is computed once.

A block is known by the adapter's digest and all tokens from the first to its own last one, by a SHA-256 chain: never by
anything a client could make collide. The least recently used blocks make room. `slots.py` is where they go.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence

import torch

from service.inference.byte_lru import ByteLru

BLOCK = 32  # tokens


class PrefixCache(ByteLru[bytes, torch.Tensor]):
    """Blocks [L, 2, H, BLOCK, D] by their keys."""

    def keys(self, adapter: str | None, tokens: Sequence[int]) -> list[bytes]:
        """One key for each whole block."""
        key, keys = hashlib.sha256(b"" if adapter is None else adapter.encode()).digest(), []
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = hashlib.sha256(key + array("q", tokens[start : start + BLOCK]).tobytes()).digest()
            keys.append(key)
        return keys

    def longest(self, keys: Sequence[bytes]) -> list[torch.Tensor]:
        """The blocks from the first on, up to one that is not here. The first one counts as used last: without it, those
        after it are of no use."""
        here = list(itertools.takewhile(lambda key: key in self, keys))
        return [block for key in reversed(here) if (block := self.get(key)) is not None][::-1]
