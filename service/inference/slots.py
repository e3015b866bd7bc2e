"""The key-value memory of the running requests: fixed slots, each the context of one request.

Shapes: L layers, S slots, H key-value heads, C max_context, D head_dim, T tokens. A request keeps its slot from its first
token to its last. Two invariants keep requests apart: one reads its own slot only, and everything beyond a slot's length
is zero (attention multiplies masked values by a weight of zero, and zero times a NaN left behind is NaN).
`slot_attention.py` writes and reads it; `prefix_cache.py` keeps parts of it for later. No scheduling here.
"""

from __future__ import annotations

import heapq

import torch


class Slots:
    """`lengths[slot]` tokens are held by each slot; 0 and in `free` when nobody has it."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        max_context: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_slots, num_heads, max_context, head_dim)
        self.kv_LSHCD = torch.zeros(shape, dtype=dtype, device=device)  # on a CPU, pages are taken when first written
        self.layers = [(kv_SHCD[0], kv_SHCD[1]) for kv_SHCD in self.kv_LSHCD]
        self.lengths = [0] * num_slots
        self.num_slots, self.max_context = num_slots, max_context
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def position_bytes(self) -> int:
        """What one token takes in one layer."""
        return int(self.kv_LSHCD[0, :, 0, :, 0].numel()) * self.kv_LSHCD.element_size()

    def take(self) -> int:
        """The lowest free slot, so that those in use lie close together."""
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        """Give a slot back; what was in it is zeroed."""
        self.kv_LSHCD[:, :, slot, :, : self.lengths[slot]] = 0
        self.lengths[slot] = 0
        heapq.heappush(self._free, slot)

    def read(self, slot: int, start: int, end: int) -> torch.Tensor:
        """A copy of the keys and values of these positions, [L, 2, H, T, D]."""
        assert 0 <= start < end <= self.lengths[slot]
        return self.kv_LSHCD[:, :, slot, :, start:end].clone()

    def append(self, slot: int, kv_LHTD: torch.Tensor) -> None:
        """Keys and values that were computed before, [L, 2, H, T, D], at the slot's end."""
        start = self.lengths[slot]
        end = start + kv_LHTD.shape[3]
        self.kv_LSHCD[:, :, slot, :, start:end] = kv_LHTD
        self.lengths[slot] = end
