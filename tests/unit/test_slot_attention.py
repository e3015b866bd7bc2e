"""Attention over slots against plain attention of each request alone, and a memory that keeps requests apart."""

from __future__ import annotations

import math

import pytest
import torch

from service.inference.prefix_cache import BLOCK, PrefixCache
from service.inference.slot_attention import Piece, Reading, rows_apart
from service.inference.slots import Slots

HEADS, GROUPS, DIM, CONTEXT = 2, 3, 4, 600


def _slots(num_slots: int = 5) -> Slots:
    return Slots(
        num_layers=1, num_slots=num_slots, num_heads=HEADS, max_context=CONTEXT, head_dim=DIM,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


class Request:
    """Random queries, keys and values for every position of one request, and what plain attention makes of them."""

    def __init__(self, slot: int, length: int, window: int | None, softcap: float | None) -> None:
        self.slot, self.at = slot, 0
        self.query = torch.randn(length, HEADS * GROUPS, DIM)
        self.key, self.value = torch.randn(2, length, HEADS, DIM)
        key, value = (states.repeat_interleave(GROUPS, dim=1) for states in (self.key, self.value))
        scores = torch.einsum("thd,shd->hts", self.query, key) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(length)
        hidden = place[None] > place[:, None]
        if window:
            hidden |= place[None] <= place[:, None] - window
        shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
        self.expected = torch.einsum("hts,shd->thd", shares, value)

    def take(self, count: int) -> slice:
        self.at += count
        return slice(self.at - count, self.at)


def _forward(slots: Slots, pieces: list[tuple[Request, int]], window: int | None, softcap: float | None) -> None:
    """One forward over the next tokens of these requests, compared with what is expected of each."""
    pieces.sort(key=lambda piece: piece[1] > 1)
    reading = Reading(slots, [Piece(request.slot, (0,) * count) for request, count in pieces])
    spans = [(request, request.take(count)) for request, count in pieces]
    states = [torch.cat([getattr(r, name)[span] for r, span in spans])[None] for name in ("query", "key", "value")]
    query, key, value = (state.transpose(1, 2) for state in states)
    seen = reading.attend(0, query, key, value, 0.3, window, softcap)
    expected = torch.cat([request.expected[span] for request, span in spans])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    for request, span in spans:
        slots.lengths[request.slot] = span.stop


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0), (7, 2.0)])
@torch.inference_mode()
def test_rows_and_pieces_of_prompts_see_their_own_slot_only(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    slots = _slots()
    requests = [Request(slots.take(), length, window, softcap) for length in (30, 600, 40, 25, 50)]
    a, long, b, c, d = requests
    _forward(slots, [(a, 9), (long, 560)], window, softcap)
    _forward(slots, [(a, 1), (long, 20), (b, 3)], window, softcap)
    _forward(slots, [(b, 1), (a, 1), (long, 1), (c, 17)], window, softcap)  # not in the order of their slots
    _forward(slots, [(a, 1), (b, 1), (d, 1), (c, 1), (long, 1)], window, softcap)
    slots.release(b.slot)  # a hole
    _forward(slots, [(a, 1), (d, 1), (c, 1)], window, softcap)
    again = Request(slots.take(), 20, window, softcap)
    assert again.slot == b.slot
    _forward(slots, [(a, 1), (d, 1), (again, 5), (long, 1)], window, softcap)
    _forward(slots, [(again, 1), (long, 1)], window, softcap)


@torch.inference_mode()
def test_a_nan_left_by_one_request_is_gone_before_the_next() -> None:
    slots = _slots(2)
    slot = slots.take()
    reading = Reading(slots, [Piece(slot, (0, 0, 0))])
    broken = torch.full((1, HEADS, 3, DIM), math.nan)
    reading.attend(0, broken.repeat(1, GROUPS, 1, 1), broken, broken, 1.0, None, None)
    slots.lengths[slot] = 3
    slots.release(slot)
    assert not slots.kv_LSHCD.any() and slots.num_free == 2


def test_only_rows_much_longer_than_the_others_are_read_apart() -> None:
    assert rows_apart([], 100) == []
    assert rows_apart([50], 100) == []
    assert rows_apart([100, 120, 110], 100) == []
    assert rows_apart([100, 3000, 110, 2000, 90], 100) == [1, 3]
    assert rows_apart([2000] * 15 + [10], 100) == []


def test_blocks_are_found_by_adapter_and_all_tokens_before_them() -> None:
    cache, tokens = PrefixCache(10_000), list(range(3 * BLOCK + 5))
    keys = cache.keys("a", tokens)
    assert len(keys) == 3
    for number, key in enumerate(keys):
        cache.put(key, torch.full((4,), float(number)), 16)
    assert [int(block[0]) for block in cache.longest(cache.keys("a", tokens))] == [0, 1, 2]
    assert len(cache.longest(cache.keys("a", tokens[: 2 * BLOCK + 1]))) == 2
    assert cache.longest(cache.keys(None, tokens)) == cache.longest(cache.keys("b", tokens)) == []
    assert cache.longest(cache.keys("a", [7, *tokens[1:]])) == []
    changed = tokens.copy()
    changed[BLOCK] = 7
    assert len(cache.longest(cache.keys("a", changed))) == 1


def test_the_blocks_used_longest_ago_make_room() -> None:
    cache = PrefixCache(3 * 16)
    keys = cache.keys(None, list(range(4 * BLOCK)))
    for key in keys[:3]:
        cache.put(key, torch.zeros(4), 16)
    cache.get(keys[0])
    cache.put(keys[3], torch.zeros(4), 16)
    assert [key in cache for key in keys] == [True, False, True, True]
    assert cache.num_bytes == 3 * 16
    cache.put(b"huge", torch.zeros(100), 400)
    assert b"huge" not in cache and cache.num_bytes == 3 * 16


def test_a_prefix_longer_than_its_neighbours_leave_room_for_keeps_its_head() -> None:
    cache = PrefixCache(3 * 16)
    keys = cache.keys(None, list(range(3 * BLOCK)))
    for key in reversed(keys):
        cache.put(key, torch.zeros(4), 16)
    assert len(cache.longest(keys)) == 3
    cache.put(b"other", torch.zeros(4), 16)
    assert len(cache.longest(keys)) == 2
