"""May this Model be registered under this label here? Asked before anything is written or loaded.

Reads the registry's manifest and compares it with the endpoint's base: an adapter for another base or another template
would answer, and answer nonsense. Used by `gateway.py` (PUT) and `app.py` (the serve file's `adapters`).
"""

from __future__ import annotations

from serve.desired import Base
from serve.routing import Registered
from service.domain import Manifest, ModelRef, check_name
from service.errors import ConfigError, ConflictError, ModelError
from service.registry import Registry


def registrable(label: str, model: str, base: Base, registry: Registry) -> Registered:
    """The version and digest that `model` means now, or the error that says why `label` cannot have it."""
    ref = registry.resolve(ModelRef.parse(model))
    _check_label(label, ref, base)
    manifest = registry.manifest(ref)
    problems = mismatches(manifest, base)
    if problems:
        raise ModelError(f"{ref} cannot be served here: {'; '.join(problems)}.")
    return Registered(model=str(ref), digest=manifest.digest)


def default_label(model: str) -> str:
    """The label of an adapter from the serve file: the version where one is written, else the bare name."""
    ref = ModelRef.parse(model)
    return str(ref) if ref.version is not None else ref.family


def mismatches(manifest: Manifest, base: Base) -> list[str]:
    """All the reasons why an adapter does not belong to this base, each with both values."""
    problems = []
    if manifest.base_digest != base.digest:
        problems.append(
            f"it was made for base model {manifest.base_model} ({manifest.base_digest[:12]}), this endpoint serves "
            f"{base.name} ({base.digest[:12]})"
        )
    if manifest.renderer_digest != base.renderer_digest:
        problems.append(
            f"it was trained with the chat template and tokenizer {manifest.renderer_digest[:12]}, this endpoint renders "
            f"with {base.renderer_digest[:12]}"
        )
    return problems


def _check_label(label: str, ref: ModelRef, base: Base) -> None:
    if label == base.name:
        raise ConflictError(f"{label!r} is the base model's own name. Register the adapter under another one.")
    if label in (str(ref), ref.family):
        return
    if "@" in label or "/" in label:
        raise ConfigError(
            f"adapter name {label!r} reads as a model, and {ref} is to answer to it. Use {ref.family}, {ref} or a plain name."
        )
    check_name(label, "adapter name")
