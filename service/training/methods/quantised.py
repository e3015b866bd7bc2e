"""Frozen bases in fewer bits, by bitsandbytes: 4-bit NormalFloat for QLoRA (arXiv:2305.14314), int8 for `base_bits: 8`.

Only linear layers are quantised, and of these not the language-model head; embeddings and norms stay as `precision`
stores them. On a CPU both run and train: the weights are turned back to the compute type for every product, which saves
memory and no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from service import quantised
from service.config import FullBlock, LoraBlock, QloraBlock
from service.errors import ConfigError

BLOCK = 64  # weights that share a scale, QLoRA section 3
NESTED_BLOCK = 256  # scales that share a scale of their own, double quantisation


def loading_options(method: FullBlock | LoraBlock, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise as it loads; {} for a base that is not quantised.

    Raises ConfigError where bitsandbytes is missing, or cannot do what the method asks for.
    """
    if isinstance(method, FullBlock) or method.base_bits == 16:
        return {}
    _refuse_what_does_not_work(method, device)
    _demand_bitsandbytes(method)
    double_quant = isinstance(method, QloraBlock) and method.double_quant
    return quantised.loading_options(method.base_bits, compute, double_quant=double_quant)


def _refuse_what_does_not_work(method: LoraBlock, device: torch.device) -> None:
    problems = []
    if method.bias != "none":
        problems.append(
            f"method.bias {method.bias!r} with a base in {method.base_bits} bits: bitsandbytes keeps biases in the compute "
            "type, so they cannot be trained in float32. Set method.bias: none, or method {type: lora, base_bits: 16}."
        )
    if method.dora and method.base_bits == 8 and device.type == "cpu":
        problems.append(
            "method.dora with base_bits 8 on a CPU: there PEFT loses the scales of int8 weights in the first forward. Take "
            "base_bits: 16, or method {type: qlora, dora: true}."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _demand_bitsandbytes(method: LoraBlock) -> None:
    try:
        import bitsandbytes  # noqa: F401 - whether it can be loaded is the question
    except ImportError:
        raise ConfigError(
            f"a base in {method.base_bits} bits needs bitsandbytes, which is not installed. Run: pip install "
            "'loray[quant]', or take method {type: lora, base_bits: 16}."
        ) from None


def quantised_weights(model: Any, method: FullBlock | LoraBlock) -> set[int]:
    """The ids of the parameters of a `skeleton` that would be loaded quantised."""
    if isinstance(method, FullBlock) or method.base_bits == 16:
        return set()
    base = model.get_base_model()
    head = base.get_output_embeddings()
    return {
        id(module.weight)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and ".lora_" not in name
    }


def quantised_bytes(shape: Sequence[int], method: FullBlock | LoraBlock) -> int:
    """Bytes of a weight [out, in] in the method's bits, scales included; QLoRA's two code books, 1 KB a linear, are not."""
    size = math.prod(shape)
    if isinstance(method, QloraBlock):
        blocks = math.ceil(size / BLOCK)
        scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) if method.double_quant else 4 * blocks
        return math.ceil(size / 2) + scales
    return size + 4 * shape[0]
