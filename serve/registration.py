"""May this adapter be registered under this label here, and if so, the writing of it, which can be taken back.

Compares the registry's manifest with the endpoint's base: an adapter for another base or another template would answer,
and answer nonsense. An adapter from a URI that has no such manifest is judged by what its config says of its base, and
later, as every adapter is, by its tensors (`service/inference/adapter_files.py`). Used by `gateway.py` (PUT) and
`app.py` (the serve file's `adapters`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.adapter_uris import AdapterUris, Found
from serve.desired import Base, Desired, EndpointFiles, ReplicaReport
from serve.field_kinds import BOOLEAN, object_schema, text
from serve.openai_fields import Fields
from serve.routing import Registered
from service.domain import Manifest, ModelRef, check_name
from service.errors import ConfigError, ConflictError, LorayError, ModelError, NotFoundError
from service.registry import DEFAULT_ALIAS, Registry, model_digest

SHOWN_DIGITS = 12
SHOWN_REASON = 500  # characters
_GIVEN, _ABSENT = {"type": "string"}, {"type": "null"}
_PINNED = "@sha256-"  # before the digits of the digest: twelve of them alone could be a version's number

ADAPTER = {
    "model": replace(text(), wanted='a registered model such as "tickets@1"'),
    "uri": replace(text(), wanted="an absolute path, file:///path or s3://bucket/key"),
    "base_model": replace(text(), wanted="the endpoint's base model by name"),
    "pin": replace(BOOLEAN, wanted="true (the adapter stays resident) or false"),
}
ADAPTER_SCHEMA = {
    **object_schema(ADAPTER),
    "anyOf": [
        {"required": ["model"], "properties": {"model": _GIVEN, "uri": _ABSENT, "base_model": _ABSENT}},
        {"required": ["uri"], "properties": {"uri": _GIVEN, "model": _ABSENT}},
    ],
    "description": "a registered model, or the uri of an adapter's directory; base_model vouches for a uri's adapter",
}


@dataclass(frozen=True)
class Wanted:
    """A checked PUT body: a registered model or a URI. `base_model` is the caller's word for which base a URI's adapter is."""

    model: str | None
    uri: str | None
    base_model: str | None
    pin: bool
    ignored: tuple[str, ...]


def parse_wanted(raw: Mapping[str, Any]) -> Wanted:
    """`{"model": ...}` or `{"uri": ..., "base_model": ...}`, and `pin`; RequestError with all that is wrong."""
    fields = Fields(raw, ADAPTER)
    values = fields.values
    if not fields.problems and values["model"] is None and values["uri"] is None:
        fields.problem("model", 'is missing. Give a registered model such as "tickets@1", or an adapter\'s uri.')
    if values["model"] is not None and values["uri"] is not None:
        fields.problem("uri", "is given beside model. Give one of them.")
    if values["base_model"] is not None and values["uri"] is None:
        fields.problem("base_model", "goes with uri only: a registered model says itself what it was made for.")
    fields.raise_problems()
    return Wanted(values["model"], values["uri"], values["base_model"], values["pin"], tuple(fields.ignored))


def registrable(label: str, model: str, base: Base, registry: Registry) -> Registered:
    """The version and digest that `model` means now, or the error that says why `label` cannot have it."""
    entry = servable(model, base, registry)
    asked, ref = ModelRef.parse(model), ModelRef.parse(entry.model)
    alias = None if asked.version else f"{asked.family}@{asked.alias or DEFAULT_ALIAS}"
    _check_label(label, ref, alias, base)
    return entry.model_copy(update={"follows": None if label == str(ref) else alias})


def follow(
    files: EndpointFiles, desired: Desired, aliases: Mapping[str, Mapping[str, int]], base: Base, registry: Registry
) -> tuple[Desired, dict[str, str]]:
    """The desired state once every label has what its alias points at now; by label, why some keep what they have.

    `aliases` is what the registry says (family -> alias -> version). An alias that was deleted moves nobody, and what
    goes wrong with one label is that label's own trouble. A version that a live replica refuses is left again.
    """
    moved, behind = {}, {}
    following = {label: entry for label, entry in desired.adapters.items() if entry.follows}
    reports = files.live_reports(time.time()) if any(entry.before for entry in following.values()) else []
    for label, entry in following.items():
        ref = ModelRef.parse(str(entry.follows))
        version = aliases.get(ref.family, {}).get(ref.alias or "")
        try:
            after = entry if version is None else _following(entry, str(ref.at(version)), reports, base, registry)
        except LorayError as error:
            behind[label] = f"{entry.follows} has moved, and it stays with {entry.model}: {error}"
            continue
        if after != entry:
            moved[label] = (entry, after)
        if after.refused:
            behind[label] = f"{entry.follows} has moved, and it stays with {after.model}: {': '.join(after.refused)}"

    def with_moved(current: Desired) -> Desired:
        new = {
            label: after if after.model == before.model else after.model_copy(update={"since": current.epoch})
            for label, (before, after) in moved.items()
            if current.adapters.get(label) == before  # or somebody has changed it since
        }
        return current.model_copy(update={"adapters": {**current.adapters, **new}})

    try:
        return (files.change(with_moved) if moved else desired), behind
    except LorayError as error:
        return desired, {**behind, **dict.fromkeys(moved, f"what it follows has moved, and cannot be written: {error}")}


def _following(
    entry: Registered, model: str, reports: Sequence[ReplicaReport], base: Base, registry: Registry
) -> Registered:
    """The entry of a label whose alias points at `model`: moved there, or back because replicas refused it, or as it is."""
    if entry.model == model and entry.before:
        seen = [r.adapters[entry.digest] for r in reports if r.epoch >= entry.since and entry.digest in r.adapters]
        reason = next((report.detail for report in seen if report.state == "refused"), None)
        if reason is not None:
            back = {"model": entry.before[0], "digest": entry.before[1], "before": None}
            return entry.model_copy(update={**back, "refused": (entry.model, reason[:SHOWN_REASON])})
        if any(report.state == "resident" for report in seen):
            return entry.model_copy(update={"before": None})
    if entry.model == model:
        return entry.model_copy(update={"refused": None})
    if entry.refused and entry.refused[0] == model:
        return entry
    now = servable(model, base, registry)
    before = (entry.model, entry.digest)
    return entry.model_copy(update={"model": now.model, "digest": now.digest, "before": before, "refused": None})


def servable(model: str, base: Base, registry: Registry) -> Registered:
    """The version and digest that `model` means now. ModelError if this endpoint could not answer with it."""
    ref = registry.resolve(ModelRef.parse(model))
    manifest = registry.manifest(ref)
    problems = mismatches(manifest, base)
    if problems:
        raise ModelError(f"{ref} cannot be served here: {'; '.join(problems)}.")
    return Registered(model=str(ref), digest=manifest.digest)


def from_uri(label: str, uri: str, base_model: str | None, base: Base, uris: AdapterUris) -> Registered:
    """What lies at `uri` now, pinned by its content, or the error that says why it cannot be served as `label`."""
    _check_not_base(label, base)
    check_name(label, "adapter name")
    found = uris.look(uri)
    problems = mismatches(found.manifest, base) if found.manifest else _by_name(found, base_model, base)
    if problems:
        raise ModelError(f"{uri} cannot be served here: {'; '.join(problems)}.")
    source = uris.pin(found, base.digest)
    digest = model_digest(source.files)
    return Registered(model=f"{label}{_PINNED}{digest[:SHOWN_DIGITS]}", digest=digest, source=source)


def is_pinned_name(model: str) -> bool:
    """Whether this is the name of an adapter from a URI, as answers give it. A version is a number, never that."""
    return _PINNED in model


def is_uri(adapter: str) -> bool:
    """Whether an entry of the serve file's `adapters` is a URI, not a model."""
    return "://" in adapter or adapter.startswith("/")


