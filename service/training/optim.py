"""The optimizer and its learning rate: AdamW, and schedules as closed forms of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from service.config import OptimBlock

COSINE_FLOOR = 0.1  # the cosine ends at a tenth of its peak, as in Chinchilla (arXiv:2203.15556, appendix B)


def warmup_steps(warmup: int | str, num_steps: int) -> int:
    """Steps of warm-up from `10%` or a number of steps."""
    if isinstance(warmup, int):
        return warmup
    return math.ceil(num_steps * float(warmup.rstrip("% ")) / 100)


def lr_at(step: int, num_steps: int, optim: OptimBlock) -> float:
    """The rate of a step counted from 0: linear warm-up to `optim.lr`, reached at the last warm-up step, then the schedule."""
    warm = warmup_steps(optim.warmup, num_steps)
    if step < warm:
        return optim.lr * (step + 1) / warm
    progress = (step - warm) / max(1, num_steps - warm)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "linear":
        return optim.lr * (1 - progress)
    return optim.lr * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_adamw(named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimBlock) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: never on norms and biases."""
    named = list(named)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(0.9, 0.999), eps=1e-8)


def moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The optimizer's float32 state as `<parameter>/<moment>`, independent of parameter order."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in named:
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{moment}"] = value.detach().cpu()
    return state


def restore_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]], state: dict[str, torch.Tensor]
) -> None:
    """The inverse of `moments`. AdamW keeps its step count on the CPU, its moments beside the parameter."""
    for name, parameter in named:
        prefix = f"{name}/"
        for key in [key for key in state if key.startswith(prefix)]:
            moment = key.removeprefix(prefix)
            value = state[key].clone()
            optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter.device)
