"""The learning rate as a closed form, what is decayed and how fast, and optimizers whose state goes on bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.config import FullBlock, LoraBlock, OptimBlock
from service.training.optim import (
    build_optimizer,
    lr_at,
    moments,
    restore_moments,
    set_lr,
    state_bytes,
    warmup_steps,
)

STEPS = 200
SCHEDULES = ["cosine", "linear", "constant", "wsd"]
OPTIMIZERS = ["adamw", "adamw8bit", "adafactor"]


def _rates(**options: object) -> list[float]:
    optim = OptimBlock.model_validate({"lr": 1e-3, **options})
    return [lr_at(step, STEPS, optim) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("warmup", "num_steps", "wanted"),
    [(0, 9, 0), (3, 9, 3), ("10%", 100, 10), ("10%", 5, 1), ("2.5 %", 100, 3), ("0%", 9, 0)],
)
def test_warmup_in_steps_or_as_a_share_rounded_up(warmup: int | str, num_steps: int, wanted: int) -> None:
    assert warmup_steps(warmup, num_steps) == wanted


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize(("decay", "last"), [("20%", 40), (60, 60), ("0%", 0), (0, 0), ("95%", 180)])
def test_wsd_is_stable_until_its_last_steps_and_then_falls_as_one_minus_a_root(decay: int | str, last: int) -> None:
    rates = _rates(schedule="wsd", warmup=20, decay=decay)
    assert rates[20 : STEPS - last] == [1e-3] * (STEPS - last - 20)
    assert rates[STEPS - last :] == pytest.approx([1e-3 * (1 - math.sqrt(i / last)) for i in range(last)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", ["100%", 500])
def test_a_run_that_is_all_warmup_has_rates_too(schedule: str, warmup: int | str) -> None:
    rates = _rates(schedule=schedule, warmup=warmup)
    assert rates == sorted(rates) and rates[0] > 0 and rates[-1] <= 1e-3


def _model() -> torch.nn.Module:
    """One weight large enough for 8-bit state, one too small for it, a norm, biases, and a part of a block over."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(65, 70), torch.nn.LayerNorm(70), torch.nn.Linear(70, 2))


def _optimizer(model: torch.nn.Module, name: str = "adamw", **options: float) -> torch.optim.Optimizer:
    optim = OptimBlock.model_validate({"lr": 1e-2, "name": name, **options})
    return build_optimizer(model.named_parameters(), optim, FullBlock())


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_lr(optimizer, 1e-2 / (step + 1))
        optimizer.zero_grad()
        x = torch.randn(5, 65, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_are_decayed_and_norms_and_biases_are_not(name: str) -> None:
    model = _model()
    groups = _optimizer(model, name, weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    seen = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert seen == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0.1, "2.bias": 0}


def test_a_matrix_that_zero3_has_spread_is_decayed_like_any_matrix() -> None:
    spread = torch.nn.Parameter(torch.empty(0))
    spread.ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]  # what DeepSpeed leaves on it
    optimizer = build_optimizer([("weight", spread)], OptimBlock(weight_decay=0.1), FullBlock())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lora_plus_steps_b_matrices_so_many_times_faster(name: str) -> None:
    named = [
        (f"layers.0.q_proj.{part}.default.weight", torch.nn.Parameter(torch.ones(4, 4)))
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    ]
    optim = OptimBlock.model_validate({"lr": 1e-3, "name": name})
    optimizer = build_optimizer(named, optim, LoraBlock(lora_plus_ratio=16))
    set_lr(optimizer, 2e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for _, p in named] == pytest.approx([2e-3, 16 * 2e-3, 2e-3])


def test_one_step_is_the_papers_adamw() -> None:
    """Algorithm 2 of arXiv:1711.05101 at its first step: the moments' bias corrections cancel."""
    weight = torch.nn.Parameter(torch.tensor([[2.0, -3.0]]))
    optimizer = build_optimizer([("weight", weight)], OptimBlock(lr=0.1, weight_decay=0.5), FullBlock())
    weight.grad = torch.tensor([[4.0, 0.5]])
    optimizer.step()
    wanted = torch.tensor([[2.0 - 0.1 * 0.5 * 2 - 0.1, -3.0 + 0.1 * 0.5 * 3 - 0.1]])
    torch.testing.assert_close(weight.data, wanted)  # eps 1e-8 is below float32's noise here


def test_one_step_is_the_papers_adafactor_without_parameter_scaling() -> None:
    """Algorithm 4 of arXiv:1804.04235 at its first step, where its beta is 0: V is rows x columns / total of G^2."""
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = build_optimizer([("weight", weight)], OptimBlock(name="adafactor", lr=0.1), FullBlock())
    gradient = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]])
    weight.grad = gradient.clone()
    optimizer.step()
    squares = gradient**2
    estimate = squares.sum(1, keepdim=True) * squares.sum(0, keepdim=True) / squares.sum()
    update = gradient / estimate.sqrt()
    update /= max(1.0, float(update.square().mean().sqrt()))
    torch.testing.assert_close(weight.data, -0.1 * update)


