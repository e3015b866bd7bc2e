"""Which weights move: a base model loaded and prepared for a method, and what the method trained written to a directory.

`loading.py` reads the base, `quantised.py` says in how many bits, `full.py` and `lora.py` make weights trainable and save them,
`initial.py` lets an adapter go on from another one. Frozen weights are stored as `precision` says, trainable
weights are float32, here and under ZeRO. How they are spread over workers and what they are trained on is none of this package's
business.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from service.config import LoraBlock, RunConfig
from service.errors import ConfigError
from service.training.methods import full, lora, quantised
from service.training.methods.fused import fuse
from service.training.methods.initial import load_initial_adapter
from service.training.methods.loading import STORAGE, load_base, meta_base


def load_model(
    path: Path, config: RunConfig, device: torch.device, cache: Path, home: str, base: Any = None
) -> torch.nn.Module:
    """The base in `path` with the run's method applied, on `device`, in training mode. `base`: the same, loaded already.

    `cache` and `home` are where `method.init_from` is looked up. Under ZeRO-3 call it inside `strategy.loading`. Raises
    ModelError where the weights are not exactly the architecture's, or the method or the first adapter does not fit; ConfigError
    for what this base or this machine cannot do.
    """
    model = _apply(load_base(path, config, device) if base is None else base, config)
    if isinstance(config.method, LoraBlock) and config.method.init_from:
        load_initial_adapter(model, config.method.init_from, path, cache=cache, home=home)
    return ready_to_train(model, config)


def ready_to_train(model: torch.nn.Module, config: RunConfig) -> torch.nn.Module:
    """How the model computes while it is trained: which activations it keeps, which products are fused. The weights stay."""
    if config.memory.checkpoint_activations:
        _checkpoint_activations(model)
    if isinstance(config.method, LoraBlock) and config.scale.strategy != "zero3":
        fuse(model)
    return model.train()


def skeleton(path: Path, config: RunConfig) -> torch.nn.Module:
    """What `load_model` would give, on the meta device: names and shapes without a single weight, nothing quantised."""
    with torch.device("meta"):
        return _apply(meta_base(path), config)


def weight_bytes(model: torch.nn.Module, config: RunConfig) -> tuple[int, int]:
    """Bytes that the trainable and the frozen weights of a `skeleton` take when it is loaded, buffers left out."""
    trainable = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    small = quantised.quantised_weights(model, config.method)
    frozen = sum(
        quantised.quantised_bytes(p.shape, config.method)
        if id(p) in small
        else p.numel() * STORAGE[config.precision].itemsize
        for p in model.parameters()
        if not p.requires_grad
    )
    return trainable, frozen


def save_model(
    model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], directory: Path, config: RunConfig
) -> None:
    """Write the trained `weights` (float32, on the CPU, by parameter name) so that the model can be served.

    An adapter in PEFT's format; or, for `full`, a model in transformers' format with the base's tokenizer and configuration
    files, which must still be where the base was loaded from. `weights` is read once, in order.
    """
    if isinstance(config.method, LoraBlock):
        lora.save_adapter(model, weights, directory, config.model.id, config.model.revision)
    else:
        full.save_full(model, weights, directory, STORAGE[config.precision])


def _apply(model: Any, config: RunConfig) -> torch.nn.Module:
    applied: torch.nn.Module
    if isinstance(config.method, LoraBlock):
        applied = lora.apply_lora(model, config.method, config.seed)
    else:
        applied = full.train_everything(model)
    return applied


def _checkpoint_activations(model: Any) -> None:
    """Every decoder layer keeps its input only and is computed again in the backward pass.

    Not reentrant: that form works with frozen inputs, and so gives gradients to adapters too.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"memory.checkpoint_activations: true, but {type(base).__name__} cannot checkpoint its layers. Set it to "
            "false and lower memory.micro."
        )
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
