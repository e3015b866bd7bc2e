"""The key-value memory of the running requests: fixed slots, always compact, so that a step reads views, never gathers.

Shapes: L layers, S slots, H key-value heads, C max_context, D head_dim. Rows 0..n-1 are in use. When one ends, the last
row moves into the gap. Two invariants keep rows apart: a row reads its own slot only, and everything beyond a slot's
length is zero (attention multiplies masked values by a weight of zero, and zero times a NaN left behind is NaN).
`decoder.py` runs the model over it. No scheduling here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):  # type: ignore[misc, unused-ignore]  # transformers is typed in part
    """A transformers cache over slots. `begin_prefill` or `begin_decode` says which rows the next forward writes."""

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
        self.kv_LSHCD = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths: list[int] = []  # tokens held by each row in use
        self.num_slots, self.max_context, self.device = num_slots, max_context, device
        self._slot_layers = [SlotLayer(kv_SHCD) for kv_SHCD in self.kv_LSHCD]
        super().__init__(layers=list(self._slot_layers))

    @property
    def num_rows(self) -> int:
        """Rows in use; they are rows 0 to n-1."""
        return len(self.lengths)

    def begin_prefill(self, num_tokens: int) -> int:
        """Open the next row for a prompt of this many tokens, and return its number."""
        row = len(self.lengths)
        assert row < self.num_slots and num_tokens <= self.max_context
        self.lengths.append(num_tokens)
        for layer in self._slot_layers:
            layer.prefill_row = row
        return row

    def begin_decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for one more token in every row: its positions [n, 1], and the mask [n, 1, 1, longest]."""
        longest = max(self.lengths) + 1
        assert longest <= self.max_context
        positions_B = torch.tensor(self.lengths, device=self.device)
        rows_B = torch.arange(len(self.lengths), device=self.device)
        mask_BT = torch.arange(longest, device=self.device) <= positions_B[:, None]
        for layer in self._slot_layers:
            layer.begin_decode(rows_B, positions_B, longest)
        self.lengths = [length + 1 for length in self.lengths]
        return positions_B[:, None], mask_BT[:, None, None, :]

    def release(self, row: int) -> None:
        """Free a row: the last row moves into its place, and what is left behind is zeroed."""
        last, old_length, length = len(self.lengths) - 1, self.lengths[row], self.lengths[-1]
        if row != last:
            self.kv_LSHCD[:, :, row, :, :length] = self.kv_LSHCD[:, :, last, :, :length]
            self.kv_LSHCD[:, :, row, :, length:old_length] = 0
            self.lengths[row] = length
        self.kv_LSHCD[:, :, last, :, :length] = 0
        self.lengths.pop()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer's attention calls: writes the new keys and values, returns all that it may read."""
        return self._slot_layers[layer_idx].update(key_states, value_states)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """One layer's views of the slots."""

    def __init__(self, kv_SHCD: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._all_keys, self._all_values = kv_SHCD[0], kv_SHCD[1]
        self.keys, self.values = self._all_keys, self._all_values
        self.is_initialized = True
        self.prefill_row: int | None = None

    def begin_decode(self, rows_B: torch.Tensor, positions_B: torch.Tensor, longest: int) -> None:
        """Every row in use writes one token at its own position."""
        self.prefill_row, self.rows_B, self.positions_B = None, rows_B, positions_B
        self.keys_read = self._all_keys[: len(rows_B), :, :longest]
        self.values_read = self._all_values[: len(rows_B), :, :longest]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt is written from position 0 and reads itself; a decode step writes one position a row."""
        if self.prefill_row is not None:
            length = key_states.shape[-2]
            self._all_keys[self.prefill_row, :, :length] = key_states[0]
            self._all_values[self.prefill_row, :, :length] = value_states[0]
            return key_states, value_states
        self.keys_read[self.rows_B, :, self.positions_B] = key_states[:, :, 0]
        self.values_read[self.rows_B, :, self.positions_B] = value_states[:, :, 0]
        return self.keys_read, self.values_read

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The slots are allocated at construction, because their size is the engine's promise."""

    def get_seq_length(self) -> int:
        """Zero: prompts start there, and a decode step gets its positions and mask explicitly."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of a prompt."""
        return query_length, 0

    def get_max_length(self) -> int:
        """The context of a slot."""
        return int(self._all_keys.shape[-2])
