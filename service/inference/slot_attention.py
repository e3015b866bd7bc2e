"""Attention over slots: one forward carries the next token of every decoding row and pieces of prompts, side by side.

The model sees one sequence of N tokens, [1, N]; everything but attention looks at single tokens, so it needs to know no
more. Here each token's key and value goes into its slot, and each query reads its own slot: rows that decode all at once,
pieces of prompts one by one. The heads of a query that share keys are rows of one product, so nothing is repeated.
Installed by `decoder.py` as transformers' attention function; `slots.py` is the memory.

Shapes: N tokens, B decoding rows, H key-value heads, G query heads for each of them, D head_dim, K positions read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from service.inference.slots import Slots

NAME = "loray_slots"
# Reading a row apart costs some calls a layer, as much as reading this many bytes more in one call.
_APART_BYTES = 200_000
_current: ContextVar[Reading] = ContextVar("reading")


@dataclass(frozen=True)
class Piece:
    """Tokens for one slot, after those that it holds: one of a decoding row, or some of a prompt."""

    slot: int
    tokens: tuple[int, ...]


class Reading:
    """Where the N tokens of one forward are written and what each may see. Single tokens come first."""

    def __init__(self, slots: Slots, pieces: Sequence[Piece]) -> None:
        device, starts = slots.kv_LSHCD.device, slots.lengths
        singles = [piece for piece in pieces if len(piece.tokens) == 1]
        longer = pieces[len(singles) :]
        assert all(len(piece.tokens) > 1 for piece in longer)
        self._slots, self._num_single = slots, len(singles)
        self._rows_B = torch.tensor([piece.slot for piece in singles], device=device)
        ends = [starts[piece.slot] + 1 for piece in singles]
        self._positions_B = torch.tensor(ends, device=device) - 1
        apart = rows_apart(ends, max(1, _APART_BYTES // slots.position_bytes))
        places = {piece.slot: i for i, piece in enumerate(singles)}
        together = sorted(piece.slot for i, piece in enumerate(singles) if i not in apart)
        read_at_once = [rows for rows in (together, *([singles[i].slot] for i in apart)) if rows]
        self._views = [_View(slots, rows, places) for rows in read_at_once]
        self._longer: list[tuple[int, int, slice]] = []
        at = len(singles)
        for piece in longer:
            self._longer.append((piece.slot, starts[piece.slot], slice(at, at + len(piece.tokens))))
            at += len(piece.tokens)
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self.windows: dict[int, int | None] = {}  # by layer, as the model asked for them

    def attend(
        self,
        layer: int,
        query_1HND: torch.Tensor,
        key_1HND: torch.Tensor,
        value_1HND: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Write keys and values, then let every query read: [1, N, H * G, D]."""
        self.windows[layer] = window
        keys_SHCD, values_SHCD = self._slots.layers[layer]
        groups = query_1HND.shape[1] // key_1HND.shape[1]
        parts = []
        if self._num_single:
            parts.append(
                self._decode(keys_SHCD, values_SHCD, query_1HND, key_1HND, value_1HND, groups, scale, window, softcap)
            )
        for slot, start, span in self._longer:
            end = start + span.stop - span.start
            keys_SHCD[slot, :, start:end] = key_1HND[0, :, span]
            values_SHCD[slot, :, start:end] = value_1HND[0, :, span]
            heads, size = key_1HND.shape[1], query_1HND.shape[3]
            query = query_1HND[:, :, span].reshape(1, heads, -1, size)  # the queries of a group, one after the other
            mask = self._prompt_mask(start, end, groups, window, query.dtype)
            read = _attention(
                query, keys_SHCD[slot, None, :, :end], values_SHCD[slot, None, :, :end], mask, scale, softcap
            )
            parts.append(read.view(heads * groups, end - start, -1).transpose(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _decode(
        self,
        keys_SHCD: torch.Tensor,
        values_SHCD: torch.Tensor,
        query_1HND: torch.Tensor,
        key_1HND: torch.Tensor,
        value_1HND: torch.Tensor,
        groups: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        count, heads = self._num_single, key_1HND.shape[1]
        keys_SHCD[self._rows_B, :, self._positions_B] = key_1HND[0, :, :count].transpose(0, 1)
        values_SHCD[self._rows_B, :, self._positions_B] = value_1HND[0, :, :count].transpose(0, 1)
        query_BHGD = query_1HND[0, :, :count].transpose(0, 1).reshape(count, heads, groups, -1)
        outputs = []
        for view in self._views:
            query = query_BHGD if view.take is None else query_BHGD[view.take]
            mask = self._row_mask(view, window, query.dtype)
            span = slice(view.first, view.last), slice(None), slice(0, view.longest)
            outputs.append(_attention(query, keys_SHCD[span], values_SHCD[span], mask, scale, softcap))
        if len(outputs) == 1 and self._views[0].take is None:
            read = outputs[0]
        else:
            read = outputs[0].new_empty(count, *outputs[0].shape[1:])
            for view, output in zip(self._views, outputs, strict=True):
                read[view.give] = output[view.give_from]
        return read.reshape(count, heads * groups, -1)

    def _row_mask(self, view: _View, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a row may look, -inf elsewhere: [B, 1, 1, K]."""
        key = ("rows", view.first, view.last, window)
        if key not in self._masks:
            positions_B1 = view.positions_B[:, None]
            seen_BK = torch.arange(view.longest, device=positions_B1.device) <= positions_B1
            if window is not None:
                seen_BK &= torch.arange(view.longest, device=positions_B1.device) > positions_B1 - window
            self._masks[key] = _additive(seen_BK, dtype)[:, None, None]
        return self._masks[key]

    def _prompt_mask(self, start: int, end: int, groups: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The same for the positions start to end - 1 of one slot, once for each query of a group: [G * T, K]."""
        key = ("prompt", start, end, window)
        if key not in self._masks:
            keys_K = torch.arange(end, device=self._positions_B.device)
            seen_TK = keys_K <= keys_K[start:, None]
            if window is not None:
                seen_TK &= keys_K > keys_K[start:, None] - window
            self._masks[key] = _additive(seen_TK, dtype).repeat(groups, 1)
        return self._masks[key]


class _View:
    """Slots that are read in one call: all from the first to the last, those without a row of ours for nothing.

    `rows` are its slots, `places` says where each decoding row's slot stands among all of them.
    """

    def __init__(self, slots: Slots, rows: list[int], places: dict[int, int]) -> None:
        device, mine = slots.kv_LSHCD.device, set(rows)
        self.first, self.last = rows[0], rows[-1] + 1
        self.longest = max(slots.lengths[slot] for slot in rows) + 1
        span = range(self.first, self.last)
        self.positions_B = torch.tensor([slots.lengths[slot] if slot in mine else 0 for slot in span], device=device)
        self.take: torch.Tensor | None = None  # None: all rows, in their order
        if list(places) != rows or len(span) > len(rows):
            self.take = torch.tensor([places[slot] if slot in mine else 0 for slot in span], device=device)
            self.give = torch.tensor([places[slot] for slot in rows], device=device)
            self.give_from = torch.tensor([slot - self.first for slot in rows], device=device)


def rows_apart(lengths: Sequence[int], cost_apart: int) -> list[int]:
    """Which rows to read one by one, because reading all rows to the length of the longest would cost more.

    `cost_apart` is what a separate reading costs beside its positions, in positions. The longest go first.

    >>> rows_apart([100, 2000, 110, 90], 256)
    [1]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    apart, best, chosen = 0, 0.9 * len(lengths) * max(lengths, default=0), 0  # for less it is not worth it
    for count, row in enumerate(order[:-1], start=1):
        apart += lengths[row] + cost_apart
        cost = apart + (len(lengths) - count) * lengths[order[count]]
        if cost < best:
            best, chosen = cost, count
    return sorted(order[:chosen])


def install(model: Any) -> None:
    """Make this the attention of a transformers model. It works inside `reading` only."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def reading(forward: Reading) -> Iterator[None]:
    """Within it, the model's forward is this one."""
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)


def _no_mask(*args: Any, **options: Any) -> None:
    """A reading knows what each token may see."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: queries [1, H * G, N, D], keys and values [1, H, N, D] -> [1, N, H * G, D]."""
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise ValueError("attention sinks and position biases are not known to attention over slots.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: Any = module.layer_idx
    return _current.get().attend(layer, query, key, value, scale, sliding_window, softcap), None


def _attention(
    query_BHTD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V; with a soft cap c, c tanh(scores / c) in place of the scores."""
    if softcap is None:
        return functional.scaled_dot_product_attention(query_BHTD, key_BHKD, value_BHKD, attn_mask=mask, scale=scale)
    scores = torch.tanh((query_BHTD @ key_BHKD.transpose(-1, -2)).float() * (scale / softcap)) * softcap
    return (scores + mask.float()).softmax(-1).to(value_BHKD.dtype) @ value_BHKD


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
