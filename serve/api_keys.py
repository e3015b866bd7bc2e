"""API keys of an endpoint: who may do what. Secrets are known here by their SHA-256 only. Pure but for reading the file.

`LORAY_API_KEYS` holds secrets with their scopes, `infer:SECRET,infer+admin:SECRET`; a keys file (`keys:` in the serve file)
holds a YAML list of `{name, scopes, sha256}`, as `loray keys new` prints them. A secret is 16 characters or more, from a
random source: that is why a plain hash is enough. Without any key an endpoint listens on loopback only.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from service.config import read_text
from service.errors import ConfigError

VARIABLE = "LORAY_API_KEYS"
SCOPES = ("infer", "train", "experiment", "admin")
SHORTEST_SECRET = 16
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ApiKey:
    """One key. `admin` may do everything."""

    name: str
    scopes: frozenset[str]
    sha256: str

    def may(self, scope: str) -> bool:
        """Whether it has this scope."""
        return scope in self.scopes or "admin" in self.scopes


def load_keys(environ: Mapping[str, str], file: str | None) -> tuple[ApiKey, ...]:
    """The keys of the environment and of the file. ConfigError with every problem; no secret is in its text."""
    problems: list[str] = []
    keys = _from_variable(environ.get(VARIABLE, ""), problems)
    if file is not None:
        keys += _from_file(file, problems)
    names = [key.name for key in keys]
    problems += [f"keys: the name {name!r} stands twice." for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(keys)


def key_for(authorization: str | None, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    """The key that an `Authorization: Bearer SECRET` header shows, or None. Takes the same time for any wrong secret."""
    kind, _, secret = (authorization or "").partition(" ")
    digest = _sha256(secret.strip()) if kind.lower() == "bearer" else ""
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def new_key(name: str, scopes: tuple[str, ...]) -> tuple[str, str]:
    """A fresh secret, and its line for a keys file. ConfigError for an unknown scope."""
    problems: list[str] = []
    _check_scopes(scopes, "scopes", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    secret = f"lk-{secrets.token_urlsafe(32)}"
    return secret, yaml.safe_dump([{"name": name, "scopes": list(scopes), "sha256": _sha256(secret)}], sort_keys=False)


def _from_variable(text: str, problems: list[str]) -> list[ApiKey]:
    keys = []
    for number, entry in enumerate((entry for entry in text.split(",") if entry.strip()), start=1):
        scopes, colon, secret = entry.strip().partition(":")
        at = f"{VARIABLE}, key {number}"
        if not colon:
            problems.append(f"{at}: has no scopes. Write infer:SECRET or infer+admin:SECRET.")
            continue
        if not set(scopes.split("+")) <= set(SCOPES):  # not shown: it may be the secret, in the wrong place
            problems.append(f"{at}: has an unknown scope before the colon; known are {', '.join(SCOPES)}.")
        if len(secret) < SHORTEST_SECRET:
            problems.append(f"{at}: the secret has {len(secret)} characters, {SHORTEST_SECRET} or more are wanted.")
        keys.append(ApiKey(f"{VARIABLE}-{number}", frozenset(scopes.split("+")), _sha256(secret)))
    return keys


def _from_file(file: str, problems: list[str]) -> list[ApiKey]:
    try:
        rows = yaml.safe_load(read_text(file, "keys file"))
    except yaml.YAMLError as error:
        problems.append(f"keys: {file} is no YAML: {str(error)[:200]}")
        return []
    if not isinstance(rows, list) or not rows:
        problems.append(f"keys: {file} must hold a list of {{name, scopes, sha256}}. Make one with `loray keys new`.")
        return []
    return [
        key for number, row in enumerate(rows, start=1) if (key := _from_row(row, f"{file}, key {number}", problems))
    ]


def _from_row(row: Any, at: str, problems: list[str]) -> ApiKey | None:
    if not isinstance(row, dict) or set(row) != {"name", "scopes", "sha256"}:
        shown = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
        problems.append(f"{at}: has {shown}; name, scopes and sha256 are wanted.")
        return None
    name, scopes, digest = row["name"], row["scopes"], row["sha256"]
    if not isinstance(name, str) or not name:
        problems.append(f"{at}: name must be a text.")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        problems.append(f"{at}: sha256 must be 64 hexadecimal digits in lower case.")
    if not isinstance(scopes, list):
        problems.append(f"{at}: scopes must be a list.")
        return None
    _check_scopes(scopes, at, problems)
    return ApiKey(str(name), frozenset(map(str, scopes)), str(digest))


def _check_scopes(scopes: Any, at: str, problems: list[str]) -> None:
    unknown = [str(scope) for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        problems.append(f"{at}: scopes are {', '.join(unknown) or 'missing'}; known are {', '.join(SCOPES)}.")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
