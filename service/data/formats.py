"""From a JSONL file to conversations, or to one error that names every bad row and field.

Two shapes are read: `{"messages": [{"role", "content"}, ...]}` and `{"prompt": "...", "completion": "..."}`. Row numbers
are line numbers, from 1, as an editor shows them.
"""

from __future__ import annotations

import json
from typing import Any

from service import storage
from service.data.rows import Conversation, Row
from service.errors import DataError, NotFoundError
from service.render import ROLES, Message

MAX_PROBLEMS_SHOWN = 20


def read_rows(uri: str) -> list[Row]:
    """All rows of a JSONL file. Raises DataError that lists the bad ones, by row and field, with the remedy."""
    return parse_rows(read_data(uri), uri)


def read_data(uri: str) -> bytes:
    """The file's bytes. Raises DataError when it does not exist or is empty."""
    try:
        data = storage.read_bytes(uri)
    except NotFoundError:
        raise DataError(f"{uri}: the data file does not exist. Check data.train and data.eval.") from None
    if not data.strip():
        raise DataError(f"{uri}: the data file is empty. It needs one JSON object a line.")
    return data


def parse_rows(data: bytes, name: str) -> list[Row]:
    """The rows in `data`; `name` is for messages."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is no UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            parsed = _parse_line(line)
            if isinstance(parsed, tuple):
                rows.append(Row(number, Conversation(parsed)))
            else:
                problems += [f"row {number}: {problem}" for problem in parsed]
    if problems:
        shown = [f"  {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
        more = len(problems) - len(shown)
        tail = [f"  ... and {more} more"] if more > 0 else []
        raise DataError("\n".join([f"{name}: {len(problems)} problem(s). Mend these rows.", *shown, *tail]))
    return rows


def _parse_line(line: str) -> tuple[Message, ...] | list[str]:
    """The messages of one line, or its problems."""
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return [f"no valid JSON: {error}. One JSON object a line."]
    if not isinstance(row, dict):
        return [f"a JSON {type(row).__name__}, wanted an object with messages, or with prompt and completion."]
    if "messages" in row:
        return _messages(row["messages"])
    if "prompt" in row or "completion" in row:
        return _prompt_completion(row)
    return [f"no field 'messages' and no 'prompt' and 'completion'; it has {sorted(row)[:8]}."]


def _prompt_completion(row: dict[str, Any]) -> tuple[Message, ...] | list[str]:
    problems = []
    for field in ("prompt", "completion"):
        if field not in row:
            problems.append(f"field '{field}' is missing.")
        else:
            problems += _text_problems(row[field], field)
    if problems:
        return problems
    return ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})


def _messages(messages: Any) -> tuple[Message, ...] | list[str]:
    if not isinstance(messages, list) or not messages:
        return [f"messages is {_shown(messages)}, wanted a list of at least one user and one assistant message."]
    problems: list[str] = []
    for index, message in enumerate(messages):
        problems += _message_problems(message, f"messages[{index}]")
    if not problems and messages[-1]["role"] != "assistant":
        problems.append(
            f"the last message has the role {messages[-1]['role']!r}, wanted assistant: the answer to learn."
        )
    elif not problems and len(messages) == 1:
        problems.append("messages has only an answer, wanted the user's message before it.")
    if problems:
        return problems
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _message_problems(message: Any, field: str) -> list[str]:
    if not isinstance(message, dict):
        return [f"{field} is {_shown(message)}, wanted an object with role and content."]
    problems = []
    unknown = sorted(set(message) - {"role", "content"})
    if unknown:
        problems.append(f"{field} has the field(s) {unknown}, which this version does not train. Remove them.")
    if message.get("role") not in ROLES:
        problems.append(f"{field}.role is {_shown(message.get('role'))}, wanted one of {', '.join(ROLES)}.")
    if "content" not in message:
        problems.append(f"{field}.content is missing.")
    else:
        problems += _text_problems(message["content"], f"{field}.content")
    return problems


def _text_problems(value: Any, field: str) -> list[str]:
    if not isinstance(value, str):
        return [f"{field} is {_shown(value)}, wanted text."]
    if not value.strip():
        return [f"{field} is empty."]
    if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        return [f"{field} has a lone surrogate, which is no text. Re-encode the row."]
    return []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key stands twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
