"""Where things are: two roots, read from the environment once and passed on as a value.

`LORAY_HOME` is the truth, shared by all nodes: a directory or `s3://bucket/prefix`. `LORAY_CACHE` is a directory of
this node that may be deleted at any time. Nothing else in loray reads these two variables. What lies below the roots is
described in `registry.py` and `runs.py`; how bytes get there, in `storage.py`. This file touches no network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service import storage
from service.errors import ConfigError

DEFAULT_HOME = "~/.loray"
_POD = "KUBERNETES_SERVICE_HOST"  # the kubelet sets it in every container


@dataclass(frozen=True)
class Settings:
    """`home` is an absolute path or an s3:// URI without a trailing slash, `cache` an absolute path."""

    home: str
    cache: Path


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The two roots. An empty variable counts as unset. Raises ConfigError with every problem, one a line."""
    problems: list[str] = []
    home = _home(environ.get("LORAY_HOME") or DEFAULT_HOME, environ, problems)
    cache = _cache(environ.get("LORAY_CACHE") or "~/.cache/loray", environ, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return Settings(home, cache)


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A directory for a while, in the cache, which has room for whole models: the system's own may be a small one in memory."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aside-", dir=cache) as directory:
        yield Path(directory)


def _home(value: str, environ: Mapping[str, str], problems: list[str]) -> str:
    try:
        if not storage.is_local(value):
            return value.rstrip("/")
    except ConfigError as error:
        problems.append(f"LORAY_HOME: {error}")
        return value
    own = storage.local_path(_expand(DEFAULT_HOME, environ))
    if environ.get(_POD) and (value.startswith("~") or storage.local_path(value) == own):
        problems.append(
            f"LORAY_HOME is {value}, and this is a Kubernetes pod: what is written there is gone with the pod, and no other "
            "pod sees it. Set LORAY_HOME to s3://bucket/prefix, or to a directory of a volume that all pods mount."
        )
        return value
    return str(_directory("LORAY_HOME", value, environ, problems))


def _cache(value: str, environ: Mapping[str, str], problems: list[str]) -> Path:
    if "://" in value and not value.startswith("file://"):
        problems.append("LORAY_CACHE is a URI, and must be a directory of this node, for example ~/.cache/loray.")
        return Path(value)
    return _directory("LORAY_CACHE", value, environ, problems)


def _directory(variable: str, value: str, environ: Mapping[str, str], problems: list[str]) -> Path:
    path = storage.local_path(_expand(value, environ))
    if path.exists() and not path.is_dir():
        problems.append(f"{variable} is {path}, a file, and must be a directory. Name another, or move the file away.")
    return path


def _expand(value: str, environ: Mapping[str, str]) -> str:
    if value == "~" or value.startswith("~/"):
        return environ.get("HOME", str(Path.home())) + value[1:]
    return value
