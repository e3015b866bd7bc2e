"""From the model name in a request to the one Model that answers it: pure, no I/O, nothing guessed.

The base answers to its own name, `name@version` only if that version is registered here, `name@alias` to what the alias
points at. A bare name means its split, else what was registered under it as it stands (a version, or a URI's adapter), else
what its alias `production` points at. There is no "latest": a name that means nothing is an error that lists the known ones. Who loads and unloads is in `adapters.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from pydantic import BaseModel, ConfigDict

from service.domain import FileEntry, ModelRef
from service.errors import ConfigError, NotFoundError
from service.registry import DEFAULT_ALIAS

SHOWN_NAMES = 20
_UNKNOWN = " is not known to this endpoint"


class UnknownModelError(NotFoundError):
    """A requested model name that nothing here answers to."""


class Source(BaseModel):
    """Where an adapter that no registry has lies, and what it was when it was registered: other content is another adapter.

    `base_digest` is that of the base for which it was accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    base_digest: str
    files: dict[str, FileEntry]


class Registered(BaseModel):
    """One entry of the desired state: `digest` is its identity, `model` what answers say of it.

    That is a version such as tickets@1, or for one with a `source`, `label@sha256-` and the first 12 digits of the digest.
    One that `follows` an alias (tickets@production) is given the version that this points at, whenever it moves. Until a
    replica has that resident, `before` is the entry's (model, digest) to go back to; `refused` is a version that it came
    back from, and why.
    `since` is the epoch of its last PUT: one that was evicted or refused is tried again when it is PUT again. A pinned one
    stays resident.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str
    since: int = 0
    pin: bool = False
    source: Source | None = None
    follows: str | None = None
    before: tuple[str, str] | None = None
    refused: tuple[str, str] | None = None


class Arm(BaseModel):
    """One side of a split: a version, or the base, and its share of the traffic relative to the other arms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str
    weight: float
    is_base: bool = False


class Split(BaseModel):
    """Live traffic to one public name, divided between arms (in the order they were given).

    A request's key is the first of `key` that it carries: `header:NAME`, `metadata.NAME`, or a field of the body. `since`
    is the epoch of its last PUT, its assignment version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: dict[str, Arm]
    salt: str
    key: tuple[str, ...]
    since: int = 0

    def arm_of(self, key: str | None) -> str:
        """The arm that this key always gets; without a key, the first arm that has a weight.

        Weighted rendezvous hashing (Schindelhauer and Schomaker 2005; Mosko 2015, section 3): each arm draws -w / ln(u)
        with u in (0, 1) from a hash of salt, arm and key, and the largest wins. The draws of the other arms do not change
        with one arm's weight, so it moves keys only between that arm and them.
        """
        live = (arm for arm in self.arms if self.arms[arm].weight > 0)
        return next(live) if key is None else max(live, key=lambda arm: self._draw(arm, key))

    def _draw(self, arm: str, key: str) -> float:
        parts = (self.salt.encode(), arm.encode(), key.encode("utf-8", "surrogatepass"))
        text = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        u = (int.from_bytes(blake2b(text, digest_size=6).digest(), "little") + 0.5) / 2**48
        return -self.arms[arm].weight / math.log(u)


@dataclass(frozen=True)
class Routes:
    """What an endpoint knows: its base, labels, splits, and the aliases of the registered families (family -> alias -> version)."""

    base: str
    base_digest: str
    labels: Mapping[str, Registered] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)

    def names(self) -> list[tuple[str, str]]:
        """Every name that answers, with its digest: the base first, then labels, versions, aliases and bare names."""
        return list(self.answering())

    def answering(self) -> Iterator[tuple[str, str]]:
        """The same, one by one."""
        candidates = [self.base, *sorted(self.labels), *sorted(entry.model for entry in self.labels.values())]
        for family, aliases in sorted(self.aliases.items()):
            candidates += [*(f"{family}@{alias}" for alias in sorted(aliases)), family]
        candidates += sorted(self.splits)
        for name in dict.fromkeys(candidates):
            target = _find(name, self)
            if isinstance(target, Target):
                yield name, target.digest


@dataclass(frozen=True)
class Target:
    """Who is to answer, and `by` which rule. With a `label`, a replica that still loads `digest` answers with the label's
    previous version."""

    model: str
    digest: str
    label: str | None = None
    is_base: bool = False
    by: str = ""
    split: str | None = None
    arm: str | None = None
    assignment: int | None = None  # the split's assignment version
    has_key: bool = True


def resolve(name: str, routes: Routes, key: str | None = None) -> Target:
    """The Target of a requested name, for a request with this key. Raises UnknownModelError that lists the known names."""
    found = _find(name, routes, key)
    if isinstance(found, Target):
        return found
    first = list(islice(routes.answering(), SHOWN_NAMES))
    known = ", ".join([*(name for name, _ in first), *(["... (GET /v1/models)"] if len(first) == SHOWN_NAMES else [])])
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    raise UnknownModelError(
        f"model {shown!r}{found}. Known names: {known}. PUT /v1/adapters/NAME registers an adapter."
    )


def _find(name: str, routes: Routes, key: str | None = None) -> Target | str:
    """The Target, or why there is none."""
    if name == routes.base:
        return Target(routes.base, routes.base_digest, is_base=True, by="the base model's own name")
    if name in routes.splits:
        split = routes.splits[name]
        chosen = split.arm_of(key)
        arm = split.arms[chosen]
        if arm.is_base and arm.digest != routes.base_digest:
            return f" is a split whose arm {chosen!r} is another base model than this endpoint's. PUT the split again"
        by = f"arm {chosen!r} of split {name!r}" + (
            "" if key is not None else ", the first one: the request has no key"
        )
        return Target(
            arm.model,
            arm.digest,
            is_base=arm.is_base,
            by=by,
            split=name,
            arm=chosen,
            assignment=split.since,
            has_key=key is not None,
        )
    pinned = next((e for e in routes.labels.values() if e.source and e.model == name), None)
    if pinned:
        return Target(name, pinned.digest, by="its content")
    try:
        ref = ModelRef.parse(name)
    except ConfigError:
        return _UNKNOWN
    if ref.version is not None:
        return _at(str(ref.at(ref.version)), name, routes, "its version")
    entry = routes.labels.get(name)
    if entry is not None and entry.follows is None:
        return Target(entry.model, entry.digest, label=name, by=f"adapter name {name!r}")
    alias = ref.alias or DEFAULT_ALIAS
    version = routes.aliases.get(ref.family, {}).get(alias)
    if version is not None:
        follower = next((n for n, e in routes.labels.items() if e.follows == f"{ref.family}@{alias}"), None)
        by = f"alias {alias!r} of {ref.family}"
        found = _at(f"{ref.family}@{version}", name, routes, by, follower)
        if isinstance(found, Target) or follower is None:
            return found
        kept = routes.labels[follower]  # it has not followed, or cannot: GET /v1/adapters says why
        return Target(kept.model, kept.digest, label=follower, by=f"{by}, as far as {follower!r} has followed it")
    return Target(entry.model, entry.digest, label=name, by=f"adapter name {name!r}") if entry else _UNKNOWN


def _at(model: str, name: str, routes: Routes, by: str, label: str | None = None) -> Target | str:
    """The registered version; with a label, while it is loaded, what that meant before answers."""
    for entry in routes.labels.values():
        if entry.model == model:
            return Target(model, entry.digest, label=label, by=by)
    means = "" if model == name else f" means {model}, which"
    return f"{means} is not registered on this endpoint"
