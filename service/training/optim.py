"""The optimizer and its learning rate: what is stepped and decayed, at which rate, and state that goes on bit for bit.

Three optimizers. `adamw` keeps two float32 moments a weight, 8 bytes. `adamw8bit` (bitsandbytes, arXiv:2110.02861) keeps
them in 8 bits with one float32 scale for each block of 256; tensors below 4,096 elements stay in float32, as bitsandbytes has it.
`adafactor` (arXiv:1804.04235) keeps the sums over rows and columns of the second moment only. It is
transformers' Adafactor with parameter scaling and its own schedule off, so that `optim.lr` means what it means for AdamW; PyTorch's
cannot switch the scaling off, and scaled by its own size a LoRA B, which starts at zero, would hardly ever move.

Schedules are closed forms of the step, so that a resumed run needs no state for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from service.config import FullBlock, LoraBlock, OptimBlock
from service.errors import ConfigError

COSINE_FLOOR = 0.1  # the cosine ends at a tenth of its peak, as in Chinchilla (arXiv:2203.15556, appendix B)
BETAS = (0.9, 0.999)
EPS = 1e-8
SMALLEST_8BIT = 4096  # elements; bitsandbytes' `min_8bit_size`
BLOCK_8BIT = 256  # elements that share a scale
FLOAT32 = 4
_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # what each of the 256 codes of a moment stands for


def warmup_steps(warmup: int | str, num_steps: int) -> int:
    """Steps from `10%`, rounded up, or from a number of steps."""
    if isinstance(warmup, int):
        return warmup
    return math.ceil(num_steps * float(warmup.rstrip("% ")) / 100)


def lr_at(step: int, num_steps: int, optim: OptimBlock) -> float:
    """The rate of a step counted from 0: linear warm-up to `optim.lr`, reached at the last warm-up step, then the schedule."""
    warm = warmup_steps(optim.warmup, num_steps)
    if step < warm:
        return optim.lr * (step + 1) / warm
    if optim.schedule == "wsd":
        decay = min(warmup_steps(optim.decay, num_steps), num_steps - warm)
        return optim.lr * _wsd_decay(step, num_steps, decay)
    progress = (step - warm) / max(1, num_steps - warm)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "linear":
        return optim.lr * (1 - progress)
    return optim.lr * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def _wsd_decay(step: int, num_steps: int, decay: int) -> float:
    """1 while stable, then 1 - sqrt(progress) towards 0 over the last `decay` steps.

    Warm-up, stable and decay are arXiv:2404.06395, section 4. Its decay has a half-life in steps, which means nothing
    for runs of other lengths; the shape here is the best of those compared in arXiv:2405.18392.
    """
    past = step - (num_steps - decay)
    return 1.0 if past <= 0 else 1.0 - math.sqrt(past / decay)


def build_optimizer(
    named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimBlock, method: FullBlock | LoraBlock
) -> torch.optim.Optimizer:
    """The optimizer of `optim.name`. Matrices decay, embeddings among them; norms, biases and DoRA's magnitudes do not.

    Under LoRA+ (arXiv:2402.12354) the groups of B matrices carry `lr_factor`, which `set_lr` multiplies in. Raises
    ConfigError where the package for `adamw8bit` is missing.
    """
    ratio = method.lora_plus_ratio if isinstance(method, LoraBlock) else 1.0
    groups = _groups(named, optim, ratio)
    if optim.name == "adafactor":
        return _adafactor(groups, optim)
    if optim.name == "adamw8bit":
        return _adamw8bit(groups, optim)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=BETAS, eps=EPS)


def _groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimBlock, lora_plus_ratio: float
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty vector in a matrix's place
        decay = optim.weight_decay if len(shape) >= 2 else 0.0
        factor = lora_plus_ratio if ".lora_B." in name else 1.0
        groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": optim.lr * factor, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def _adafactor(groups: list[dict[str, Any]], optim: OptimBlock) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer: torch.optim.Optimizer = Adafactor(groups, lr=optim.lr, **options)
    return optimizer


def _adamw8bit(groups: list[dict[str, Any]], optim: OptimBlock) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optim.name adamw8bit needs bitsandbytes, which is not installed. Run: pip install 'loray[quant]', or take "
            "adafactor."
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=optim.lr, betas=BETAS, eps=EPS, min_8bit_size=SMALLEST_8BIT)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, in every group times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The optimizer's state of one parameter, on the CPU, in its own types; {} before the first step.

    A count is a scalar tensor. On the CPU the moments are the optimizer's own: copy them before it steps on.
    """
    return dict(_moments(optimizer, optimizer.state.get(parameter, {})))


def _moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if name == "RMS":  # Adafactor's note of the weight's size: computed anew before it is read
            continue
        if name in _MAPS:  # one tensor for all parameters, which safetensors would refuse to write twice
            yield name, value.detach().cpu().clone()
        else:
            yield name, value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value)


def restore_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, moments: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `moments`, in place of what the optimizer holds for this parameter. Copies."""
    state = {name: _restored(optimizer, name, value, parameter.device) for name, value in moments.items()}
    optimizer.state.pop(parameter, None)
    if state:
        optimizer.state[parameter] = state


def _restored(
    optimizer: torch.optim.Optimizer, name: str, value: torch.Tensor, device: torch.device
) -> torch.Tensor | int:
    """AdamW counts its steps in a float tensor on the CPU, the other two in Python's integers."""
    if name == "step":
        return value.clone() if value.is_floating_point() else int(value)
    if name in _MAPS:
        known: dict[str, torch.Tensor] = getattr(optimizer, "name2qmap")  # noqa: B009 - not an attribute of the base class
        shared = known[_MAPS[name]] = known[_MAPS[name]].to(device)
        if torch.equal(shared.cpu(), value):
            return shared
    return value.to(device, copy=True)


def state_bytes(shape: Sequence[int], name: str) -> int:
    """Bytes of the moments of one parameter of this shape under the optimizer `name`, as soon as it has stepped."""
    size = math.prod(shape)
    if name == "adafactor" and len(shape) >= 2:
        return FLOAT32 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])
    if name == "adafactor":
        return FLOAT32 * size
    if name == "adamw8bit" and size >= SMALLEST_8BIT:
        return 2 * size + 2 * FLOAT32 * math.ceil(size / BLOCK_8BIT)
    return 2 * FLOAT32 * size
