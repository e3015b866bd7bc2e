"""The fused LoRA linear against PEFT's own, value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from service.training.methods.fused import fuse, plainly


class Small(torch.nn.Module):
    """Two linears, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 40)
        self.second = torch.nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.nn.functional.silu(self.first(x)))
        return y


def adapted(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Small(), LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    prepared: torch.nn.Module = model.double().train()
    return prepared


def results(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    x = torch.randn(3, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"value": y.detach(), "input": x.grad, **trained}


def test_value_and_gradients_are_pefts_own() -> None:
    expected, model = results(adapted()), adapted()
    assert fuse(model) == 2
    seen = results(model)
    assert set(seen) == set(expected) and len(seen) == 6
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_options_that_change_the_product_keep_pefts_own_road(options: dict[str, Any]) -> None:
    assert fuse(adapted(**options)) == 0


def test_a_disabled_adapter_is_disabled() -> None:
    model: Any = adapted()
    x = torch.randn(5, 24, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


def test_plainly_is_pefts_own_road_to_the_last_bit_for_as_long_as_it_is_open() -> None:
    model = adapted().bfloat16()
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = model(x)
    fuse(model)
    fused = model(x)
    with plainly(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), fused) and not torch.equal(fused, expected)
