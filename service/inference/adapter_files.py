"""Reading an adapter in PEFT's format, and every reason to refuse it, before anything that serves is touched.

Reads `adapter_config.json` and `adapter_model.safetensors`, nothing else (no pickle). Served is plain LoRA on linear
layers: any rank, rsLoRA, rank and alpha patterns. What is not understood is refused, never ignored. Pure but for the
reading: `lora_bank.py` takes the result in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from service.errors import ModelError

_PREFIX = "base_model.model."
_SHOWN = 6  # problems of one kind that are spelled out
# PEFT reads module names as regular expressions. Here they are text: an expression from a stranger's adapter can take
# for ever to match, and an endpoint would meet it again after each restart.
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_REMEDY = {
    "use_dora": "DoRA cannot share a batch; train with plain LoRA",
    "modules_to_save": "whole modules cannot be swapped per request; train without modules_to_save",
    "bias": "biases cannot be swapped per request; train with bias: none",
}
# What says how the adapter was trained or where it goes, read below or without effect on the forward.
_KEYS_READ = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "peft_type",
        "task_type",
        "init_lora_weights",
        "bias",
    }
)
_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "megatron_core",
        "ensure_weight_tying",
    }
)


@dataclass(frozen=True)
class LoraTensors:
    """What one linear layer gets. `a_RI` as stored, `b_RO` transposed with the scale folded in, in the served dtype."""

    a_RI: torch.Tensor
    b_RO: torch.Tensor


def read_adapter(
    directory: Path, shapes: Mapping[str, tuple[int, int]], max_rank: int, dtype: torch.dtype
) -> dict[str, LoraTensors]:
    """The adapter's tensors by module name, or ModelError with all problems at once.

    `shapes` gives (in_features, out_features) of every module that can carry LoRA.
    """
    config, problems = _read_config(directory)
    stored, file_problems = _read_tensors(directory)
    problems += file_problems + _config_problems(config)
    if not problems:
        pairs, problems = _paired(stored, shapes)
        problems += _missing(config, pairs, shapes)
        tensors = {name: _folded(config, name, a, b, dtype) for name, (a, b) in pairs.items()}
        problems += _value_problems(config, pairs, tensors, shapes, max_rank)
    if problems:
        raise ModelError(f"adapter {directory} cannot be served:\n" + "\n".join(problems))
    return tensors


def declared_rank(directory: Path) -> int:
    """The largest rank that its config gives any module. ModelError with all that is wrong with the config."""
    config, problems = _read_config(directory)
    problems += _config_problems(config)
    if problems:
        raise ModelError(f"adapter {directory} cannot be served:\n" + "\n".join(problems))
    return max(int(rank) for rank in (config["r"], *(config.get("rank_pattern") or {}).values()))


def _read_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{path.name} is missing: give a directory written by PEFT's save_pretrained."]
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} cannot be read: {error}"]
    return (config, []) if isinstance(config, dict) else ({}, [f"{path.name} is no JSON object."])


def _read_tensors(directory: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    path = directory / "adapter_model.safetensors"
    if not path.exists():
        other = sorted(file.name for file in directory.glob("adapter_model*"))
        return {}, [f"{path.name} is missing (found: {', '.join(other) or 'nothing'}): only safetensors are loaded."]
    try:
        return load_file(path), []
    except (OSError, SafetensorError) as error:
        return {}, [f"{path.name} is not safetensors: {error}"]


def _config_problems(config: dict[str, Any]) -> list[str]:
    if not config:
        return []
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}: only LORA is served.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {config['task_type']!r}: only CAUSAL_LM is served.")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: {_REMEDY['bias']}.")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights too: "
            "convert it to plain LoRA when saving (PEFT: path_initial_model_for_weight_conversion)."
        )
    for key in sorted(set(config) - _KEYS_READ - _KEYS_WITHOUT_EFFECT):
        if config[key]:
            remedy = _REMEDY.get(key, "it is not served; train without it")
            problems.append(f"{key} is {json.dumps(config[key], default=str)[:80]}: {remedy}.")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            problems.append(f"{key} is {value!r}: a positive number is wanted.")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > 0
            for v in pattern.values()
        ):
            problems.append(f"{key} is {pattern!r}: a mapping from module names to positive numbers is wanted.")
        else:
            problems += _not_literal(key, pattern)
    targets = config.get("target_modules")
    if not isinstance(targets, str | list | None):
        problems.append(f"target_modules is {str(targets)[:80]}: a list of module names is wanted.")
    else:
        problems += _not_literal("target_modules", targets.split("|") if isinstance(targets, str) else targets or ())
    return problems


def _not_literal(key: str, names: Iterable[Any]) -> list[str]:
    strange = [name for name in names if not isinstance(name, str) or not _LITERAL.fullmatch(name)]
    return _some(
        [
            f"{key} holds {str(name)[:80]!r}: module names of letters, digits, '_', '.' and '-' are served, not regular "
            "expressions. Write the names out, as PEFT does when it saves a list of target_modules."
            for name in strange
        ]
    )


def _paired(
    stored: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[str]]:
    """The (A, B) of every module that has both and can carry LoRA, and what is wrong with the rest."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    strange, unknown, single = [], [], []
    for key, tensor in stored.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            strange.append(f"tensor {key} is no LoRA matrix of a linear layer; it cannot be served per request.")
    for name, half in halves.items():
        if name not in shapes:
            unknown.append(f"module {name}: the base model has no such linear layer that can carry an adapter.")
        elif len(half) < 2:
            single.append(f"module {name} has lora_{next(iter(half))} only; both matrices are wanted.")
    pairs = {name: (half["A"], half["B"]) for name, half in halves.items() if name in shapes and len(half) == 2}
    empty = [] if stored else ["adapter_model.safetensors holds no tensors: the adapter is empty."]
    return pairs, empty + _some(strange) + _some(unknown) + _some(single)


