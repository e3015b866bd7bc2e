"""Choosing one token from one row of logits: pure, row by row, so that a row never depends on its batch.

Greedy needs no float32 copy of the vocabulary. Sampling draws a single uniform number per token from the request's own
generator on the CPU and inverts the cumulative distribution in vocabulary order, so that the same seed gives the same
tokens on any device and beside any neighbours, up to the rounding of the logits themselves.
"""

from __future__ import annotations

import torch

from service.inference.engine import SamplingParams

NOT_FINITE = -1  # in place of a token: this row's logits hold NaN or +inf


def generator_for(params: SamplingParams) -> torch.Generator | None:
    """A fresh random stream for one request; none for a greedy one."""
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def next_tokens(
    logits_BV: torch.Tensor, params: list[SamplingParams], generators: list[torch.Generator | None]
) -> list[int]:
    """One token a row, `NOT_FINITE` for rows whose logits are broken. The one place where the device is waited for."""
    best_B, tokens_B = logits_BV.max(dim=-1)  # NaN and +inf win every maximum
    best, tokens = torch.stack((best_B.double(), tokens_B.double())).tolist()
    chosen = [
        int(token) if value < float("inf") and value > float("-inf") else NOT_FINITE
        for value, token in zip(best, tokens, strict=True)
    ]
    for row, generator in enumerate(generators):
        if generator is not None and chosen[row] != NOT_FINITE:
            chosen[row] = sample(logits_BV[row], params[row].temperature, params[row].top_p, generator)
    return chosen


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One draw at `temperature` from the smallest set of tokens whose probability reaches `top_p`."""
    probabilities_V = torch.softmax(logits_V.float() / temperature, dim=-1, dtype=torch.float64)
    if top_p < 1.0:
        probabilities_V = nucleus(probabilities_V, top_p)
    cumulative_V = probabilities_V.cumsum(dim=-1)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).to(cumulative_V.device)
    # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability zero.
    return int(torch.searchsorted(cumulative_V, (uniform * cumulative_V[-1]).reshape(1), right=True))


def nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same probabilities, zero outside the nucleus (Holtzman et al. 2020, eq. 2), in vocabulary order, not normed."""
    ordered_V, order_V = probabilities_V.sort(descending=True)
    before_V = ordered_V.cumsum(dim=-1) - ordered_V
    kept_V = torch.zeros_like(probabilities_V, dtype=torch.bool).scatter_(0, order_V, before_V < top_p)
    return probabilities_V.where(kept_V, 0.0)
