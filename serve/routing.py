"""From the model name in a request to the one Model that answers it: pure, no I/O, nothing guessed.

The base answers to its own name, `name@version` only if that version is registered here, `name@alias` to what the alias
points at, a bare name to its alias `production`, else to a registered label of that text. There is no "latest": a name
that means nothing is an error that lists the known ones. Who loads and unloads is in `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from service.domain import ModelRef
from service.errors import ConfigError, NotFoundError

PRODUCTION = "production"


class UnknownModelError(NotFoundError):
    """A requested model name that nothing here answers to."""


class Registered(BaseModel):
    """One entry of the desired state: `model` is a version such as tickets@1, `digest` its identity.

    `since` is the epoch of its last PUT: one that was evicted or refused is tried again when it is PUT again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str
    since: int = 0


@dataclass(frozen=True)
class Routes:
    """What an endpoint knows: its base, its labels, and the aliases of the registered families (family -> alias -> version)."""

    base: str
    base_digest: str
    labels: Mapping[str, Registered] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def names(self) -> list[tuple[str, str]]:
        """Every name that answers, with its digest: the base first, then labels, versions, aliases and bare names."""
        known = {self.base: self.base_digest}
        known.update((label, entry.digest) for label, entry in sorted(self.labels.items()))
        versions = {entry.model: entry.digest for entry in self.labels.values()}
        known.update((model, digest) for model, digest in sorted(versions.items()) if model not in known)
        for family, aliases in sorted(self.aliases.items()):
            for alias, version in sorted(aliases.items()):
                digest = versions.get(f"{family}@{version}")
                if digest:
                    known[f"{family}@{alias}"] = digest
                    if alias == PRODUCTION and family != self.base:
                        known[family] = digest
        return list(known.items())


@dataclass(frozen=True)
class Target:
    """Who is to answer. With a `label`, a replica that still loads `digest` answers with the label's previous version."""

    model: str
    digest: str
    label: str | None = None
    is_base: bool = False


def resolve(name: str, routes: Routes) -> Target:
    """The Target of a requested name. Raises UnknownModelError that lists the known names."""
    if name == routes.base:
        return Target(routes.base, routes.base_digest, is_base=True)
    try:
        ref = ModelRef.parse(name)
    except ConfigError:
        raise _unknown(name, routes) from None
    if ref.version is not None:
        return _at(str(ref.at(ref.version)), name, routes)
    version = routes.aliases.get(ref.family, {}).get(ref.alias or PRODUCTION)
    if version is not None:
        return _at(f"{ref.family}@{version}", name, routes)
    entry = routes.labels.get(name)
    if entry is None:
        raise _unknown(name, routes)
    return Target(entry.model, entry.digest, label=name)


def _at(model: str, name: str, routes: Routes) -> Target:
    for entry in routes.labels.values():
        if entry.model == model:
            return Target(model, entry.digest)
    means = "" if model == name else f" means {model}, which"
    raise _unknown(name, routes, f"{means} is not registered on this endpoint")


def _unknown(name: str, routes: Routes, why: str = " is not known to this endpoint") -> UnknownModelError:
    known = ", ".join(known for known, _ in routes.names())
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return UnknownModelError(f"model {shown!r}{why}. Known names: {known}. PUT /v1/adapters/NAME registers an adapter.")
