"""Choosing tokens: greedy, temperature, nucleus, seeds, and rows that stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from service.errors import RequestError
from service.inference.engine import SamplingParams
from service.inference.sampling import NOT_FINITE, Sampler, candidates, generator_for, likeliest, logprobs_of, sample

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def next_tokens(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """What the engine does with a step's logits."""
    return [
        token if sampler.is_plain or token == NOT_FINITE else sampler.choose(row)
        for token, sampler, row in zip(likeliest(logits), samplers, logits, strict=True)
    ]


def _samplers(*params: SamplingParams) -> list[Sampler]:
    return [Sampler(one, ()) for one in params]


def _seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_largest_logit_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], dtype=torch.bfloat16)
    assert next_tokens(logits, _samplers(GREEDY, GREEDY)) == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_broken_logits_is_named_and_leaves_its_neighbours_alone(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], [bad, 3.0, 1.0], [0.0, 1.0, 2.0]])
    params = SamplingParams(max_tokens=1)
    assert next_tokens(logits, _samplers(GREEDY, params, GREEDY)) == [1, NOT_FINITE, 2]


def test_a_row_that_is_all_minus_infinity_is_broken() -> None:
    assert next_tokens(torch.full((1, 4), float("-inf")), _samplers(GREEDY)) == [NOT_FINITE]


def test_the_same_seed_draws_the_same_tokens_whatever_shares_the_batch() -> None:
    torch.manual_seed(0)
    row, others = torch.randn(50), torch.randn(3, 50)
    params = SamplingParams(max_tokens=1, seed=11)

    def draws(logits: torch.Tensor, at: int) -> list[int]:
        samplers = _samplers(*(params if i == at else SamplingParams(max_tokens=1, seed=i) for i in range(len(logits))))
        return [next_tokens(logits, samplers)[at] for _ in range(20)]

    assert draws(row[None], 0) == draws(torch.cat((others, row[None])), 3)


def test_requests_without_a_seed_differ() -> None:
    params, logits = SamplingParams(max_tokens=1), torch.zeros(1000)
    first, second = (generator_for(params) for _ in range(2))
    assert first is not None and second is not None
    # Twenty equal draws of 1000 equally likely tokens: odds of 1 in 10^60.
    assert [sample(logits, 1.0, first) for _ in range(20)] != [sample(logits, 1.0, second) for _ in range(20)]


def _kept(logits: torch.Tensor, **options: Any) -> list[int]:
    ids, weights = candidates(logits.double(), **options)
    assert ids is not None and len(ids) == len(weights)
    return [int(token) for token in ids]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert _kept(logits, top_p=0.5) == [1]
    assert _kept(logits, top_p=0.6) == [1, 3]
    assert _kept(logits, top_p=1e-9) == [1]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.7, "min_p": 0.02}, {"top_p": 0.999}],
)
@pytest.mark.parametrize("spread", [0.1, 3.0])  # 0.1: a nucleus of hundreds of tokens
def test_the_candidates_and_their_weights_are_those_of_transformers(options: dict[str, Any], spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000, dtype=torch.float64) * spread
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    expected = logits[None]
    for name, warper in warpers.items():
        if name in options:
            expected = warper(options[name])(torch.zeros(1, 1, dtype=torch.long), expected)
    shares = expected[0].softmax(-1)
    ids, weights = candidates(logits, **options)
    assert ids is not None and ids.tolist() == shares.nonzero().flatten().tolist()
    torch.testing.assert_close(weights / weights.sum(), shares[ids])


def test_penalties_and_biases_change_the_choice() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])

    def first_three(**options: Any) -> list[int]:
        sampler, chosen = Sampler(SamplingParams(max_tokens=3, temperature=0.0, **options), [1]), []
        for _ in range(3):
            chosen.append(next_tokens(logits[None], [sampler])[0])
            sampler.accept(chosen[-1])
        return chosen

    assert first_three() == [1, 1, 1]
    assert first_three(repetition_penalty=2.0) == [2, 1, 1]  # the prompt's token counts: 3 / 2 < 2, then 2 / 2 < 3 / 2
    assert first_three(presence_penalty=1.5) == [1, 2, 1]  # 3, then 1.5 < 2, then 1.5 > 0.5
    assert first_three(frequency_penalty=0.6) == [1, 1, 2]  # 3, 2.4, then 1.8 < 2
    assert first_three(logit_bias=((3, 10.0), (1, -5.0))) == [3, 3, 3]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    logits = torch.randn(50)
    sampler = Sampler(SamplingParams(max_tokens=1, temperature=0.0, repetition_penalty=1.7), [3, 3, 9])
    sampler.accept(20)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 3, 9, 20]]), logits[None].clone())[0]
    assert torch.equal(sampler._adjusted(logits), expected)


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    first, second = logprobs_of(logits, [0, 0], 2)
    expected = torch.log_softmax(logits, -1)
    assert first.logprob == pytest.approx(float(expected[0, 0]))
    assert [token for token, _ in first.top] == [2, 1]
    assert second.top[0][0] == 0 and second.top[0][1] == pytest.approx(float(expected[1, 0]))


def test_draws_follow_the_distribution_at_this_temperature() -> None:
    logits, generator, count = torch.tensor([0.0, 1.0, 2.0]), _seeded(3), 4000
    drawn = torch.bincount(torch.tensor([sample(logits, 0.5, generator) for _ in range(count)]), minlength=3)
    expected = torch.softmax(logits / 0.5, dim=-1)
    # Fixed seed; 0.04 is five standard deviations of a share at 4000 draws.
    assert (drawn / count - expected).abs().max() < 0.04


def test_a_token_outside_the_nucleus_is_never_drawn() -> None:
    logits, generator = torch.tensor([0.0, 5.0, 4.5, 0.0]), _seeded(4)
    assert {sample(logits, 1.0, generator, top_p=0.9) for _ in range(500)} == {1, 2}


def test_every_bad_parameter_is_reported_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(
            max_tokens=-1, temperature=float("nan"), top_p=0.0, seed=2**64, stop=("",), top_k=-1, min_p=2.0,
            repetition_penalty=0.0, presence_penalty=3.0, frequency_penalty=float("nan"), logit_bias=((1, 200.0),),
            logprobs=21, prompt_logprobs=-1,
        )  # fmt: skip
    names = (
        "max_tokens is -1", "temperature is nan", "top_p is 0.0", "seed is", "stop holds", "top_k is -1", "min_p is 2.0",
        "repetition_penalty is 0.0", "presence_penalty is 3.0", "frequency_penalty is nan", "logit_bias holds",
        "\nlogprobs is 21", "prompt_logprobs is -1",
    )  # fmt: skip
    for name in names:
        assert name in caught.value.message
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("temperature", [1e-5, 1e-310])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}])
def test_a_tiny_temperature_is_nearly_greedy_and_never_garbage(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 50.0, 49.0, -50.0])
    assert {sample(logits, temperature, _seeded(seed), **options) for seed in range(20)} == {1}
