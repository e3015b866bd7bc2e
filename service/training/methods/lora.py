"""LoRA (arXiv:2106.09685): a frozen base, and for each target linear an update B A scaled by alpha / r.

PEFT puts the layers in and names the tensors; what is saved is PEFT's own format. A is drawn from the run's seed, B starts
at zero, both are float32 whatever the base is stored in.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from service.config import LoraBlock
from service.errors import ModelError


def apply_lora(model: torch.nn.Module, method: LoraBlock, seed: int) -> PeftModel:
    """Freeze `model` and put LoRA layers into it. Raises ModelError when a target names no linear of the model."""
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    if not isinstance(targets, str):
        _check_targets(model, targets)
    torch.manual_seed(seed)
    # PEFT asks transformers by a name that is about to go; nothing that a user of ours could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    config = LoraConfig(
        r=method.r,
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    wrapped: PeftModel = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write `adapter_model.safetensors` (float32) and `adapter_config.json` as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    trainable = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=trainable)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors")
    config = model.peft_config["default"]
    written: dict[str, Any] = config.to_dict()
    written["base_model_name_or_path"] = base_model
    written["inference_mode"] = True
    written["target_modules"] = sorted(
        config.target_modules
    )  # a set: sorted, so that the same run gives the same bytes
    (directory / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True, default=list))


def _check_targets(model: torch.nn.Module, targets: list[str]) -> None:
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linears)]
    if unmatched:
        known = ", ".join(sorted({name.split(".")[-1] for name in linears}))
        raise ModelError(f"method.targets {unmatched} name no linear layer of the model. Its linear layers: {known}.")
