"""What a checkpoint is on storage, and every decision about it that needs no storage.

    runs/<id>/checkpoints/<step>/
        <save>-<rank>-<n>.safetensors   each worker's share of the parameters, tensors named <parameter>/weight, <parameter>/<moment>
        part-<rank>-<save>.json         what a worker has written, for the first one to put together
        checkpoint.json                 written last: step, checksums, what it was made from and on; without it nothing is there

`save` is drawn anew for each save, so that nothing an earlier attempt left can be taken for a part of a later one, and a
step that is saved again replaces the old one in one stroke. Reading is `checkpoint.py`, writing `checkpoint_saver.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from service import storage
from service.config import leaves
from service.domain import FileEntry

INDEX = "checkpoint.json"
FORMAT = 2
SHARD_BYTES = 2**29  # a larger tensor has a file of its own
VERSIONED = ("loray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes")

Tensors = dict[str, torch.Tensor]
Extra = dict[str, float | int | None]

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    },
}

# What may differ between a checkpoint and the run that goes on from it: it does not change what is learnt. The base and
# the data are compared by what they hold, not by their names; the global batch is the same for any workers and memory.
_NOT_LEARNT = (
    *("schema", "scale", "memory", "checkpoint", "evaluate", "stop", "publish"),
    *("model.id", "model.revision", "model.chat_template"),
    *("data.train", "data.eval", "data.test", "data.augment.synonyms", "data.over_long", "data.pack"),
)


class NotWholeError(Exception):
    """This checkpoint cannot be used, and the one before perhaps can. Never leaves `checkpoint*.py`."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint came from: the config as `model_dump(mode="json")` gives it, and the digests of base and data."""

    config: dict[str, Any]
    base_digest: str
    train_digest: str

    def differences(self, other: Identity) -> list[str]:
        """`optim.lr: 0.001 there, 0.0002 here` for each field that changes what is learnt; `other` is there."""
        here, there = (dict(_learnt(identity.config)) for identity in (self, other))
        lines = [
            f"{key}: {_shown(there.get(key))} there, {_shown(here.get(key))} here"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key)
        ]
        for what, mine, theirs in (
            ("digest of the base model", self.base_digest, other.base_digest),
            ("digest of the training data", self.train_digest, other.train_digest),
        ):
            lines += [f"{what}: {theirs[:12]} there, {mine[:12]} here"] if mine != theirs else []
        return lines


class Part(BaseModel):
    """What one worker wrote: its files, and which of them holds each tensor of each parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, str]]


class Index(BaseModel):
    """The content of checkpoint.json. `save` names the save that wrote it, `made_on` the machine and the versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    save: str
    identity: Identity
    extra: Extra
    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, str]]
    made_on: dict[str, str]

    def to_bytes(self) -> bytes:
        """JSON with a checksum over itself."""
        body = self.model_dump(mode="python")
        return json.dumps({"format": FORMAT, "sha256": _digest(body), **body}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Index:
        """The inverse. NotWholeError when it is not what was written."""
        try:
            body = json.loads(data)
            if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
                raise NotWholeError(f"{uri} is no index of format {FORMAT}.")
            if body.pop("sha256", None) != _digest(body):
                raise NotWholeError(f"{uri} does not have the sha256 that stands in it.")
            return cls.model_validate(body)
        except (ValueError, ValidationError) as error:
            raise NotWholeError(f"{uri} is no index of a checkpoint: {str(error).splitlines()[0]}.") from None


def directory_of(run_uri: str, step: int) -> str:
    """Where a step's checkpoint is."""
    return storage.join(run_uri, "checkpoints", f"{step:08d}")


def read_index(directory: str) -> Index:
    """Raises NotFoundError where there is none, NotWholeError where it is damaged, StorageError."""
    uri = storage.join(directory, INDEX)
    return Index.from_bytes(storage.read_bytes(uri), uri)


def steps_of(run_uri: str) -> list[int]:
    """All steps of which something is there, whole or not, ascending."""
    return sorted(int(name) for name in storage.list_names(storage.join(run_uri, "checkpoints")) if name.isdigit())


def deal(
    state: Iterable[tuple[str, Tensors]], rank: int, world_size: int
) -> tuple[list[tuple[str, Tensors]], set[str]]:
    """This worker's share, copied to host memory, and all names. The same split on every worker, even in bytes.

    Each parameter goes to whoever has the fewest bytes so far. `state` is gone through to its end: it is a collective.
    """
    totals = [0] * world_size
    share: list[tuple[str, Tensors]] = []
    names: set[str] = set()
    for name, tensors in state:
        assert name not in names, f"{name} comes twice"
        names.add(name)
        owner = totals.index(min(totals))
        totals[owner] += sum(tensor.nbytes for tensor in tensors.values())
        if owner == rank:
            share.append((name, {key: _copied(tensor) for key, tensor in tensors.items()}))
    return share, names


def shards(share: list[tuple[str, Tensors]]) -> Iterator[dict[tuple[str, str], torch.Tensor]]:
    """`share` in files of at most SHARD_BYTES, by (parameter, tensor); empties `share`, so that memory is freed on the way."""
    shard: dict[tuple[str, str], torch.Tensor] = {}
    size = 0
    share.reverse()
    while share:
        name, tensors = share.pop()
        for key in list(tensors):
            tensor = tensors.pop(key)
            if shard and size + tensor.nbytes > SHARD_BYTES:
                yield shard
                shard, size = {}, 0
            shard[name, key] = tensor
            size += tensor.nbytes
    if shard:
        yield shard


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """A file in the safetensors format, in pieces that share the tensors' memory.

    The library's own writer copies all of it while it holds the interpreter lock, which stops training for a second a
    gigabyte. The format: https://huggingface.co/docs/safetensors/index#format. Larger types come first, so that all are
    aligned. Tensors are contiguous and on the CPU.
    """
    header: dict[str, dict[str, Any]] = {}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def kept(whole: Mapping[int, float | None], newest: int, keep_last: int, keep_best: int) -> set[int]:
    """Which steps stay, of those with an index and its metric (lower is better, None: not measured).

    `newest` was just written. What is beyond it belongs to an attempt that this one did not go on from.
    """
    steps = sorted(step for step in whole if step <= newest)
    measured = [(metric, step) for step in steps if (metric := whole[step]) is not None and math.isfinite(metric)]
    return {newest, *steps[-keep_last:], *(step for _, step in sorted(measured)[:keep_best])}


def made_on(world_size: int) -> dict[str, str]:
    """What must be the same for going on bit for bit."""
    machine = {"workers": str(world_size), "torch threads": str(torch.get_num_threads()), "processor": _processor()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine | {package: version for package in VERSIONED if (version := _version(package))}


def _learnt(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(json.loads(json.dumps(config))):
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_LEARNT):
            yield key, value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory of its own: training goes on changing the original."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _processor() -> str:
    """The model's name, as Linux says it; elsewhere, or on a processor without one, its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
