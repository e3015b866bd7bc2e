"""The language-model head and its cross-entropy, on supervised positions only and in chunks.

Logits [N, V] never stand in memory at once: each chunk's gradient is taken on the way forward, d loss / d logits = p - y,
and only those of the hidden states [N, D] and of the weight [V, D] are kept. Which positions are supervised, and whether
a model may go this road at all, is `sft.py`'s business. N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

# Positions whose logits stand in memory at once. On a CPU, 256 x 49,152 was 10 % faster than 1024; on a GPU fewer than
# 1024 would read the weight more often than the multiplication hides. 1024 x 49,152 float32 is 200 MB.
CHUNK = {"cpu": 256, "cuda": 1024}
FP16_BOOST = 1024.0  # fp16 has no number below 6e-8: p - y is kept this much larger, and up to 64 in the gradient


@dataclass(frozen=True)
class LogitShape:
    """What a head does after its product with the weight: logits * scale, then cap * tanh(logits / cap); cap 0 is none."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> LogitShape:
        """As the family's config says: `logit_scale` (Cohere), `logits_scaling` (Granite), soft-capping (Gemma 2)."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(float(scale), float(getattr(config, "final_logit_softcapping", None) or 0.0))


class Head(torch.nn.Module):
    """A causal model's head: it holds the model's own weight, so that ZeRO-3 gathers it when this module is called."""

    def __init__(self, weight_VD: torch.nn.Parameter, shape: LogitShape) -> None:
        super().__init__()
        self.weight = weight_VD
        self.shape = shape

    def forward(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, summed: bool) -> torch.Tensor:
        """The summed loss in nats, with gradient; or, not `summed`, log p of each target, [N] float32, without."""
        dtype = compute_dtype(self.weight)
        if summed:
            loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden_ND, self.weight, targets_N, self.shape, dtype
            )
            return loss
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = self.weight.to(dtype)
            log_p = [
                _log_softmax(hidden.to(dtype), weight_VD, self.shape)[0].gather(1, targets[:, None])[:, 0]
                for hidden, targets in _chunks(hidden_ND, targets_N)
            ]
            return torch.cat(log_p)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a product with `weight` is computed in: autocast's dtype where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _chunks(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    size = CHUNK.get(hidden_ND.device.type, CHUNK["cuda"])
    return zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True)


def _log_softmax(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, shape: LogitShape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p [C, V] in float32, and where logits are capped, the cap's slope [C, V]."""
    logits = functional.linear(hidden_CD, weight_VD)
    if not shape.cap and shape.scale == 1.0:
        return logits.log_softmax(dim=-1, dtype=torch.float32), None
    logits = logits.float().mul_(shape.scale)
    if not shape.cap:
        return logits.log_softmax(dim=-1), None
    logits = logits.div_(shape.cap).tanh_()
    slope = 1.0 - logits.square()
    return logits.mul_(shape.cap).log_softmax(dim=-1), slope


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is that of the dense computation; the weight is used forwards only, when ZeRO-3 has it whole."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        shape: LogitShape,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.boost = FP16_BOOST if dtype == torch.float16 else 1.0
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grads: list[torch.Tensor] = []
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_low = weight_VD.to(dtype)
            for hidden, targets in _chunks(hidden_ND, targets_N):
                hidden_low, targets_C1 = hidden.to(dtype), targets[:, None]
                log_p, cap_slope = _log_softmax(hidden_low, weight_low, shape)
                loss -= log_p.gather(1, targets_C1).sum()
                slope = log_p.exp_().scatter_add_(1, targets_C1, log_p.new_full(targets_C1.shape, -1.0))
                if cap_slope is not None:
                    slope.mul_(cap_slope)
                if shape.scale * ctx.boost != 1.0:
                    slope.mul_(shape.scale * ctx.boost)
                slope_low = slope.to(dtype)
                if needs_hidden:
                    grads.append(slope_low @ weight_low)
                if grad_weight is not None:
                    grad_weight += slope_low.T @ hidden_low
        grad_hidden = (torch.cat(grads) if grads else torch.zeros_like(hidden_ND)) if needs_hidden else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        factor = grads[0].float() / ctx.boost  # in float32: rounded to bfloat16 it would scale all gradients by 0.4 %
        grad_hidden, grad_weight = (
            None if grad is None else (grad.float() * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden, grad_weight, None, None, None
