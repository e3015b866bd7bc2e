"""Choosing tokens: greedy, temperature, nucleus, seeds, and rows that stay apart."""

from __future__ import annotations

import pytest
import torch

from service.errors import RequestError
from service.inference.engine import SamplingParams
from service.inference.sampling import NOT_FINITE, generator_for, next_tokens, nucleus, sample

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def _seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_largest_logit_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], dtype=torch.bfloat16)
    assert next_tokens(logits, [GREEDY] * 2, [None, None]) == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_broken_logits_is_named_and_leaves_its_neighbours_alone(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], [bad, 3.0, 1.0], [0.0, 1.0, 2.0]])
    params = SamplingParams(max_tokens=1)
    tokens = next_tokens(logits, [GREEDY, params, GREEDY], [None, _seeded(), None])
    assert tokens == [1, NOT_FINITE, 2]


def test_a_row_that_is_all_minus_infinity_is_broken() -> None:
    assert next_tokens(torch.full((1, 4), float("-inf")), [GREEDY], [None]) == [NOT_FINITE]


def test_the_same_seed_draws_the_same_tokens_whatever_shares_the_batch() -> None:
    torch.manual_seed(0)
    row, others = torch.randn(50), torch.randn(3, 50)
    params = SamplingParams(max_tokens=1, seed=11)

    def draws(logits: torch.Tensor, at: int) -> list[int]:
        generator = generator_for(params)
        generators = [generator if i == at else _seeded(i) for i in range(len(logits))]
        return [next_tokens(logits, [params] * len(logits), list(generators))[at] for _ in range(20)]

    assert draws(row[None], 0) == draws(torch.cat((others, row[None])), 3)


def test_requests_without_a_seed_differ() -> None:
    params, logits = SamplingParams(max_tokens=1), torch.zeros(1000)
    first, second = (generator_for(params) for _ in range(2))
    assert first is not None and second is not None
    # Twenty equal draws of 1000 equally likely tokens: odds of 1 in 10^60.
    assert [sample(logits, 1.0, 1.0, first) for _ in range(20)] != [sample(logits, 1.0, 1.0, second) for _ in range(20)]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(probabilities, 0.5).nonzero().flatten().tolist() == [1]
    assert nucleus(probabilities, 0.6).nonzero().flatten().tolist() == [1, 3]
    assert nucleus(probabilities, 1e-9).nonzero().flatten().tolist() == [1]


def test_draws_follow_the_distribution_at_this_temperature() -> None:
    logits, generator, count = torch.tensor([0.0, 1.0, 2.0]), _seeded(3), 4000
    drawn = torch.bincount(torch.tensor([sample(logits, 0.5, 1.0, generator) for _ in range(count)]), minlength=3)
    expected = torch.softmax(logits / 0.5, dim=-1)
    # Fixed seed; 0.04 is five standard deviations of a share at 4000 draws.
    assert (drawn / count - expected).abs().max() < 0.04


def test_a_token_outside_the_nucleus_is_never_drawn() -> None:
    logits, generator = torch.tensor([0.0, 5.0, 4.5, 0.0]), _seeded(4)
    assert {sample(logits, 1.0, 0.9, generator) for _ in range(500)} == {1, 2}


def test_every_bad_parameter_is_reported_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=0, temperature=float("nan"), top_p=0.0, seed=2**64, stop=("",))
    for name in ("max_tokens is 0", "temperature is nan", "top_p is 0.0", "seed is", "stop holds"):
        assert name in caught.value.message
    assert caught.value.param == "max_tokens"
