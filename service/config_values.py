"""YAML text and `--set` arguments as nested mappings, and back to dotted names. Knows no key and no block of any config.

YAML is read strictly: no duplicate keys, no objects, and `1e-4` is a number. What the values mean is `config.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from service.errors import ConfigError


def read_text(path: str, what: str, kind: str = "YAML") -> str:
    """The file's text, or ConfigError that says which file is missing or unreadable, and what `kind` of file is wanted."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{what} {path!r} does not exist under {Path.cwd()}. Give the path of a {kind} file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path!r} cannot be read as UTF-8 text: {error}.") from None


def mapping(text: str, origin: str) -> dict[str, Any]:
    """A YAML document as a mapping of keys. Raises ConfigError for anything else."""
    values = _yaml(text, origin)
    if not isinstance(values, dict):
        seen = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{origin} is {seen}, and must be a mapping of keys such as model, data and optim.")
    return {str(key): value for key, value in values.items()}


def override(text: str) -> tuple[str, Any]:
    """`optim.lr=1e-4` as its dotted name and its value, read as YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"--set {text!r} is no dotted.key=value. Write for example --set optim.max_steps=4.")
    return key, _yaml(value, f"the value of --set {text!r}")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted name, in order. An empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nest(key: str, value: Any) -> dict[str, Any]:
    """`value` in as many mappings as its dotted name has parts."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def value_at(values: Any, key: str) -> Any:
    """The value of a dotted name; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted name. Mappings on the way are copied: in YAML two keys may share one."""
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        values[parent] = dict(child) if isinstance(child, Mapping) else {}
        values = values[parent]
    values[last] = value


def take_out(values: dict[str, Any], key: str) -> None:
    """Remove a dotted name that is there."""
    parent, _, last = key.rpartition(".")
    kept = {name: value for name, value in value_at(values, parent).items() if name != last}
    put(values, parent, kept)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats (`1e-4` is a number) and without duplicate keys."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, see above
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is no valid YAML: {' '.join(str(error).split())}") from None
