"""Resumable state: float32 trainable weights and optimizer moments by parameter name, in safetensors and JSON.

A checkpoint is `runs/<id>/checkpoints/<step>/`, whole when its `checkpoint.json` is there, which is written last and holds
the checksums. It knows nothing of workers or strategy. The position in the data and every random draw follow from the
step, because the planner and the dropout seeds are functions of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from service import storage
from service.errors import ConfigError, NotFoundError, StorageError

FORMAT = 1
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from. `step` counts finished optimizer steps."""

    step: int
    weights: Tensors
    moments: Tensors


def save_checkpoint(run_uri: str, checkpoint: Checkpoint, config_digest: str) -> str:
    """Write a checkpoint; it is visible only when whole. Returns its URI."""
    uri = storage.join(run_uri, "checkpoints", f"{checkpoint.step:08d}")
    files = {"weights.safetensors": save(checkpoint.weights), "optimizer.safetensors": save(checkpoint.moments)}
    for name, data in files.items():
        storage.write_bytes(storage.join(uri, name), data)
    index = {
        "format": FORMAT,
        "step": checkpoint.step,
        "config_digest": config_digest,
        "torch": torch.__version__,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    storage.write_bytes(storage.join(uri, "checkpoint.json"), json.dumps(index, indent=2).encode())
    return uri


def newest_checkpoint(run_uri: str, config_digest: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that had to be passed over."""
    passed_over: list[str] = []
    for name in sorted(storage.list_names(storage.join(run_uri, "checkpoints")), reverse=True):
        uri = storage.join(run_uri, "checkpoints", name)
        try:
            return _read(uri, config_digest), passed_over
        except (NotFoundError, StorageError) as error:
            passed_over.append(f"checkpoint {name} is not whole and was passed over: {error}")
    return None, passed_over


def prune(run_uri: str, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what a killed attempt left without an index.

    One that is cut short here lacks a file and is passed over.
    """
    parent = storage.join(run_uri, "checkpoints")
    names = sorted(storage.list_names(parent))
    kept = [name for name in names if storage.exists(storage.join(parent, name, "checkpoint.json"))][-keep_last:]
    for name in names:
        if name not in kept:
            storage.delete_tree(storage.join(parent, name))


def _index(uri: str) -> dict[str, Any]:
    data = storage.read_bytes(uri)
    try:
        index = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} is no JSON: {error}.") from None
    if not isinstance(index, dict) or not {"step", "config_digest", "files"} <= set(index):
        raise StorageError(f"{uri} is no index of a checkpoint.")
    return index


def _read(uri: str, config_digest: str) -> Checkpoint:
    index = _index(storage.join(uri, "checkpoint.json"))
    if index["config_digest"] != config_digest:
        raise ConfigError(
            f"{uri} belongs to another config. Resume it with the run's own config: loray train --resume RUN."
        )
    tensors: dict[str, Tensors] = {}
    for name, sha256 in index["files"].items():
        data = storage.read_bytes(storage.join(uri, name))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"{uri}/{name} does not have the sha256 that its checkpoint.json names.")
        tensors[name] = load(data)
    return Checkpoint(index["step"], tensors["weights.safetensors"], tensors["optimizer.safetensors"])
