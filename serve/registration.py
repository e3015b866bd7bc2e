"""May this Model be registered under this label here, and if so, the writing of it, which can be taken back.

Reads the registry's manifest and compares it with the endpoint's base: an adapter for another base or another template
would answer, and answer nonsense. Used by `gateway.py` (PUT) and `app.py` (the serve file's `adapters`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.desired import Base, Desired, EndpointFiles
from serve.routing import Registered
from service.domain import Manifest, ModelRef, check_name
from service.errors import ConfigError, ConflictError, ModelError, NotFoundError
from service.registry import Registry


def registrable(label: str, model: str, base: Base, registry: Registry) -> Registered:
    """The version and digest that `model` means now, or the error that says why `label` cannot have it."""
    entry = servable(model, base, registry)
    _check_label(label, ModelRef.parse(entry.model), base)
    return entry


def servable(model: str, base: Base, registry: Registry) -> Registered:
    """The version and digest that `model` means now. ModelError if this endpoint could not answer with it."""
    ref = registry.resolve(ModelRef.parse(model))
    manifest = registry.manifest(ref)
    problems = mismatches(manifest, base)
    if problems:
        raise ModelError(f"{ref} cannot be served here: {'; '.join(problems)}.")
    return Registered(model=str(ref), digest=manifest.digest)


def default_label(model: str, registry: Registry) -> str:
    """The label of an adapter from the serve file: a bare name as it is, else the version that is meant.

    tickets@canary and tickets@production are two adapters then; a request finds either by its alias.
    """
    ref = ModelRef.parse(model)
    return ref.family if ref.selector is None else str(registry.resolve(ref))


@dataclass(frozen=True)
class Registration:
    """What was written to the desired state, and what stood under the same labels before."""

    files: EndpointFiles
    desired: Desired
    written: Mapping[str, Registered]
    before: Mapping[str, Registered]

    def take_back(self) -> None:
        """Put back what was there before, but for labels that somebody else has changed since."""
        if self.written:
            self.files.change(self._without)

    def _without(self, desired: Desired) -> Desired:
        adapters = desired.adapters
        ours = {label for label, entry in self.written.items() if adapters.get(label) == entry}
        others = {label: entry for label, entry in adapters.items() if label not in ours}
        restored = {label: entry for label, entry in self.before.items() if label in ours}
        return desired.model_copy(update={"adapters": {**others, **restored}})


def register(files: EndpointFiles, wanted: Mapping[str, Registered]) -> Registration:
    """Add these to the desired state, in one change; of nothing, nothing is written."""
    if not wanted:
        return Registration(files, files.read(), {}, {})
    before: dict[str, Registered] = {}
    written: dict[str, Registered] = {}

    def with_wanted(desired: Desired) -> Desired:
        adapters = desired.adapters
        before.clear()
        before.update((label, adapters[label]) for label in wanted if label in adapters)
        written.update((label, entry.model_copy(update={"since": desired.epoch})) for label, entry in wanted.items())
        return desired.model_copy(update={"adapters": {**adapters, **written}})

    return Registration(files, files.change(with_wanted), written, before)


def withdrawn(desired: Desired, label: str) -> Registered:
    """The entry to delete. NotFoundError if there is none, ConflictError while a split needs it."""
    entry = desired.adapters.get(label)
    if entry is None:
        known = ", ".join(sorted(desired.adapters)) or "none"
        raise NotFoundError(f"no adapter is registered as {label!r}. Registered: {known}.")
    users = [n for n, split in desired.splits.items() if any(a.model == entry.model for a in split.arms.values())]
    if users and label == entry.model:  # other names of it may go
        raise ConflictError(f"split {users[0]!r} sends traffic to {entry.model}. Change or delete the split first.")
    return entry


def mismatches(manifest: Manifest, base: Base) -> list[str]:
    """All the reasons why an adapter does not belong to this base, each with both values."""
    if manifest.kind != "adapter":
        return [f"it is a {manifest.kind} model, no adapter: serve it as a base of its own (model: {manifest.ref})"]
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
