"""Quantised linears for a rehearsal: the memory behaviour of bitsandbytes' layers, with none of their arithmetic.

In 4 and in 8 bits the whole weight is turned back to the compute type for every product, forward and backward, and let go
after it (bitsandbytes 0.50, autograd/_functions.py). In 8 bits the input is kept too. In 4 bits the quantised weight is, as
a plain attribute that activation checkpointing does not see: under zero3 it is the gathered copy, so that all layers' weights
are whole from the forward pass to the backward pass. Nothing here can train: see `methods/quantised.py` for what does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional

from service.config import QloraBlock, RunConfig
from service.training.methods import quantised
from service.training.methods.loading import STORAGE


def quantise(model: torch.nn.Module, config: RunConfig) -> set[int]:
    """Replace the linears of a `methods.skeleton` that would be loaded quantised; the ids of their new weights."""
    small = quantised.quantised_weights(model, config.method)
    made: set[int] = set()
    for module in list(model.modules()) if small else []:
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and id(child.weight) in small:
                replacement = QuantisedLinear(child, config)
                setattr(module, name, replacement)
                made.add(id(replacement.weight))
    return made


class QuantisedLinear(torch.nn.Module):
    """4 bits lie in a parameter of the compute type, 8 bits in one of int8; scales lie beside it and are never spread."""

    def __init__(self, linear: torch.nn.Linear, config: RunConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._compute = STORAGE[config.precision]
        self._keeps_input = not isinstance(config.method, QloraBlock)  # in 8 bits
        size = linear.weight.numel()
        codes = size if self._keeps_input else math.ceil(size / 2)
        stored = torch.int8 if self._keeps_input else self._compute
        content = torch.empty(math.ceil(codes / stored.itemsize), dtype=stored, device="meta")
        self.weight = torch.nn.Parameter(content, requires_grad=False)
        scales = quantised.quantised_bytes(linear.weight.shape, config.method) - codes
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out] in the type of `x`; bitsandbytes and PEFT copy the result once more."""
        shape = (self.out_features, self.in_features)
        out: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(self._compute), self.weight, shape, self._keeps_input
        )
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).clone()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, shape: tuple[int, int], keeps_input: bool
    ) -> torch.Tensor:
        ctx.shape = shape
        ctx.kept = x if keeps_input else weight.view(-1)
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.new_empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.new_empty(ctx.shape, dtype=grads[0].dtype), None, None, None
