"""Keys and values of prompts seen before, kept in blocks of tokens, so that what many prompts begin with is computed once.

A block is known by the adapter's digest and all tokens from the first to its own last one, by a SHA-256 chain: never by
anything a client could make collide. The least recently used blocks make room. `slots.py` is where they go.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

BLOCK = 32  # tokens


class PrefixCache:
    """At most `max_bytes` of blocks [L, 2, H, BLOCK, D]."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def keys(self, adapter: str | None, tokens: Sequence[int]) -> list[bytes]:
        """One key for each whole block."""
        key, keys = hashlib.sha256(b"" if adapter is None else adapter.encode()).digest(), []
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + BLOCK])
            key = hashlib.sha256(key + block).digest()
            keys.append(key)
        return keys

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor]:
        """The blocks from the first on, up to one that is not here."""
        found = []
        for key in keys:
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        return found

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def put(self, key: bytes, kv_LHTD: torch.Tensor) -> None:
        """Keep a block."""
        if key in self._blocks or kv_LHTD.nbytes > self.max_bytes:
            return
        self._blocks[key] = kv_LHTD
        self.num_bytes += kv_LHTD.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.num_bytes -= dropped.nbytes
