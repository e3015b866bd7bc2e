"""Where the command line prints: one console, and JSON for machines."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """A line as it is: no colours, no wrapping, and no markup read into what users wrote."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, without colours or wrapping."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_json_lines(rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
