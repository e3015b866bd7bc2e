"""LoRA (arXiv:2106.09685): a frozen base, and for each target linear an update B A scaled by alpha / r.

PEFT puts the layers in and names the tensors; what is saved is PEFT's own format. A is drawn from the run's seed, B starts
at zero, and all that trains is float32 whatever the base is stored in. Options: rsLoRA's scale alpha / sqrt(r), DoRA's
magnitude for each output, ranks and alphas of their own for some modules, biases. LoRA+ is the optimizer's business.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from service.config import LoraBlock
from service.errors import ModelError
from service.training.methods.parameters import make_float32

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def apply_lora(model: torch.nn.Module, method: LoraBlock, seed: int) -> PeftModel:
    """Freeze `model` and put LoRA layers into it. Raises ModelError when a target or a pattern names no layer of the model."""
    from peft import get_peft_model

    _check_names(model, method)
    torch.manual_seed(seed)
    # PEFT asks transformers by a name that is about to go; nothing that a user of ours could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    wrapped: PeftModel = get_peft_model(model, _peft_config(model, method))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            make_float32(parameter)
    return wrapped


def _peft_config(model: torch.nn.Module, method: LoraBlock) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=method.r,
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets if isinstance(method.targets, str) else list(method.targets),
        exclude_modules=_outside(model)[1],
        bias=method.bias,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        use_dora=method.dora,
        use_rslora=method.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linears are transposed
        task_type="CAUSAL_LM",
    )


def adapter_tensors(model: PeftModel, named: dict[str, Any]) -> dict[str, Any]:
    """What belongs to the adapter out of `named` by parameter name, under the names that PEFT's files have."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, Any] = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    return tensors


def save_adapter(
    model: Any,
    weights: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write `adapter_model.safetensors` (float32) and `adapter_config.json` as PEFT does; the same weights, the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    named = dict(weights)
    tensors = adapter_tensors(model, named)
    assert len(tensors) == len(named), "every trained tensor belongs to the adapter"
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors")
    written: dict[str, Any] = model.peft_config["default"].to_dict()
    written |= {"base_model_name_or_path": base_model, "revision": revision, "inference_mode": True}
    text = json.dumps(written, indent=2, sort_keys=True, default=sorted)  # sorted: PEFT keeps the targets in a set
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def _check_names(model: torch.nn.Module, method: LoraBlock) -> None:
    outside, _ = _outside(model)
    linears = {
        name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
    } - outside
    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers' models have it
    targeted = {name for name in linears if model.get_submodule(name) is not head}
    problems = []
    if not isinstance(method.targets, str):
        unmatched = [t for t in method.targets if not any(_is_named(name, t) for name in linears)]
        problems += [f"method.targets {unmatched} name no linear layer of the model"] if unmatched else []
        targeted = {name for name in linears if any(_is_named(name, t) for t in method.targets)}
    for key, patterns in (("rank_pattern", method.rank_pattern), ("alpha_pattern", method.alpha_pattern)):
        unmatched = [p for p in patterns if not any(re.fullmatch(rf"(.*\.)?({p})", name) for name in targeted)]
        problems += [f"method.{key} {unmatched} matches no linear layer that method.targets names"] if unmatched else []
    if problems:
        known = ", ".join(sorted({name.split(".")[-1] for name in linears}))
        raise ModelError(f"{'; '.join(problems)}. Its linear layers: {known}.")


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _outside(model: Any) -> tuple[set[str], str | None]:
    """Linears that no text goes through (towers for images and sounds, which get no gradient from it), and PEFT's pattern
    that excludes them: whatever is neither inside the text decoder nor the head."""
    names = {id(module): name for name, module in model.named_modules()}
    kept = [
        re.escape(names[id(part)]) for part in (model.get_decoder(), model.get_output_embeddings()) if id(part) in names
    ]
    if "" in kept or not kept:
        return set(), None
    pattern = rf"(?!({'|'.join(kept)})(\.|$)).*"
    linears = (name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    outside = {name for name in linears if re.fullmatch(pattern, name)}
    return outside, pattern if outside else None
