"""Saved weights, tensor by tensor: is anything empty, not finite, or exactly as it was before training?

Reads safetensors shard by shard, one tensor at a time, so that a model of any size is looked at in the memory of its
largest tensor. Nothing is computed with a model here (`reloaded.py` does that) and nothing decided (`gate.py` does).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from service.errors import ModelError
from service.publishable import ADAPTER_FILES, INDEX_FILE

_SHOWN = 5
_LORA_A, _LORA_B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_ROWS = 1024  # of an update B A that stand in memory at once

Digests = dict[
    str, dict[str, str]
]  # parameter name -> type ("float32", "bfloat16") -> sha256 of its bytes in that type


class Weights:
    """The tensors of a directory by name. Raises ModelError for what is no safetensors file."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file.name} is no safetensors file that can be read: {error}.") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.names = sorted(self._files)

    @classmethod
    def of_adapter(cls, directory: Path) -> Weights:
        """Of an adapter in PEFT's format."""
        return cls([directory / ADAPTER_FILES[1]])

    @classmethod
    def of_model(cls, directory: Path) -> Weights:
        """Of a model in transformers' format: the shards that its index names, or its one file."""
        index = directory / INDEX_FILE
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return cls([directory / name for name in names])
        return cls(sorted(directory.glob("*.safetensors")))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as stored."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        """The tensor of this name, or the only one whose name has one prefix more or less (`model.`, `transformer.`)."""
        if name in self._files:
            return self.read(name)
        near = [other for other in self.names if other.endswith(f".{name}") or name.endswith(f".{other}")]
        return self.read(near[0]) if len(near) == 1 else None


@dataclass
class Findings:
    """What the look at the tensors gave. `alive` of `total` trained parts are not as they were before training."""

    reasons: list[str]  # against the model
    alive: int = 0
    total: int = 0
    rounded_away: int = 0  # of the alive ones: trained, and so little that their stored type does not show it
    uncompared: int = 0  # tensors under names that the base's files do not have
    rounded: bool = False  # float32 weights of the trainer's have another type in the file or once they are loaded
    loadable: bool = True  # nothing is empty or not finite


class WeightDigests:
    """Keeps what the trainer held, as digests, while its weights go by on their way to the file.

        digests = WeightDigests(torch.bfloat16)
        save_model(model, digests.watch(weights), directory, config)
        probe = replace(probe, weights=digests.of)

    With them the gate finds a single wrong bit, and tells a tensor that moved less than its stored type can show from one
    that never moved: bfloat16 keeps a norm's weight of 1 as it is until it has moved by 0.002.
    """

    def __init__(self, stored: torch.dtype) -> None:
        self._types = {torch.float32, stored}
        self.of: Digests = {}

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, unchanged, one at a time."""
        for name, tensor in weights:
            self.of[name] = {_type_name(kind): tensor_digest(tensor.to(kind)) for kind in self._types}
            yield name, tensor


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of its bytes."""
    content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def inspect_model(saved: Weights, base: Weights, *, fixed: Iterable[str], digests: Digests) -> Findings:
    """A full model against its base, in one pass over both. `fixed` names buffers, which no training moves."""
    flaws, still = _Flaws(), set(fixed)
    alive: list[str] = []
    dead: list[str] = []
    strange: list[str] = []
    found = Findings([])
    for name in saved.names:
        tensor = saved.read(name)
        flaws.look(name, tensor)
        if name in still or not tensor.is_floating_point():
            continue
        found.total += 1
        found.rounded |= tensor.dtype is not torch.float32
        held = digests.get(name)
        if held is not None and held.get(_type_name(tensor.dtype)) != tensor_digest(tensor):
            strange.append(name)
        before = base.find(name)
        if before is None:
            found.uncompared += 1
        elif not _same(tensor, before):
            alive.append(name)
        elif held is not None and held["float32"] != tensor_digest(before.float()):
            alive.append(name)
            found.rounded_away += 1
        else:
            dead.append(name)
    moved = {_trained_as(name) for name in alive}
    dead = [name for name in dead if _trained_as(name) not in moved]
    found.alive = found.total - found.uncompared - len(dead)
    found.reasons += flaws.reasons("the model's files hold no tensor.")
    found.loadable = not found.reasons
    if strange:
        found.reasons.append(
            f"{len(strange)} of {found.total} tensors are not what the trainer held: {_some(strange)}."
        )
    if dead:
        found.reasons.append(f"{len(dead)} of {found.total} tensors are exactly the base's: {_some(dead)}.")
    if found.total and found.uncompared == found.total:
        found.reasons.append("no tensor has a name that the base's files have, so nothing shows that any was trained.")
    return found


def _trained_as(name: str) -> str:
    """The parameter that a saved tensor was part of: experts are trained as one and saved one by one, and an expert that
    no token was sent to has not moved."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def inspect_adapter(
    saved: Weights, base: Weights, *, started_from: Weights | None, magnitudes: Mapping[str, torch.Tensor]
) -> Findings:
    """An adapter's tensors. `magnitudes` are DoRA's before training, by their names in the file; the adapter that it
    continued, if any, is `started_from`: then every part must differ from that one's, too.
    """
    flaws = _Flaws()
    for name in saved.names:
        flaws.look(name, saved.read(name))
    reasons = flaws.reasons(f"{ADAPTER_FILES[1]} holds no tensor.")
    if reasons:
        return Findings(reasons, loadable=False)
    parts = _parts(saved.names)
    zero = [part.name for part in parts if part.is_pair and _is_zero(saved, part.tensors)]
    unmoved = [part.name for part in parts if part.name not in zero and _unmoved(part, saved, started_from)]
    rest = [part for part in parts if not part.is_pair and started_from is None]
    before = {part.name: magnitudes.get(part.name, base.find(_name_in_base(part.name))) for part in rest}
    unknown = [name for name, value in before.items() if value is None]
    unmoved += [name for name, value in before.items() if value is not None and _same(saved.read(name), value)]
    total = len(parts)
    if zero:
        reasons.append(f"{len(zero)} of {total} updates are zero: {_some(zero)}.")
    if unmoved:
        origin = "the base" if started_from is None else "the adapter that training began with"
        reasons.append(f"{len(unmoved)} of {total} parts are exactly as in {origin}: {_some(unmoved)}.")
    if unknown:
        reasons.append(f"{len(unknown)} tensors belong to nothing in the base: {_some(unknown)}.")
    # PEFT keeps its own parameters in float32, and puts the others into the base as the base is stored.
    rounded = any(not part.is_pair and not part.name.endswith(_MAGNITUDE) for part in parts)
    return Findings(reasons, total - len(zero) - len(unmoved) - len(unknown), total, rounded=rounded)