def default_label(model: str) -> str:
    """The label of an adapter from the serve file: the name of a model as it is written, a URI's last part.

    tickets@canary and tickets@production are two adapters, and each follows its alias.
    """
    if is_uri(model):
        return model.rstrip("/").rpartition("/")[2]
    ref = ModelRef.parse(model)
    return str(ref if ref.version is None else ref.at(ref.version))


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


def _by_name(found: Found, vouched: str | None, base: Base) -> list[str]:
    """Without a manifest: the config's word for its base against this endpoint's name, by their last parts.

    Names prove nothing, since the same weights go under many: so who knows better may vouch for it. Silence is no mismatch.
    """
    if vouched is not None:
        return [] if vouched == base.name else [f"base_model is {vouched!r}, this endpoint serves {base.name!r}"]
    if found.base_name is None or _last_part(found.base_name) == _last_part(base.name):
        return []
    return [
        f"its adapter_config.json says that it was made for base model {found.base_name[:200]!r}, this endpoint serves "
        f'{base.name!r}. If these are the same weights under two names, say so in the body: "base_model": "{base.name}"'
    ]


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _check_not_base(label: str, base: Base) -> None:
    if label == base.name:
        raise ConflictError(f"{label!r} is the base model's own name. Register the adapter under another one.")


def _check_label(label: str, ref: ModelRef, alias: str | None, base: Base) -> None:
    _check_not_base(label, base)
    if label in (str(ref), ref.family, alias):
        return
    if "@" in label or "/" in label:
        raise ConfigError(
            f"adapter name {label!r} reads as a model, and {ref} is to answer to it. Use {ref.family}, {ref} or a plain name."
        )
    check_name(label, "adapter name")
