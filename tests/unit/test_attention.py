"""Attention over short examples: value and gradients against the dense formula, rounding against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from service.training.objectives.attention import _ShortAttention

SCALE = 0.3
SHAPES = {"one head": (1, 1, 1, 5, 4), "shared keys": (2, 6, 2, 7, 8), "a single token": (3, 4, 4, 1, 8)}


def states(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as a projection leaves them: the heads are the second last axis in memory."""
    batch, heads, groups, length, size = shape
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(batch, length, h, size, generator=draw, dtype=torch.float64) for h in (heads, groups, groups)]
    return [tensor.to(dtype).transpose(1, 2).detach().requires_grad_() for tensor in drawn]


def short(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _ShortAttention.apply(query, key, value, SCALE)  # type: ignore[no-untyped-call]
    return output


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (SCALE * query @ key.transpose(2, 3)).masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_dense_formula(shape: str) -> None:
    inputs = states(SHAPES[shape], torch.float64)
    seen, expected = short(*inputs), dense(*inputs)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(seen, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_gradients_are_no_further_from_float32_than_pytorchs_kernel() -> None:
    low = states((2, 6, 2, 128, 32), torch.bfloat16)
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    exact = torch.cat([grad.flatten() for grad in gradients(dense(*high), high)])

    def error(output: torch.Tensor) -> float:
        ours = torch.cat([grad.float().flatten() for grad in gradients(output, low)])
        return float((ours - exact).norm() / exact.norm())

    query, key, value = low
    kernel = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    assert error(short(*low)) < error(kernel.transpose(1, 2))


def test_autocast_around_it_does_not_round_the_scores() -> None:
    inputs = states(SHAPES["shared keys"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = short(*inputs)
    assert torch.equal(seen, short(*inputs))
