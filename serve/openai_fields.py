"""Reading the fields of one JSON body: what is wrong is collected by its field, and raised all at once.

Pure: bytes in, values out; no Ray, no HTTP framework, no engine. What the fields mean is in `openai_api.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from service.errors import RequestError

SHOWN_PROBLEMS = 20
_MAX_KEY = 200


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises RequestError on anything else: NaN, Infinity and double keys included."""
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_unique)
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

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[tuple[str, str]] = []  # the first SHOWN_PROBLEMS of them
        self.num_problems = 0
        self.ignored: list[str] = []

    def problem(self, field: str, text: str) -> None:
        self.num_problems += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append((field, f"{field}: {text}"))

    def raise_problems(self) -> None:
        if self.problems:
            more = self.num_problems - len(self.problems)
            texts = [text for _, text in self.problems] + ([f"... and {more} more problems."] if more else [])
            raise RequestError(" ".join(texts), self.problems[0][0])

    def refuse(self, field: str, value: Any, neutral: tuple[Any, ...]) -> None:
        """A field we know and do not support: an error unless its value asks for nothing."""
        if value is None or any(same(value, one) for one in neutral):
            return
        allowed = " or ".join(["null", *(json.dumps(one) for one in neutral)])
        self.problem(field, f"not supported here (got {shown(value)}). Leave it out, or send {allowed}.")

    def number(self, field: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        value = self.raw.get(field)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (low < value if above else low <= value) and value <= high:  # infinities fail here
            return float(value)
        bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        self.problem(field, f"must be a number {bounds}, not {shown(value)}.")
        return default

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.raw.get(field)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.problem(field, f"must be an integer from {low} to {high}, not {shown(value)}.")
        return None

    def boolean(self, field: str) -> bool:
        value = self.raw.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(field, f"must be true or false, not {shown(value)}.")
        return False


def is_text(value: Any) -> bool:
    """A string that is valid Unicode: JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def same(value: Any, allowed: Any) -> bool:
    """Equal and of the same JSON type: in Python True == 1 and False == 0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


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
