"""A prompt's text with `{column}` where a column's value goes: `Translate to {language}:\n{text}`. `{{` is a brace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from string import Formatter
from typing import Any

from service.errors import DataError

ALPACA = "alpaca"  # the name of the one that is built in
# github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT
_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
_ALPACA_WITH_INPUT = f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_WRITE}### Input:\n{{input}}\n\n### Response:"
_ALPACA_WITHOUT = f"{_ALPACA_TASK}. {_ALPACA_WRITE}### Response:"


def check(template: str, columns: Iterable[str], name: str) -> None:
    """DataError where a template is none, or names a column that is not there."""
    wanted = (
        ["instruction"] if template == ALPACA else [column for _, column in _parsed(template) if column is not None]
    )
    if unknown := sorted(set(wanted) - set(columns)):
        raise DataError(
            f"{name}: data.template names {unknown}, and the columns are {sorted(columns)[:20]}. Double a brace to mean itself."
        )


def fill(template: str, values: Mapping[str, Any], problems: list[str]) -> str:
    """The text for a row; a line to `problems` for each column that it lacks."""
    text = ""
    for literal, column in _parsed(_text(template, values)):
        text += literal
        if column is not None and values.get(column) is None:
            problems.append(f"column '{column}' has no value, and data.template names it.")
        elif column is not None:
            text += _written(values[column])
    return text


def fixed(template: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the text for a row, what the template says: before its first column, between each two, and after the last."""
    parts = [""]
    for literal, column in _parsed(_text(template, values)):
        parts[-1] += literal
        if column is not None:
            parts.append("")
    return tuple(parts)


def _text(template: str, values: Mapping[str, Any]) -> str:
    if template != ALPACA:
        return template
    return _ALPACA_WITH_INPUT if values.get("input") else _ALPACA_WITHOUT


@lru_cache(maxsize=64)
def _parsed(template: str) -> tuple[tuple[str, str | None], ...]:
    """Literal texts, and the column behind each."""
    try:
        parts = [(literal, name, spec, conversion) for literal, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise DataError(f"data.template: {error}. Double a brace to mean itself: {{{{ or }}}}.") from None
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            shown = "{" + (name or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            raise DataError(f"data.template: {shown} is no column's name. Double a brace to mean itself: {{{{ or }}}}.")
    return tuple((literal, name) for literal, name, _, _ in parts)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
