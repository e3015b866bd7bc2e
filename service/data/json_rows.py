"""One row of JSON, strictly: an object without duplicate keys, NaN, lone surrogates or absurd depth, or why it is none."""

from __future__ import annotations

import json
import re
from typing import Any

from service.data.records import MAX_COLUMNS, MAX_DEPTH, MAX_ROW_BYTES

_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def decode(text: bytes) -> dict[str, Any] | str:
    """The object, or why there is none."""
    try:
        row = _JSON.decode(text.decode())
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the row is no UTF-8 ({error.reason}). Save the file as UTF-8."
    except RecursionError:
        return _too_deep()
    except ValueError as error:
        return f"no valid JSON: {error}. One JSON object a row."
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, wanted an object: its columns and their values."
    if len(row) > MAX_COLUMNS:
        return f"has {len(row):,} columns, and a row has at most {MAX_COLUMNS:,}. Put long lists into one column."
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_deep(row):
        return _too_deep()
    if b"\\u" in text and (column := _lone_surrogate(row)) is not None:
        return f"{column} has a lone surrogate, which is no text. Re-encode the row."
    return row


def decode_cell(text: str) -> Any:
    """Any value of JSON text that stands in a row, as strictly. Raises ValueError."""
    value = _JSON.decode(text)
    if "\\u" in text and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it has a lone surrogate, which is no text")
    return value


def too_large(num_bytes: int) -> str:
    """What is said of a row that was left out unread."""
    return f"has {num_bytes:,} bytes, and a row has at most {MAX_ROW_BYTES:,}. Is every row on its own, and every quote closed?"


def _too_deep() -> str:
    return f"has lists or objects more than {MAX_DEPTH} deep inside each other. Flatten the row."


def _is_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        inside = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inside if isinstance(value, dict | list)]
    return bool(level)


def _lone_surrogate(row: dict[str, Any]) -> str | None:
    """The column in which there is one, in a key or in a value."""
    return next((key for key in row if _LONE_SURROGATE.search(json.dumps([key, row[key]], ensure_ascii=False))), None)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {json.dumps(twice)} stands twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:40]} is larger than any float")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
