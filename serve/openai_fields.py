"""Reading the fields of one JSON body: what is wrong is collected by its field, and raised all at once.

Pure: bytes in, values out; no Ray, no HTTP framework, no engine. What a field takes is in `field_kinds.py`, what the fields
mean in `openai_api.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from serve.field_kinds import Kind
from service.errors import RequestError

SHOWN_PROBLEMS = 20
_MAX_KEY = 200


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, UTF-8. Raises RequestError on anything else: NaN, Infinity and double keys included."""
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError("The body is nested too deeply to be a request.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise RequestError(f"The body is no valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError(f"The body is {_kind(value)} and must be a JSON object such as {{...}}.")
    return value


class Fields:
    """Reads fields of one body, collecting problems; a field with a problem reads as its default."""

    def __init__(self, raw: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
        self.raw = raw
        self.problems: list[tuple[str, str]] = []  # the first SHOWN_PROBLEMS of them
        self.num_problems = 0
        self.ignored: list[str] = []
        self.values = self.look_at(raw, kinds)

    def look_at(self, raw: Mapping[str, Any], kinds: Mapping[str, Kind], at: str = "") -> dict[str, Any]:
        """The value of every field of this table; `at` is where in the body the object stands. Notes what nobody knows."""
        values = {}
        for name, kind in kinds.items():
            value = raw.get(name)
            is_right = not kind.required if value is None else kind.takes(value)
            if not is_right:
                self.problem(f"{at}{name}", f"must be {kind.wanted}, not {shown(value)}.")
            values[name] = kind.default if value is None or not is_right else value
        self.ignored += [f"{at}{name}" for name in sorted(set(raw) - set(kinds))]
        return values

    def problem(self, field: str, text: str) -> None:
        self.num_problems += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append((field, f"{field}: {text}"))

    def raise_problems(self) -> None:
        if self.problems:
            more = self.num_problems - len(self.problems)
            texts = [text for _, text in self.problems] + ([f"... and {more} more problems."] if more else [])
            raise RequestError(" ".join(texts), self.problems[0][0])


def _kind(value: Any) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def shown(value: Any) -> str:
    """A value for a message: as JSON, short, and only ASCII."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        text = _kind(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_constant(name: str) -> Any:
    raise RequestError(f"The body holds {name}, which is no JSON. Send finite numbers.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RequestError(f"The key {shown(twice)} stands twice in one object. Send it once.", twice[:_MAX_KEY])
    return names