def _missing(config: dict[str, Any], pairs: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Modules that the config targets and that have no tensors: the adapter was saved incompletely."""
    targets = config.get("target_modules")
    if not targets or any(config.get(key) is not None for key in ("layers_to_transform", "layers_pattern")):
        return []
    if isinstance(targets, str):  # PEFT matches a string against the whole name
        targeted = [name for name in shapes if name in targets.split("|")]
    else:
        targeted = [name for name in shapes if any(_ends_with(name, target) for target in targets)]
    if not config.get("exclude_modules"):
        return _some([f"module {name} is targeted, but has no tensors." for name in targeted if name not in pairs])
    return []


def _value_problems(
    config: dict[str, Any],
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    tensors: Mapping[str, LoraTensors],
    shapes: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> list[str]:
    shape_problems, type_problems, value_problems, rank_problems = [], [], [], []
    for name, (a, b) in pairs.items():
        rank, (in_features, out_features) = _rank(config, name), shapes[name]
        wanted = ((rank, in_features), (out_features, rank))
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            shape_problems.append(
                f"module {name}: A is {list(a.shape)} and B {list(b.shape)}, wanted {list(wanted[0])} and {list(wanted[1])}."
            )
        if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
            type_problems.append(
                f"module {name}: dtypes {a.dtype}, {b.dtype}; float32, bfloat16 or float16 are wanted."
            )
        elif not (tensors[name].a_RI.isfinite().all() and tensors[name].b_RO.isfinite().all()):
            value_problems.append(
                f"module {name} holds NaN or infinite numbers (after scaling by {_scale(config, name):g})."
            )
        if rank > max_rank:
            rank_problems.append(f"module {name} has rank {rank}, this engine holds at most {max_rank} columns.")
    return _some(shape_problems) + _some(type_problems) + _some(value_problems) + _some(rank_problems)


def _folded(config: dict[str, Any], name: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> LoraTensors:
    """The scale goes into B in float32, then both are cast."""
    scaled = (b.float() * _scale(config, name)).transpose(0, -1) if b.dim() else b
    return LoraTensors(a.to(dtype).contiguous(), scaled.to(dtype).contiguous())


def _rank(config: dict[str, Any], name: str) -> int:
    return int(_by_pattern(config.get("rank_pattern") or {}, name, config["r"]))


def _scale(config: dict[str, Any], name: str) -> float:
    """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, theorem 3.2)."""
    rank, alpha = _rank(config, name), float(_by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first key that matches the end of the module's name (peft/utils/other.py, get_pattern_key)."""
    return next((value for key, value in pattern.items() if _ends_with(name, key)), default)


def _ends_with(name: str, suffix: str) -> bool:
    """Whether the last whole parts of a module's name are `suffix`."""
    return name == suffix or name.endswith(f".{suffix}")


def _some(problems: list[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"... and {more} more of this kind."] if more > 0 else problems
