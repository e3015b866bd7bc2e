"""What one field of a JSON body takes: the check of a value, the same in words, and the same as JSON Schema.

A request is a table of them by name (`openai_api.CHAT`, `splits.SPLIT`). `openai_fields.Fields` reads bodies by such a
table, `openapi.py` describes them by it: what is accepted and what is documented cannot differ. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.domain import NAME_PATTERN

INT64 = 2**63
NAME_SCHEMA = {"type": "string", "pattern": f"^({NAME_PATTERN.pattern})$", "not": {"pattern": r"\.\."}}  # check_name's


@dataclass(frozen=True)
class Kind:
    """Values that `takes` accepts, `wanted` names ("must be ...") and `schema` describes.

    Left out, a field is its `default`; null means the same, unless it is `required`. A rule between fields, or inside a
    value that is looked at piece by piece, is the reader's own, and belongs in the schema's description.
    """

    wanted: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    takes: Callable[[Any], bool] = lambda value: True
    default: Any = None
    required: bool = False


ANYTHING = Kind("anything")
BOOLEAN = Kind("true or false", {"type": "boolean"}, lambda value: isinstance(value, bool), default=False)


def number(
    low: float, high: float, default: float | None = None, *, above: bool = False, required: bool = False
) -> Kind:
    """From `low` to `high`; with `above`, more than `low`."""

    def takes(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (low < value if above else low <= value) and value <= high  # infinities fail here

    bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}
    return Kind(f"a number {bounds}", schema, takes, default, required)


def integer(low: int, high: int = INT64 - 1, default: int | None = None) -> Kind:
    """From `low` to `high`, written without a point."""

    def takes(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Kind(
        f"an integer from {low} to {high}", {"type": "integer", "minimum": low, "maximum": high}, takes, default
    )


def text(most: int | None = None, *, pattern: str | None = None, required: bool = False) -> Kind:
    """A text that is not empty, of at most `most` characters, all of it matching `pattern`."""

    def takes(value: Any) -> bool:
        fits = is_text(value) and len(value) > 0 and (most is None or len(value) <= most)
        return fits and (pattern is None or re.fullmatch(pattern, value) is not None)

    wanted = f"a text{'' if most is None else f' of at most {most} characters'}, not empty"
    schema: dict[str, Any] = {"type": "string", "minLength": 1}
    if most is not None:
        schema["maxLength"] = most
    if pattern is not None:
        schema["pattern"], wanted = f"^({pattern})$", f"a text such as {pattern}"
    return Kind(wanted, schema, takes, required=required)


def one_of(*values: Any, required: bool = False) -> Kind:
    """One of these values."""
    wanted = f"one of {', '.join(json.dumps(value) for value in values)}"
    return Kind(wanted, {"enum": list(values)}, lambda value: _is_among(value, values), required=required)


def neutral(*values: Any) -> Kind:
    """A field that is known and not supported: only what asks for nothing."""
    wanted = f"{' or '.join(['null', *map(json.dumps, values)])} (more is not supported here)"
    return Kind(wanted, {"enum": [*values, None]}, lambda value: _is_among(value, values))


def listed(item: Kind, least: int = 0, most: int | None = None, *, required: bool = False) -> Kind:
    """A list of `least` to `most` items of one kind."""

    def takes(value: Any) -> bool:
        fits = isinstance(value, list) and least <= len(value) and (most is None or len(value) <= most)
        return fits and all(item.takes(one) for one in value)

    sizes = f"at least {least}" if most is None else f"{least} to {most}"
    schema: dict[str, Any] = {"type": "array", "items": item.schema, "minItems": least}
    if most is not None:
        schema["maxItems"] = most
    return Kind(f"a list of {sizes} items, each {item.wanted}", schema, takes, required=required)


def mapped(keys: str, pattern: str, item: Kind, most: int) -> Kind:
    """An object of at most `most` values of one kind; `keys` says in words what `pattern` says of its keys."""

    def takes(value: Any) -> bool:
        fits = isinstance(value, dict) and len(value) <= most
        return fits and all(re.fullmatch(pattern, key) and item.takes(one) for key, one in value.items())

    schema = {
        "type": "object",
        "propertyNames": {"pattern": f"^({pattern})$"},
        "additionalProperties": item.schema,
        "maxProperties": most,
    }
    return Kind(f"an object of at most {most} {keys}, each with {item.wanted}", schema, takes)


def either(*kinds: Kind, required: bool = False) -> Kind:
    """Any of these kinds."""
    return Kind(
        ", or ".join(kind.wanted for kind in kinds),
        {"anyOf": [kind.schema for kind in kinds]},
        lambda value: any(kind.takes(value) for kind in kinds),
        required=required,
    )


def object_schema(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """An object of these fields as JSON Schema. Others may stand beside them: they are ignored, and named as such."""
    required = [name for name, kind in kinds.items() if kind.required]
    properties = {name: _schema_of(kind) for name, kind in kinds.items()}
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def is_text(value: Any) -> bool:
    """A string that is valid Unicode: JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Equal to one of them and of the same JSON type: in Python True == 1 and False == 0."""
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in values)


def _schema_of(kind: Kind) -> dict[str, Any]:
    if kind.required or not kind.schema or None in kind.schema.get("enum", ()):
        return dict(kind.schema)
    default = {} if kind.default is None else {"default": kind.default}
    return {"anyOf": [kind.schema, {"type": "null"}], **default}
