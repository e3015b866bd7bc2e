"""OpenAI's chat completion request: a body checked into a `ChatRequest`, all problems at once.

Pure: bytes in, values out; no Ray, no HTTP framework, no engine. Nothing in a body is ignored in silence: a known field
that would change the answer and is not supported is an error unless its value is neutral, a field without effect on the
answer is accepted, and a field nobody knows is named in `ChatRequest.ignored`. What goes back is in `openai_answers.py`.
Field list: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import RequestError

MAX_STOPS = 4
MAX_NAME = 200
# A body of 4 MiB can hold two million messages, each of them wrong; what is read and told of it is bounded.
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # over all messages
SHOWN_PROBLEMS = 20
# `developer` is OpenAI's newer word for `system`; chat templates know only the older one.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_READ = frozenset(
    [
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
    ]
)
_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    ]
)
# Known, not supported: the values that ask for nothing. `null` is neutral everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
# Of a message. An assistant's message dumped by OpenAI's client carries these as null or [].
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
_INT64 = 2**63


@dataclass(frozen=True)
class ChatRequest:
    """A checked body. `max_tokens` None = as many as the context holds; `ignored` are the fields nobody knows."""

    model: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None
    max_tokens_field: str
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


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


def parse_chat(body: bytes) -> ChatRequest:
    """The request in `body`, or RequestError that lists every problem and names the first one's field."""
    raw = parse_object(body)
    reader = _Reader(raw)
    for name, neutral in _NEUTRAL.items():
        reader.refuse(name, raw.get(name), neutral)
    reader.ignored += sorted(set(raw) - _READ - _WITHOUT_EFFECT - set(_NEUTRAL))
    max_tokens, field = reader.max_tokens()
    stream = reader.boolean("stream")
    request = ChatRequest(
        model=reader.model(),
        messages=reader.messages(),
        max_tokens=max_tokens,
        max_tokens_field=field,
        temperature=reader.number("temperature", 1.0, 0.0, 2.0),
        top_p=reader.number("top_p", 1.0, 0.0, 1.0, above=True),
        seed=reader.integer("seed", -_INT64, _INT64 - 1),
        stop=reader.stop(),
        stream=stream,
        include_usage=reader.include_usage(stream),
        ignored=tuple(reader.ignored),
    )
    reader.raise_problems()
    return request


class _Reader:
    """Reads fields of one body, collecting problems; a field with a problem reads as its default."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[tuple[str, str]] = []  # the first SHOWN_PROBLEMS of them
        self.num_problems = 0
        self.num_parts = 0
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
        if value is None or any(_same(value, allowed) for allowed in neutral):
            return
        shown = " or ".join(["null", *(json.dumps(allowed) for allowed in neutral)])
        self.problem(field, f"not supported here (got {_shown(value)}). Leave it out, or send {shown}.")

    def model(self) -> str:
        value = self.raw.get("model")
        if not _is_text(value) or not 0 < len(str(value)) <= MAX_NAME:
            text = f"must be a model's name of at most {MAX_NAME} characters, not {_shown(value)}."
            self.problem("model", f"{text} GET /v1/models lists them.")
            return ""
        return str(value)

    def number(self, field: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        value = self.raw.get(field)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (low < value if above else low <= value) and value <= high:  # infinities fail here
            return float(value)
        bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        self.problem(field, f"must be a number {bounds}, not {_shown(value)}.")
        return default

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.raw.get(field)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self.problem(field, f"must be an integer from {low} to {high}, not {_shown(value)}.")
        return None

    def boolean(self, field: str) -> bool:
        value = self.raw.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(field, f"must be true or false, not {_shown(value)}.")
        return False

    def max_tokens(self) -> tuple[int | None, str]:
        old = self.integer("max_tokens", 1, _INT64 - 1)
        new = self.integer("max_completion_tokens", 1, _INT64 - 1)
        if old is not None and new is not None and old != new:
            self.problem("max_completion_tokens", f"is {new} while max_tokens is {old}. Send one of the two.")
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")

    def stop(self) -> tuple[str, ...]:
        value = self.raw.get("stop")
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and len(stops) <= MAX_STOPS and all(_is_text(s) and s for s in stops):
            return tuple(stops)
        self.problem("stop", f"must be a text or a list of at most {MAX_STOPS} texts, none empty, not {_shown(value)}.")
        return ()

    def include_usage(self, stream: bool) -> bool:
        options = self.raw.get("stream_options")
        if options is None:
            return False
        if not isinstance(options, dict):
            self.problem("stream_options", f"must be an object, not {_shown(options)}.")
            return False
        if not stream:
            self.problem("stream_options", "is allowed only together with stream: true.")
        # include_obfuscation pads chunks against traffic analysis on the open internet; the answer is the same.
        known = {"include_usage", "include_obfuscation"}
        self.ignored += [f"stream_options.{key}" for key in sorted(set(options) - known)]
        wanted = options.get("include_usage")
        if wanted is not None and not isinstance(wanted, bool):
            self.problem("stream_options.include_usage", f"must be true or false, not {_shown(wanted)}.")
        return wanted is True

    def messages(self) -> tuple[dict[str, str], ...]:
        value = self.raw.get("messages")
        if not isinstance(value, list) or not value:
            self.problem("messages", f"must be a list of at least one message, not {_shown(value)}.")
            return ()
        if len(value) > MAX_MESSAGES:
            self.problem("messages", f"holds {len(value)} messages, at most {MAX_MESSAGES} are taken. Send fewer.")
            return ()
        return tuple(self._message(f"messages[{i}]", message) for i, message in enumerate(value))

    def _message(self, at: str, message: Any) -> dict[str, str]:
        if not isinstance(message, dict):
            self.problem(at, f"must be an object with role and content, not {_shown(message)}.")
            return {}
        for name, neutral in _MESSAGE_NEUTRAL.items():
            self.refuse(f"{at}.{name}", message.get(name), neutral)
        self.ignored += [f"{at}.{k}" for k in sorted(set(message) - {"role", "content"} - set(_MESSAGE_NEUTRAL))]
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            self.problem(f"{at}.role", f"must be one of {', '.join(ROLES)}, not {_shown(role)}.")
            role = "user"
        return {"role": ROLES[role], "content": self._content(f"{at}.content", message.get("content"))}

    def _content(self, at: str, content: Any) -> str:
        if _is_text(content):
            return str(content)
        if not isinstance(content, list) or not content:
            self.problem(at, f"must be a text or a list of text parts, not {_shown(content)}.")
            return ""
        self.num_parts += len(content)
        if self.num_parts > MAX_PARTS:
            self.problem(at, f"all messages together have more than {MAX_PARTS} parts. Join the texts, or send fewer.")
            return ""
        texts = []
        for i, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") == "text" and _is_text(part.get("text")):
                texts.append(part["text"])
                self.ignored += [f"{at}[{i}].{key}" for key in sorted(set(part) - {"type", "text"})]
            else:
                self.problem(f"{at}[{i}]", f'must be {{"type": "text", "text": "..."}}, not {_shown(part)}.')
        return "".join(texts)


def _is_text(value: Any) -> bool:
    """A string that is valid Unicode: JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _same(value: Any, allowed: Any) -> bool:
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


def _shown(value: Any) -> str:
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
        raise RequestError(f"The key {_shown(twice)} stands twice in one object. Send it once.", twice[:MAX_NAME])
    return names