def test_eight_bit_steps_stay_near_those_in_float32() -> None:
    plain, small = _model(), _model()
    _train(plain, _optimizer(plain), range(10))
    _train(small, _optimizer(small, "adamw8bit"), range(10))
    start = _model().get_parameter("0.weight")
    moved = plain.get_parameter("0.weight") - start
    off = small.get_parameter("0.weight") - plain.get_parameter("0.weight")
    assert 0 < off.norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_from_moments_in_a_file(name: str, tmp_path: Path) -> None:
    whole = _model()
    optimizer = _optimizer(whole, name, weight_decay=0.1)
    _train(whole, optimizer, range(3))
    state = {
        f"{parameter}/{key}": value
        for parameter, p in whole.named_parameters()
        for key, value in {"weight": p.detach(), **moments(optimizer, p)}.items()
    }
    save_file(state, tmp_path / "state.safetensors")
    _train(whole, optimizer, range(3, 6))

    read = load_file(tmp_path / "state.safetensors")
    resumed = _model()
    again = _optimizer(resumed, name, weight_decay=0.1)
    for parameter, p in resumed.named_parameters():
        mine = {key.split("/")[1]: value for key, value in read.items() if key.startswith(f"{parameter}/")}
        p.data.copy_(mine.pop("weight"))
        restore_moments(again, p, mine)
    _train(resumed, again, range(3, 6))
    for parameter, p in resumed.named_parameters():
        assert torch.equal(p, whole.get_parameter(parameter)), parameter
        ours, theirs = moments(again, p), moments(optimizer, whole.get_parameter(parameter))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_moments_are_a_copy(name: str) -> None:
    model, other = _model(), _model()
    optimizer, second = _optimizer(model, name), _optimizer(other, name)
    _train(model, optimizer, range(2))
    for parameter, p in other.named_parameters():
        restore_moments(second, p, moments(optimizer, model.get_parameter(parameter)))
    kept = {n: {k: v.clone() for k, v in moments(optimizer, p).items()} for n, p in model.named_parameters()}
    _train(other, second, range(2, 4))
    for parameter, p in model.named_parameters():
        assert all(torch.equal(value, kept[parameter][key]) for key, value in moments(optimizer, p).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_the_first_step_there_is_no_state_and_restoring_none_forgets_what_there_was(name: str) -> None:
    model = _model()
    optimizer = _optimizer(model, name)
    parameter = model.get_parameter("0.weight")
    assert moments(optimizer, parameter) == {}
    _train(model, optimizer, range(1))
    assert moments(optimizer, parameter) != {}
    restore_moments(optimizer, parameter, {})
    assert moments(optimizer, parameter) == {}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
        ("adamw8bit", {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}),
        ("adafactor", {"step", "exp_avg_sq_row", "exp_avg_sq_col"}),
    ],
)
def test_moments_have_their_optimizers_names(name: str, wanted: set[str]) -> None:
    model = _model()
    optimizer = _optimizer(model, name)
    _train(model, optimizer, range(1))
    assert moments(optimizer, model.get_parameter("0.weight")).keys() == wanted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_takes_as_many_bytes_as_predicted(name: str) -> None:
    model = _model()
    optimizer = _optimizer(model, name)
    _train(model, optimizer, range(1))
    for parameter, p in model.named_parameters():
        held = {key: value for key, value in moments(optimizer, p).items() if key != "step" and "qmap" not in key}
        assert sum(value.nbytes for value in held.values()) == state_bytes(p.shape, name), parameter


def test_state_is_8_bytes_a_weight_in_adamw_2_in_8_bits_and_next_to_nothing_in_adafactor() -> None:
    shape, size = (4096, 4096), 4096 * 4096
    assert state_bytes(shape, "adamw") == 8 * size
    assert state_bytes(shape, "adamw8bit") == pytest.approx(2 * size, rel=0.02)
    assert state_bytes(shape, "adafactor") == 4 * 2 * 4096


def test_8_bit_code_books_are_shared_after_restoring_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(65, 70), torch.nn.Linear(70, 70))
    optimizer = _optimizer(model, "adamw8bit")
    _train(model, optimizer, range(1))
    for p in model.parameters():
        restore_moments(optimizer, p, moments(optimizer, p))
    first, second = (optimizer.state[model.get_parameter(f"{i}.weight")]["qmap1"] for i in (0, 1))
    assert first is second
