"""`loray data ...`: data as training sees it, before anything is trained."""

from __future__ import annotations

import typer

app = typer.Typer(help="Look at data as training sees it.", no_args_is_help=True)
