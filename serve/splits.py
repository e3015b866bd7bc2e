"""Splits of live traffic as clients ask for them: a body checked into a `Split`, and a request's key found. No HTTP here.

Which arm a key gets is decided in `routing.py`; `gateway.py` writes splits to the desired state.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.desired import Base, Desired
from serve.field_kinds import NAME_SCHEMA, Kind, listed, number, object_schema, text
from serve.openai_api import MAX_METADATA_VALUE
from serve.openai_fields import Fields
from serve.registration import is_pinned_name, servable
from serve.routing import Arm, Registered, Split
from service.domain import check_name
from service.errors import ConfigError, ConflictError, LorayError, NotFoundError
from service.registry import Registry

DEFAULT_KEY = ("header:x-loray-key", "metadata.user", "safety_identifier", "user")
MAX_ARMS = 16
_MAX_TEXT = 200
_KEY = r"header:[a-z0-9-]{1,64}|metadata\.[A-Za-z0-9_.-]{1,64}|safety_identifier|user"
ARM = {
    "model": replace(text(_MAX_TEXT, required=True), wanted="a model such as tickets@3"),
    "weight": number(0, 1e9, required=True),
}
SPLIT = {
    "arms": Kind(  # one by one: `_arms`
        f'an object of 1 to {MAX_ARMS} arms such as {{"control": {{"model": "tickets@3", "weight": 90}}}}',
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": MAX_ARMS,
            "propertyNames": NAME_SCHEMA,
            "additionalProperties": object_schema(ARM),
            "description": "at least one weight above 0",
        },
        lambda value: isinstance(value, dict) and 0 < len(value) <= MAX_ARMS,
        required=True,
    ),
    "salt": text(_MAX_TEXT),
    "key": replace(
        listed(text(pattern=_KEY), least=1, most=MAX_ARMS),
        wanted="a list of header:NAME (lower case), metadata.NAME, safety_identifier or user",
    ),
}


@dataclass(frozen=True)
class WantedSplit:
    """A checked body: weights and models by arm; `salt` None = keep the old one, or make one."""

    arms: dict[str, tuple[str, float]]
    salt: str | None
    key: tuple[str, ...]
    ignored: tuple[str, ...]


def parse_split(raw: Mapping[str, Any]) -> WantedSplit:
    """`{"arms": {name: {"model", "weight"}}, "salt", "key"}`, or RequestError with all that is wrong."""
    fields = Fields(raw, SPLIT)
    salt, key, arms = fields.values["salt"], fields.values["key"], _arms(fields)
    fields.raise_problems()
    return WantedSplit(arms, salt, DEFAULT_KEY if key is None else tuple(key), tuple(fields.ignored))


def _arms(fields: Fields) -> dict[str, tuple[str, float]]:
    arms = {}
    for name, arm in (fields.values["arms"] or {}).items():
        at = f"arms.{name[:_MAX_TEXT]}"
        try:
            check_name(name, "arm")
        except ConfigError as error:
            fields.problem(at, str(error))
        values = fields.look_at(arm if isinstance(arm, dict) else {}, ARM, f"{at}.")
        arms[name] = (str(values["model"]), float(values["weight"] or 0))
    if arms and not fields.problems and not any(weight for _, weight in arms.values()):
        fields.problem("arms", "all weights are 0: nobody would answer. Give one arm more.")
    return arms


def resolved_arms(
    wanted: WantedSplit, base: Base, registry: Registry, adapters: Mapping[str, Registered]
) -> dict[str, Arm]:
    """The version that each arm's model means now; an error names every arm that cannot be served.

    An adapter from a URI is one of those registered here, `adapters`, under the name that answers give it.
    """
    arms, problems = {}, []
    pinned = {entry.model: entry for entry in adapters.values() if entry.source}
    for name, (model, weight) in wanted.arms.items():
        if model == base.name:
            arms[name] = Arm(model=model, digest=base.digest, weight=weight, is_base=True)
            continue
        try:
            entry = pinned.get(model) or servable(model, base, registry)
            arms[name] = Arm(model=entry.model, digest=entry.digest, weight=weight)
        except LorayError as error:
            problems.append(f"arms.{name}: {error}")
    if problems:
        raise ConfigError(" ".join(problems))
    return arms


def with_split(desired: Desired, name: str, wanted: WantedSplit, arms: Mapping[str, Arm]) -> Desired:
    """The split in place, and the versions of its arms registered under their own names: no other name's change loses them.

    The salt stays that of the split before, so that a changed weight moves as few keys as it can.
    """
    before = desired.splits.get(name)
    salt = wanted.salt or (before.salt if before else secrets.token_hex(8))
    split = Split(arms=dict(arms), salt=salt, key=wanted.key, since=desired.epoch)
    new = {
        arm.model: _entry_of(arm, desired)
        for arm in arms.values()
        if not arm.is_base and arm.model not in desired.adapters
    }
    return desired.model_copy(
        update={"adapters": {**desired.adapters, **new}, "splits": {**desired.splits, name: split}}
    )


def _entry_of(arm: Arm, desired: Desired) -> Registered:
    """An arm's version under its own name. One from a URI is in the desired state already, or was a moment ago."""
    pinned = (entry for entry in desired.adapters.values() if entry.source and entry.model == arm.model)
    entry = next(pinned, Registered(model=arm.model, digest=arm.digest))
    if entry.source is None and is_pinned_name(arm.model):
        raise ConflictError(f"adapter {arm.model} was replaced or deleted meanwhile. PUT it again, then the split.")
    return entry.model_copy(update={"since": desired.epoch, "pin": False})


def without_split(desired: Desired, name: str) -> Desired:
    """The name means what it meant without a split. The arms' versions stay registered."""
    if name not in desired.splits:
        known = ", ".join(sorted(desired.splits)) or "none"
        raise NotFoundError(f"there is no split {name!r}. Splits: {known}.")
    return desired.model_copy(update={"splits": {n: s for n, s in desired.splits.items() if n != name}})


def split_body(name: str, split: Split) -> dict[str, Any]:
    """What HTTP says of a split."""
    return {"object": "split", "name": name, **split.model_dump(mode="json")}


def check_split_name(name: str, base: Base) -> None:
    """A public name for a split: plain, and not the base's. Raises ConfigError."""
    if name == base.name:
        raise ConfigError(f"{name!r} is the base model's own name and always means the base. Take another name.")
    check_name(name, "split")


def key_of(spec: tuple[str, ...], headers: Mapping[str, str], about: Mapping[str, str]) -> str | None:
    """The request's key: the first of `spec` that it carries; a header's value cut as those of the body are."""
    for place in spec:
        kind, _, name = place.partition(":")
        value = headers.get(name) if kind == "header" else about.get(place)
        if value:
            return value[:MAX_METADATA_VALUE]
    return None
