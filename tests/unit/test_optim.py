"""The learning rate as a closed form, what is decayed, and moments that go on bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from service.config import OptimBlock
from service.training.optim import build_adamw, lr_at, moments, restore_moments, warmup_steps

STEPS = 200


def _rates(**options: object) -> list[float]:
    optim = OptimBlock.model_validate({"lr": 1e-3, **options})
    return [lr_at(step, STEPS, optim) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("warmup", "num_steps", "wanted"),
    [(0, 9, 0), (3, 9, 3), ("10%", 100, 10), ("10%", 5, 1), ("2.5 %", 100, 3), ("0%", 9, 0)],
)
def test_warmup_in_steps_or_as_a_share_rounded_up(warmup: int | str, num_steps: int, wanted: int) -> None:
    assert warmup_steps(warmup, num_steps) == wanted


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 20, "10%"])
def test_warmup_rises_evenly_to_the_peak_and_nothing_is_above_it(schedule: str, warmup: int | str) -> None:
    rates, warm = _rates(schedule=schedule, warmup=warmup), warmup_steps(warmup, STEPS)
    assert rates[:warm] == pytest.approx([1e-3 * (step + 1) / warm for step in range(warm)])
    assert rates[max(0, warm - 1)] == pytest.approx(1e-3) == max(rates)
    assert all(rate > 0 for rate in rates)


def test_the_cosine_is_halfway_in_the_middle_and_ends_at_a_tenth() -> None:
    rates = _rates(schedule="cosine", warmup=20)
    assert rates[20 + 90] == pytest.approx(1e-3 * (0.1 + 0.9 / 2))
    assert rates[20 + 45] == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rates[-1] == pytest.approx(1e-4, rel=2e-3)


def test_the_line_falls_evenly_to_nothing_and_the_constant_stays() -> None:
    line = _rates(schedule="linear", warmup=0)
    assert line == pytest.approx([1e-3 * (1 - step / STEPS) for step in range(STEPS)])
    assert _rates(schedule="constant", warmup=0) == [1e-3] * STEPS


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", ["100%", 500])
def test_a_run_that_is_all_warmup_has_rates_too(schedule: str, warmup: int | str) -> None:
    rates = _rates(schedule=schedule, warmup=warmup)
    assert rates == sorted(rates) and rates[0] > 0 and rates[-1] <= 1e-3


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))


def _optimizer(model: torch.nn.Module, **options: float) -> torch.optim.AdamW:
    return build_adamw(model.named_parameters(), OptimBlock.model_validate({"lr": 1e-2, **options}))


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()


def test_matrices_are_decayed_and_norms_and_biases_are_not() -> None:
    model = _model()
    decay = {
        id(p): group["weight_decay"]
        for group in _optimizer(model, weight_decay=0.1).param_groups
        for p in group["params"]
    }
    seen = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert seen == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0.1, "2.bias": 0}


def test_one_step_is_the_papers_adamw() -> None:
    """Algorithm 2 of arXiv:1711.05101 at its first step: the moments' bias corrections cancel."""
    weight = torch.nn.Parameter(torch.tensor([[2.0, -3.0]]))
    optimizer = build_adamw([("weight", weight)], OptimBlock(lr=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([[4.0, 0.5]])
    optimizer.step()
    wanted = torch.tensor([[2.0 - 0.1 * 0.5 * 2 - 0.1, -3.0 + 0.1 * 0.5 * 3 - 0.1]])
    torch.testing.assert_close(weight.data, wanted)  # eps 1e-8 is below float32's noise here


def test_training_goes_on_bit_for_bit_from_restored_moments() -> None:
    whole = _model()
    optimizer = _optimizer(whole, weight_decay=0.1)
    _train(whole, optimizer, range(3))
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    state = {name: value.clone() for name, value in moments(optimizer, whole.named_parameters()).items()}
    _train(whole, optimizer, range(3, 6))

    resumed = _model()
    resumed.load_state_dict(weights)
    again = _optimizer(resumed, weight_decay=0.1)
    restore_moments(again, reversed(list(resumed.named_parameters())), state)
    _train(resumed, again, range(3, 6))
    for name, p in resumed.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


def test_restored_moments_are_a_copy() -> None:
    model = _model()
    optimizer = _optimizer(model)
    _train(model, optimizer, range(2))
    state = moments(optimizer, model.named_parameters())
    kept = {name: value.clone() for name, value in state.items()}
    other = _model()
    second = _optimizer(other)
    restore_moments(second, other.named_parameters(), state)
    _train(other, second, range(2))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert {name.split("/")[-1] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
