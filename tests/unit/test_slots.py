"""Slots stay compact, keep each row's keys and values, and leave nothing behind."""

from __future__ import annotations

import random

import torch

from service.inference.slots import SlotCache

LAYERS, SLOTS, HEADS, CONTEXT, DIM = 2, 4, 2, 12, 3


def _cache() -> SlotCache:
    return SlotCache(
        num_layers=LAYERS,
        num_slots=SLOTS,
        num_heads=HEADS,
        max_context=CONTEXT,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def _write(cache: SlotCache, values_BT: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write these numbers as keys, and their negatives as values, into every layer (layer l adds 100 l)."""
    states = values_BT[:, None, :, None].expand(-1, HEADS, -1, DIM)
    return [cache.update(states + 100 * layer, -states - 100 * layer, layer) for layer in range(LAYERS)]


def _prefill(cache: SlotCache, numbers: list[float]) -> None:
    cache.begin_prefill(len(numbers))
    _write(cache, torch.tensor([numbers]))


def test_a_step_reads_every_row_at_its_own_length() -> None:
    cache = _cache()
    _prefill(cache, [1.0, 2.0, 3.0])
    _prefill(cache, [7.0])
    positions, mask = cache.begin_decode()
    read = _write(cache, torch.tensor([[4.0], [8.0]]))
    assert positions.tolist() == [[3], [1]]
    assert mask[:, 0, 0].tolist() == [[True] * 4, [True, True, False, False]]
    keys, values = read[1]
    assert keys[:, 0, :, 0].tolist() == [[101, 102, 103, 104], [107, 108, 0, 0]]
    assert values[:, 1, :, 2].tolist() == [[-101, -102, -103, -104], [-107, -108, 0, 0]]


def test_a_released_row_is_filled_by_the_last_one_and_nothing_is_left_behind() -> None:
    cache = _cache()
    for numbers in ([1.0, 1.0, 1.0], [2.0], [3.0, 3.0]):
        _prefill(cache, numbers)
    cache.release(0)
    assert cache.lengths == [2, 1]
    assert cache.kv_LSHCD[0, 0, :, 0, :4, 0].tolist() == [[3, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_nan_left_by_one_request_is_gone_before_the_next() -> None:
    cache = _cache()
    _prefill(cache, [float("nan")] * 5)
    cache.release(0)
    assert not cache.kv_LSHCD.any()


def test_rows_keep_their_content_under_random_joins_and_leaves() -> None:
    cache, rng = _cache(), random.Random(5)
    content: list[list[float]] = []
    for step in range(300):
        if content and (len(content) == SLOTS or rng.random() < 0.3):
            row = rng.randrange(len(content))
            cache.release(row)
            content[row] = content[-1]
            content.pop()
        elif rng.random() < 0.5 or not content:
            content.append([float(step + 1)] * rng.randint(1, 4))
            _prefill(cache, content[-1])
        elif max(map(len, content)) < CONTEXT:
            cache.begin_decode()
            new = [float(rng.randint(1, 99)) for _ in content]
            _write(cache, torch.tensor(new)[:, None])
            content = [[*numbers, number] for numbers, number in zip(content, new, strict=True)]
        expected = [numbers + [0.0] * (CONTEXT - len(numbers)) for numbers in content]
        expected += [[0.0] * CONTEXT] * (SLOTS - len(content))
        assert cache.kv_LSHCD[0, 0, :, 0, :, 0].tolist() == expected
        assert cache.lengths == [len(numbers) for numbers in content]