def has_magnitudes(saved: Weights) -> bool:
    """Whether this is a DoRA adapter."""
    return any(name.endswith(_MAGNITUDE) for name in saved.names)


@dataclass(frozen=True)
class _Part:
    """What is alive or dead together: the two matrices of an update, a magnitude, a bias."""

    name: str
    tensors: tuple[str, ...]
    is_pair: bool


@dataclass
class _Flaws:
    seen: int = 0
    empty: list[str] = field(default_factory=list)
    infinite: list[str] = field(default_factory=list)

    def look(self, name: str, tensor: torch.Tensor) -> None:
        self.seen += 1
        if tensor.numel() == 0:
            self.empty.append(name)
        elif not tensor.isfinite().all():
            self.infinite.append(name)

    def reasons(self, nothing: str) -> list[str]:
        reasons = [] if self.seen else [nothing]
        reasons += [f"{len(self.empty)} tensors are empty: {_some(self.empty)}."] if self.empty else []
        reasons += [f"{len(self.infinite)} tensors are not finite: {_some(self.infinite)}."] if self.infinite else []
        return reasons


def _parts(names: Sequence[str]) -> list[_Part]:
    halves: dict[str, list[str]] = {}
    single = []
    for name in names:
        module = name.removesuffix(_LORA_A).removesuffix(_LORA_B)
        if module == name:
            single.append(_Part(name, (name,), is_pair=False))
        else:
            halves.setdefault(module, []).append(name)
    return [_Part(module, tuple(sorted(found)), is_pair=True) for module, found in halves.items()] + single


def _is_zero(saved: Weights, tensors: Sequence[str]) -> bool:
    """Whether B A is zero everywhere; an A without its B, or a B without its A, changes nothing either."""
    if len(tensors) < 2:
        return True
    a, b = (saved.read(name).float() for name in tensors)
    return not any(bool((rows @ a).any()) for rows in torch.split(b, _ROWS))


def _unmoved(part: _Part, saved: Weights, started_from: Weights | None) -> bool:
    if started_from is None or not set(part.tensors) <= set(started_from.names):
        return False
    return all(_same(saved.read(name), started_from.read(name)) for name in part.tensors)


def _same(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether they are equal once `before` is stored as `after` is: rounding alone is no training."""
    return after.shape == before.shape and torch.equal(after, before.to(after.dtype))


def _name_in_base(name: str) -> str:
    """The base's name of a tensor that PEFT saved: without its wrapper's prefix and its layers' `base_layer`."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
