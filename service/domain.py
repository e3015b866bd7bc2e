"""The nouns of loray, each a frozen value with no behaviour beyond its own consistency.

`ModelRef` is how a Model version is written down, `ManifestDraft` what its publisher knows, `Manifest` what stands beside
its weights, `RunState` the life of a Run. Reading and writing them is the business of `registry.py` and `runs.py`. This file imports the standard library and
pydantic only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from service.errors import ConfigError

DEFAULT_PROJECT = "default"
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_MAX_DIGITS = 18  # what fits a signed 64-bit integer; Python reads no integer of thousands of digits at all
_REF = re.compile(r"(?:(?P<project>[^/@]+)/)?(?P<name>[^/@]+)(?:@(?P<selector>[^/@]+))?")


def check_name(value: str, what: str) -> str:
    """`value`, or ConfigError. Names become path segments: lower case, digits, `.`, `_`, `-`; never `..`."""
    if not NAME_PATTERN.fullmatch(value) or ".." in value:
        raise ConfigError(
            f"{what} {value!r} is no valid name. Use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit."
        )
    return value


@dataclass(frozen=True, order=True)
class ModelRef:
    """`[project/]name[@selector]`: the selector is a version (`3`), an alias (`production`), or absent.

    >>> str(ModelRef.parse("tickets@3"))
    'tickets@3'
    """

    project: str
    name: str
    selector: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Raises ConfigError on anything that is not `[project/]name[@version-or-alias]`."""
        match = _REF.fullmatch(text)
        if not match:
            raise ConfigError(f"model {text!r} is no model name. Write [project/]name@version, for example tickets@3.")
        project = check_name(match["project"] or DEFAULT_PROJECT, "project")
        name = check_name(match["name"], "model name")
        selector = match["selector"]
        if selector is not None and not (selector.isascii() and selector.isdigit()):
            check_name(selector, "alias")
        elif selector is not None and len(selector) > _MAX_DIGITS:
            raise ConfigError(
                f"version {selector[:_MAX_DIGITS]}... of {name} has {len(selector)} digits, at most {_MAX_DIGITS} make sense."
                " Write [project/]name@version, for example tickets@3."
            )
        return cls(project, name, selector)

    @property
    def version(self) -> int | None:
        """The version number, where the selector is one."""
        return int(self.selector) if self.selector and self.selector.isdigit() else None

    @property
    def alias(self) -> str | None:
        """The alias, where the selector is one."""
        return self.selector if self.selector and not self.selector.isdigit() else None

    def at(self, version: int) -> ModelRef:
        """The same model, at this version."""
        return ModelRef(self.project, self.name, str(version))

    @property
    def family(self) -> str:
        """`[project/]name`, without version or alias."""
        return self.name if self.project == DEFAULT_PROJECT else f"{self.project}/{self.name}"

    def __str__(self) -> str:
        return f"{self.family}@{self.selector}" if self.selector else self.family


class RunState(StrEnum):
    """`created -> running -> succeeded | failed | stopped`; all but `succeeded` may go back to `running` by --resume."""

    CREATED = "created"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"  # never written: read off a `running` whose heartbeat has stopped


class FileEntry(BaseModel):
    """One file of a Model: its size in bytes and its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


ModelKind = Literal["adapter", "full"]
BaseBits = Literal[16, 8, 4]  # in which a base is held while an adapter is trained on it; 16: as `precision` says


class MergeRecord(BaseModel):
    """The adapter that a full model was merged from, and how far apart their answers are: KL(adapter || merged), in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: str  # name@version
    digest: str  # of the adapter
    kl_mean: float  # per token
    kl_max: float
    kl_bound: float  # on the mean, under which it was published
    tokens: int  # compared
    data: str  # where the compared rows came from


class ManifestDraft(BaseModel):
    """What the publisher of a Model knows; the registry adds the rest. Digests are sha256, hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ModelKind = "adapter"
    method: str = "lora"  # method.type of the run
    base_model: str  # as the run file named it
    base_digest: str
    base_bits: BaseBits = 16
    renderer_digest: str
    rank: int = 0  # of an adapter; a full model has none
    alpha: float = 0.0
    config: dict[str, Any] = {}
    data: dict[str, Any] = {}  # digests and counts of the training and evaluation rows
    metrics: dict[str, float] = {}
    run: str = ""
    merged_from: MergeRecord | None = None
    versions: dict[str, str] = {}  # of loray and the libraries that made it

    @model_validator(mode="after")
    def _rank_is_of_adapters(self) -> Self:
        if self.kind == "adapter" and not (self.rank >= 1 and self.alpha > 0):
            raise ValueError(f"an adapter has a rank and an alpha, here they are {self.rank} and {self.alpha}")
        if self.kind == "full" and (self.rank or self.alpha):
            raise ValueError(f"a full model has no rank and no alpha, here they are {self.rank} and {self.alpha}")
        return self


class Manifest(ManifestDraft):
    """What stands beside a Model's weights as `manifest.json`, written last."""

    manifest_schema: Literal[1] = 1
    ref: str
    digest: str  # over the files below: the Model's identity everywhere
    files: dict[str, FileEntry]
    created_at: str  # ISO 8601, UTC
