"""Where the command line prints: one console, and JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 160)
_kept: ContextVar[TextIO | None] = ContextVar("kept", default=None)  # standard output, while documents have it alone


def say(text: str) -> None:
    """A line as it is: no colours, no wrapping, and no markup read into what users wrote."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def kept_for_documents() -> Iterator[None]:
    """Standard output takes documents alone; what libraries print, as DeepSpeed does when it is imported, goes to stderr."""
    before = _kept.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.reset(before)


def print_document(text: str) -> None:
    """Text for machines, on standard output."""
    (_kept.get() or sys.stdout).write(text)


def print_json(value: Any) -> None:
    """One JSON document, without colours or wrapping."""
    print_document(json.dumps(value, indent=2, default=str) + "\n")


def print_json_lines(rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    for row in rows:
        print_document(json.dumps(row) + "\n")
