"""A linear with its LoRA as one autograd function: the same products as PEFT's, without what stands between them.

PEFT computes `W x`, `B (A x)`, a scaling and a sum as separate operations, each over all outputs, and under autocast casts
the input of every adapter to float32 and back. Here the scaling is applied to the `r` columns between A and B, and both
products are added in place. Seen on SmolLM2-135M, r=16 on all linears, 512 tokens, bfloat16 on one core: 4 % less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def fuse(model: torch.nn.Module) -> int:
    """Switch every plain LoRA linear of a PEFT model over; how many. Options that change the product keep PEFT's own road.

    Not under ZeRO-3: there a weight is whole only inside the module that owns it.
    """
    from peft.tuners.lora.layer import Linear

    plain = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for module in plain:
        module.forward = _Forward(module)
    return len(plain)


@contextmanager
def plainly(model: torch.nn.Module) -> Iterator[None]:
    """Inside, everything is computed by PEFT's own road, as whoever loads the saved adapter will."""
    switched = [module.forward for module in model.modules() if isinstance(module.forward, _Forward)]
    for forward in switched:
        forward.plain = True
    try:
        yield
    finally:
        for forward in switched:
            forward.plain = False


def _is_plain(module: Any) -> bool:
    (name, *others) = module.lora_A
    return (
        not others
        and type(module.base_layer) is torch.nn.Linear
        and not any(p.requires_grad for p in module.base_layer.parameters())  # a bias that trains needs a gradient
        and type(module.lora_dropout[name]) is torch.nn.Identity
        and not module.use_dora.get(name)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
    )


class _Forward:
    """In place of the module's own `forward`, which remains for what PEFT can do beyond training: disabling and merging."""

    def __init__(self, module: Any) -> None:
        self.plain = False
        self._module, self._own = module, module.forward
        (self._name,) = module.lora_A

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module, name = self._module, self._name
        if self.plain or module.disable_adapters or module.merged or args or kwargs:
            own: torch.Tensor = self._own(x, *args, **kwargs)
            return own
        base = module.base_layer
        y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
        )
        return y


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + s B (A x) in the dtype of W; gradients for x, A and B. N tokens, I inputs, O outputs, R the rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        dtype = weight_OI.dtype
        with torch.autocast(x.device.type, enabled=False):
            x_NI, a, b = x.reshape(-1, x.shape[-1]).to(dtype), a_RI.to(dtype), b_OR.to(dtype)
            h_NR = torch.mm(x_NI, a.T).mul_(scale)
            y_NO = torch.mm(x_NI, weight_OI.T) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
            y_NO.addmm_(h_NR, b.T)
        ctx.save_for_backward(x_NI, weight_OI, a, b, h_NR)
        ctx.scale, ctx.shape, ctx.dtype, ctx.kept = scale, x.shape, x.dtype, a_RI.dtype
        return y_NO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_NI, weight_OI, a, b, h_NR = ctx.saved_tensors
        dy_NO = grads[0].reshape(-1, grads[0].shape[-1])
        dh_NR = torch.mm(dy_NO, b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_NO, weight_OI).addmm_(dh_NR, a).view(ctx.shape).to(ctx.dtype)
        da, db = torch.mm(dh_NR.T, x_NI).to(ctx.kept), torch.mm(dy_NO.T, h_NR).to(ctx.kept)
        return dx, None, None, da, db, None
