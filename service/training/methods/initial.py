"""`method.init_from`: an adapter that goes on from another one, from the registry, a directory or `s3://`.

It must be the same adapter in everything but its weights: base, targets, ranks, scale, options. What differs is listed, all
of it at once. An adapter from the registry knows its base by digest; one from a directory or from S3 does not, and there its
tensors' shapes are all that can be compared.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from service import storage
from service.base_models import resolve_base_model
from service.domain import ModelRef
from service.errors import ModelError
from service.registry import Registry
from service.training.methods.lora import adapter_tensors
from service.training.methods.parameters import set_content, shape_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Of PEFT's configuration: what changes the function that the same tensors compute, and the value of files without it.
_MEANINGFUL = {
    "peft_type": "LORA",
    "lora_alpha": 8,
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
}


def load_initial_adapter(model: Any, source: str, base: Path, *, cache: Path, home: str) -> None:
    """Copy the adapter `source` into the fresh LoRA layers of `model`, in float32.

    A collective under ZeRO-3. Raises ModelError with every difference, NotFoundError or StorageError where it cannot be had.
    """
    directory, base_digest = fetch_initial_adapter(source, cache, home)
    differences = []
    if base_digest is not None:
        wanted = resolve_base_model(str(base), cache).digest
        if base_digest != wanted:
            differences.append(f"base model {base_digest[:12]}, wanted {wanted[:12]}")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"method.init_from {source!r} is no adapter that can be read: {error}. It needs {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "on every node."
        ) from None
    parameters = adapter_tensors(model, {name: p for name, p in model.named_parameters() if p.requires_grad})
    differences += _config_differences(config, model.peft_config["default"].to_dict())
    differences += _tensor_differences(tensors, parameters)
    if differences:
        raise ModelError(
            f"method.init_from {source!r} does not fit this run: {'; '.join(differences)}. Set method and model as the "
            "adapter has them, or begin without it."
        )
    for name, parameter in parameters.items():
        set_content(parameter, tensors[name].float())


def fetch_initial_adapter(source: str, cache: Path, home: str) -> tuple[Path, str | None]:
    """The adapter's local directory, and the digest of its base where that is known."""
    if source.startswith("s3://"):
        return _fetch_s3(source, cache), None
    if source.startswith(("/", "./", "../", "~")) or Path(source).is_dir():
        return Path(source).expanduser(), None
    registry, ref = Registry(home), ModelRef.parse(source)
    manifest = registry.manifest(ref)
    if manifest.kind != "adapter":
        raise ModelError(f"method.init_from {source!r} is a {manifest.kind} model, no adapter. Give it as model.id.")
    return registry.fetch(ModelRef.parse(manifest.ref), cache), manifest.base_digest


def _fetch_s3(uri: str, cache: Path) -> Path:
    files = {name: storage.join(uri, name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    tags = [f"{file}:{storage.tag(file)}" for file in files.values()]
    target = cache / "adapters" / hashlib.sha256("\n".join(tags).encode()).hexdigest()
    with storage.locked(target):
        for name, file in files.items():
            if not (target / name).is_file():
                target.mkdir(parents=True, exist_ok=True)
                storage.fetch_file(file, target / name, None)
    return target


def _config_differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    differences = []
    for key, default in _MEANINGFUL.items():
        seen, asked = found.get(key, default), wanted[key]
        if (seen or None) != (asked or None):
            differences.append(f"{key} {seen}, wanted {asked}")
    return differences


def _tensor_differences(found: dict[str, torch.Tensor], wanted: dict[str, Any]) -> list[str]:
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    differences = [f"{len(missing)} tensors are missing: {', '.join(missing[:4])}"] if missing else []
    differences += [f"{len(left_over)} tensors are left over: {', '.join(left_over[:4])}"] if left_over else []
    for name in sorted(found.keys() & wanted.keys()):
        shape = shape_of(wanted[name])
        if found[name].shape != shape:
            differences.append(f"{name} has the shape {list(found[name].shape)}, wanted {list(shape)}")
        elif not found[name].isfinite().all():
            differences.append(f"{name} is not finite")
    return differences
