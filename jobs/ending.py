"""How a job that went wrong ends: with its reason as the last thing printed, and an exit code."""

from __future__ import annotations

from rich.console import Console

from service.errors import LorayError

GIVEN_UP = 130  # what shells say of Ctrl-C


def exit_code(error: LorayError | KeyboardInterrupt, console: Console) -> int:
    """Print why; 2 where the input was wrong, 130 after a second Ctrl-C (who heard the first has said how to go on), else 1."""
    if isinstance(error, KeyboardInterrupt):
        return GIVEN_UP
    line = "\n".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"])
    console.print(line, markup=False, highlight=False, soft_wrap=True, style="red")
    return 2 if isinstance(error, ValueError | LookupError) else 1
