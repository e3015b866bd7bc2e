"""The nouns of loray, each a frozen value with no behaviour beyond its own consistency.

`ModelRef` is how a Model version is written down, `Manifest` what stands beside its weights, `RunState` the life of a
Run. Reading and writing them is the business of `registry.py` and `runs.py`. This file imports the standard library and
pydantic only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

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


class Manifest(BaseModel):
    """What stands beside a Model's weights as `manifest.json`, written last. Digests are sha256, hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest_schema: Literal[1] = 1
    ref: str
    kind: Literal["adapter"]
    digest: str  # over the files below: the Model's identity everywhere
    files: dict[str, FileEntry]
    base_model: str  # as the run file named it
    base_digest: str
    renderer_digest: str
    rank: int
    alpha: float
    config: dict[str, Any]
    data: dict[str, Any]  # digests and counts of the training and evaluation rows
    metrics: dict[str, float]
    run: str
    created_at: str  # ISO 8601, UTC
    versions: dict[str, str]  # of loray and the libraries that made it


class FileEntry(BaseModel):
    """One file of a Model: its size in bytes and its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


Manifest.model_rebuild()
