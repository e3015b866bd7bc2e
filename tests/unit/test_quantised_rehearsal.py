"""The rehearsal's quantised linears keep what bitsandbytes' own keep."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from service.config import RunConfig
from service.training.quantised_rehearsal import QuantisedLinear

FEATURES = 64


def real() -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    layer: torch.nn.Module = bnb.nn.Linear4bit(FEATURES, FEATURES, bias=False, compute_dtype=torch.bfloat16)
    return layer.to("cpu")


def rehearsed() -> torch.nn.Module:
    values = {"model": "base", "data": {"train": "rows.jsonl"}, "method": "qlora", "precision": "bf16"}
    layer = QuantisedLinear(torch.nn.Linear(FEATURES, FEATURES, bias=False), RunConfig.model_validate(values))
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.bfloat16), requires_grad=False)
    return layer


@pytest.mark.parametrize("kind", ["real", "rehearsed"])
def test_a_weight_that_is_split_again_after_the_forward_pass_stays_whole_until_the_backward_pass_has_ended(
    kind: str,
) -> None:
    layer = real() if kind == "real" else rehearsed()
    weight = layer.get_parameter("weight")
    gathered = weakref.ref(weight.untyped_storage())
    out = checkpoint(layer, torch.ones(2, FEATURES, requires_grad=True), use_reentrant=False)
    weight.data = torch.empty(0, dtype=weight.dtype)  # as ZeRO-3 lets go of it
    assert gathered() is not None  # in the graph, where activation checkpointing does not see it
    del out
    assert gathered() is None
