"""A linear with its LoRA as one autograd function: the same products as PEFT's, without what stands between them. Its rows
may belong to several adapters, each with its own share of the batch.

PEFT computes `W x`, `B (A x)`, a scaling and a sum as separate operations, each over all outputs, and under autocast casts
the input of every adapter to float32 and back. Here the scaling is applied to the `r` columns between A and B, and both
products are added in place. Seen on SmolLM2-135M, r=16 on all linears, 512 tokens, bfloat16 on one core: 4 % less time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


Fused = Mapping[str, "_Forward"]  # the linears of a model by name


def fused_linears(model: torch.nn.Module) -> Fused | None:
    """The linears of a model that can compute its sequences beside another adapter's; None where some part of it cannot.

    Every adapter must be fused; no part may draw random numbers, send tokens to different experts, or turn positions by
    the length of the longest sequence.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    fused = {name: module.forward for name, module in adapted.items() if isinstance(module.forward, _Forward)}
    named = dict(model.named_modules())
    draws = any(isinstance(module, torch.nn.Dropout) and module.p for module in named.values())
    experts = any("expert" in name for name in named)
    if not fused or len(fused) < len(adapted) or draws or experts or _is_particular(model):
        return None
    return fused


def _is_particular(model: Any) -> bool:
    """Whether the config has any dropout, under whatever name, or positions that depend on the batch."""
    config = model.get_base_model().config
    values = config.to_dict() | config.get_text_config().to_dict()
    drops = any("drop" in key and isinstance(value, (int, float)) and value for key, value in values.items())
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return drops or any(kind in json.dumps(rope, default=str) for kind in ("longrope", "dynamic"))


@contextmanager
def beside(models: Sequence[tuple[Fused, int]]) -> Iterator[None]:
    """Inside, the first of these models computes a batch for all: so many sequences of each, one model's after the other's."""
    first, _ = models[0]
    for name, forward in first.items():
        forward.shares = [(fused[name], sequences) for fused, sequences in models]
    try:
        yield
    finally:
        for forward in first.values():
            forward.shares = None


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
        self.shares: list[tuple[_Forward, int]] | None = None  # whose sequences the input holds, if not all its own
        self._module, self._own = module, module.forward
        (self._name,) = module.lora_A

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self._module
        if self.plain or module.disable_adapters or module.merged or args or kwargs:
            own: torch.Tensor = self._own(x, *args, **kwargs)
            return own
        base = module.base_layer
        num_tokens = x.numel() // x.shape[-1]
        shares = self.shares or [(self, 1)]
        each, rest = divmod(num_tokens, sum(sequences for _, sequences in shares))
        assert not rest, f"{num_tokens} tokens are not those of {len(shares)} adapters' sequences"
        adapters = [forward.adapter for forward, _ in shares]
        scales = [forward.scale for forward, _ in shares]
        sizes = [sequences * each for _, sequences in shares]
        y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, sizes, scales, *(weight for pair in adapters for weight in pair)
        )
        return y

    @property
    def adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [O, R]."""
        return self._module.lora_A[self._name].weight, self._module.lora_B[self._name].weight

    @property
    def scale(self) -> float:
        """alpha / r, or as rsLoRA has it."""
        return float(self._module.scaling[self._name])


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + s B (A x) in the dtype of W; gradients for x, A and B. N tokens, I inputs, O outputs, R the rank.

    The first `sizes[0]` tokens go through the first adapter, the next `sizes[1]` through the second: `scales` and
    `adapters` (A, B, A, B, ...) have one each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        sizes: list[int],
        scales: list[float],
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        dtype = weight_OI.dtype
        hidden = []
        with torch.autocast(x.device.type, enabled=False):
            x_NI, lower = x.reshape(-1, x.shape[-1]).to(dtype), [weight.to(dtype) for weight in adapters]
            y_NO = torch.mm(x_NI, weight_OI.T) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
            for x_part, y_part, a, b, scale in zip(
                torch.split(x_NI, sizes), torch.split(y_NO, sizes), lower[::2], lower[1::2], scales, strict=True
            ):
                h_NR = torch.mm(x_part, a.T).mul_(scale)
                y_part.addmm_(h_NR, b.T)
                hidden.append(h_NR)
        ctx.save_for_backward(x_NI, weight_OI, *lower, *hidden)
        ctx.sizes, ctx.scales = sizes, scales
        ctx.shape, ctx.dtype, ctx.kept = x.shape, x.dtype, adapters[0].dtype
        return y_NO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_NI, weight_OI, *others = ctx.saved_tensors
        num = len(ctx.sizes)
        lower, hidden = others[: 2 * num], others[2 * num :]
        dy_NO = grads[0].reshape(-1, grads[0].shape[-1])
        dx_NI = torch.mm(dy_NO, weight_OI) if ctx.needs_input_grad[0] else None
        dx_parts = [None] * num if dx_NI is None else torch.split(dx_NI, ctx.sizes)
        found: list[torch.Tensor] = []
        for x_part, dy_part, dx_part, a, b, h_NR, scale in zip(
            *(
                torch.split(x_NI, ctx.sizes),
                torch.split(dy_NO, ctx.sizes),
                dx_parts,
                lower[::2],
                lower[1::2],
                hidden,
                ctx.scales,
            ),
            strict=True,
        ):
            dh_NR = torch.mm(dy_part, b).mul_(scale)
            if dx_part is not None:
                dx_part.addmm_(dh_NR, a)
            found += [torch.mm(dh_NR.T, x_part).to(ctx.kept), torch.mm(dy_part.T, h_NR).to(ctx.kept)]
        dx = None if dx_NI is None else dx_NI.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None, *found
