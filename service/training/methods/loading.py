"""A base model from its directory, exactly: no remote code, no download, and no tensor too few or too many.

What a checkpoint lacks, transformers would fill with random numbers and a warning. So the names and shapes are compared first, on
the meta device, which reads no weight and so costs nothing next to the loading; on every worker alike, so that all of
them stop. Under ZeRO-3 this is the only look: there transformers reports neither what is left over nor what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from service.config import FullBlock, RunConfig
from service.errors import LorayError, ModelError
from service.quantised import keep_unpacked
from service.training.methods import quantised

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of frozen weights, by precision

_LOCAL = {"trust_remote_code": False, "local_files_only": True}


def load_base(path: Path, config: RunConfig, device: torch.device) -> Any:
    """The causal language model in `path`, as transformers has it; float32 for `full`, else as `precision` stores it.

    Raises ModelError with all the tensors that are missing, left over or of another shape.
    """
    dtype = torch.float32 if isinstance(config.method, FullBlock) else STORAGE[config.precision]
    with _as_model_error(path):
        architecture = AutoConfig.from_pretrained(path, **_LOCAL)
        _refuse_quantised(architecture, path)
        bones = _check_weights(path)
        # Under ZeRO-3 each weight goes where its shard belongs, and transformers takes no device.
        placed = {} if transformers_deepspeed.is_deepspeed_zero3_enabled() else {"device_map": {"": device}}
        model, info = _from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=_attention(bones, device, STORAGE[config.precision]),
            **quantised.loading_options(config.method, dtype, device),
            **placed,
        )
        _demand_exact(info, path)
    keep_unpacked(model)
    return model


def meta_base(path: Path) -> Any:
    """The architecture in `path` on the meta device. Raises ModelError for what transformers does not know."""
    with _as_model_error(path):
        architecture = AutoConfig.from_pretrained(path, **_LOCAL)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)


def _check_weights(path: Path) -> Any:
    """The model without its weights, once their names and shapes are known to be right."""
    with _without_zero3():
        bones, info = _from_pretrained(path, device_map={"": "meta"}, ignore_mismatched_sizes=True)
    _demand_exact(info, path)
    return bones


def _from_pretrained(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    transformers_logging.disable_progress_bar()  # one line for each tensor in a worker's log
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn of is raised here
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **_LOCAL, **options)
        return model, info
    finally:
        transformers_logging.set_verbosity(before)


def _demand_exact(info: Mapping[str, Any], path: Path) -> None:
    problems = [
        f"{len(info[key])} {what}: {', '.join(sorted(map(_shown, info[key]))[:8])}"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "left over"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "not readable"),
        )
        if info[key]
    ]
    if problems:
        raise ModelError(
            f"the weights in {path} are not those of its config.json. Tensors {'; '.join(problems)}. Save model and "
            "configuration together with transformers' save_pretrained."
        )


def _shown(key: Any) -> str:
    """A tensor's name; for one that does not fit also its shape in the file and in the model."""
    if isinstance(key, tuple):
        name, *shapes = key
        return f"{name} {' instead of '.join(str(list(shape)) for shape in shapes)}"
    return str(key)


def _refuse_quantised(architecture: Any, path: Path) -> None:
    stored = getattr(architecture, "quantization_config", None)
    if stored is not None:
        how = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", stored)
        raise ModelError(
            f"the base model in {path} is stored quantised ({how}), and training starts from unquantised weights. Name "
            "the original model; method qlora, or base_bits 8, quantises it as it loads."
        )


def _attention(bones: Any, device: torch.device, compute: torch.dtype) -> str | None:
    """FlashAttention 2 on CUDA where it is installed and can be used; else transformers' choice, SDPA where it can be had."""
    usable = device.type == "cuda" and compute is not torch.float32 and bones._supports_flash_attn
    return "flash_attention_2" if usable and is_flash_attn_2_available() else None


@contextmanager
def _without_zero3() -> Iterator[None]:
    """transformers as if no ZeRO-3 configuration had been announced to it."""
    announced = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = announced


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    """What transformers and safetensors raise about a directory's content, as a ModelError that names it."""
    try:
        yield
    except LorayError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path} holds no causal language model that transformers can load: {error}") from error
