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
from service.registry import DEFAULT_ALIAS

_UNKNOWN = " is not known to this endpoint"


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
        candidates = [self.base, *sorted(self.labels), *sorted(entry.model for entry in self.labels.values())]
        for family, aliases in sorted(self.aliases.items()):
            candidates += [*(f"{family}@{alias}" for alias in sorted(aliases)), family]
        found = [(name, _find(name, self)) for name in dict.fromkeys(candidates)]
        return [(name, target.digest) for name, target in found if isinstance(target, Target)]


@dataclass(frozen=True)
class Target:
    """Who is to answer. With a `label`, a replica that still loads `digest` answers with the label's previous version."""

    model: str
    digest: str
    label: str | None = None
    is_base: bool = False


def resolve(name: str, routes: Routes) -> Target:
    """The Target of a requested name. Raises UnknownModelError that lists the known names."""
    found = _find(name, routes)
    if isinstance(found, Target):
        return found
    known = ", ".join(known for known, _ in routes.names())
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    raise UnknownModelError(
        f"model {shown!r}{found}. Known names: {known}. PUT /v1/adapters/NAME registers an adapter."
    )


def _find(name: str, routes: Routes) -> Target | str:
    """The Target, or why there is none."""
    if name == routes.base:
        return Target(routes.base, routes.base_digest, is_base=True)
    try:
        ref = ModelRef.parse(name)
    except ConfigError:
        return _UNKNOWN
    if ref.version is not None:
        return _at(str(ref.at(ref.version)), name, routes)
    version = routes.aliases.get(ref.family, {}).get(ref.alias or DEFAULT_ALIAS)
    if version is not None:
        return _at(f"{ref.family}@{version}", name, routes)
    entry = routes.labels.get(name)
    return Target(entry.model, entry.digest, label=name) if entry else _UNKNOWN


def _at(model: str, name: str, routes: Routes) -> Target | str:
    for entry in routes.labels.values():
        if entry.model == model:
            return Target(model, entry.digest)
    means = "" if model == name else f" means {model}, which"
    return f"{means} is not registered on this endpoint"
