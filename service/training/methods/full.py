"""Full fine-tuning: every weight of the base moves, and the result is a model of its own in transformers' format.

Saved as the base was: under its tensor names, tied weights once, in the storage type of `precision`, in shards of at
most 4 GB with an index. One shard is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from service.errors import ModelError
from service.publishable import REGISTRY_FILES
from service.training.methods.parameters import make_float32

SHARD_BYTES = 4_000_000_000
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
_NOT_COPIED = ("*.index.json", "config.json", *REGISTRY_FILES)  # written anew, here or when it is published

Tensors = dict[str, torch.Tensor]


def train_everything(model: Any) -> torch.nn.Module:
    """Every parameter trainable and float32. Tied weights are one parameter and stay so."""
    trained: torch.nn.Module = model
    for parameter in trained.parameters():
        make_float32(parameter)
        parameter.requires_grad = True
    return trained


def save_full(
    model: Any,
    weights: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model that AutoModelForCausalLM and AutoTokenizer load from `directory` alone.

    Tokenizer, generation settings and configuration are copied from where the base was loaded; ModelError if that is gone.
    """
    base = Path(model.config.name_or_path)
    if not (base / "config.json").is_file():
        raise ModelError(
            f"the base model's files are no longer in {base}, and the saved model needs its configuration and tokenizer. "
            "Put them back, then resume the run: it goes on from its last checkpoint."
        )
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(file for pattern in _BESIDE_WEIGHTS for file in base.glob(pattern)):
        if not any(file.match(pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(file, directory / file.name)
    _write_config(base, directory, dtype)
    _write_shards(_under_stored_names(model, weights, dtype), directory, shard_bytes)


def _write_config(base: Path, directory: Path, dtype: torch.dtype) -> None:
    """The base's own configuration but for the type that the weights are stored in."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the same under its older name
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _under_stored_names(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` in their stored type and form, and after them the buffers that belong to a model, as they are.

    What transformers fuses as it loads, such as the experts of a mixture, is taken apart again; the parts of one fused weight
    lie in one layer, so a layer at a time is enough.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for _, layer in groupby(weights, key=lambda item: _layer(item[0])):
        stored = {name: tensor.to(dtype) for name, tensor in layer}
        yield from revert_weight_conversion(model, stored).items()
    saved = model.state_dict().keys()
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in saved}
    if buffers:
        yield from revert_weight_conversion(model, buffers).items()


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; a name outside the layers is its own."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, shard_bytes: int) -> None:
    """`model.safetensors`, or numbered files and an index. The number of files is known at the end: they are renamed then."""
    shards: list[list[str]] = []
    total_bytes = total_parameters = 0
    for shard in _shards(tensors, shard_bytes):
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        total_parameters += sum(tensor.numel() for tensor in shard.values())
        save_file(shard, directory / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
    if len(shards) == 1:
        (directory / _part(0)).rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _part(index)).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    metadata = {"total_parameters": total_parameters, "total_size": total_bytes}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _part(index: int) -> str:
    return f"part-{index}.safetensors"


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[Tensors]:
    """Tensors in order, as many to a shard as fit; one that is larger than a shard is one of its own."""
    shard: Tensors = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
    yield shard
