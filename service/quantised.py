"""Loading a base in 4 or 8 bits by bitsandbytes: the same for the trainer, the gate that checks it, and the engine that serves.

4 bits are NormalFloat (arXiv:2305.14314), 8 bits LLM.int8 (arXiv:2208.07339). What a trainer does beyond that is in
`training/methods/quantised.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from service.domain import BaseBits
from service.errors import ConfigError

# It warns of every cast at every product, and of an optional package whenever PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def loading_options(bits: BaseBits, compute: torch.dtype, *, double_quant: bool, alone: bool = False) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise as it loads; {} for 16 bits. ConfigError where bitsandbytes is missing.

    LLM.int8 treats the columns in which any row of a batch has an outlier apart. `alone` leaves that out: a row's result
    does not depend on the batch then, and outliers are rounded like the rest.
    """
    if bits == 16:
        return {}
    try:
        import bitsandbytes  # noqa: F401 - whether it can be loaded is the question
    except ImportError:
        raise ConfigError(
            f"a base in {bits} bits needs bitsandbytes, which is not installed. Run: pip install 'loray[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0 if alone else 6.0)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # a float type, which ZeRO can partition and bytes it could not
    )
    return {"quantization_config": config}


def keep_unpacked(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a faster forward on processors with AVX512-BF16.

    It computes otherwise: log-probabilities of SmolLM2-135M were seen to move by up to 0.38 nats, so the gate and the engine
    would not have the trainer's numbers. The merge needs the weights as they were loaded. And a trainer loses its gradient,
    without an error, from the first forward in evaluation mode on: after one evaluation its norm fell from 1.43 to 0.54.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
