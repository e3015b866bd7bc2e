"""Check a cluster from inside it: `python -m jobs.doctor --workers 4 [--json]`. What `loray doctor --address` submits.

Exits with 1 when something is not fit for a run. The checks are `service/doctor.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from rich.console import Console

from service import launcher
from service.errors import LorayError
from service.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    """The command line above; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.doctor", description="Check a cluster before a run.")
    parser.add_argument("--workers", type=int, default=1, help="workers that a run would want")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        settings = load_settings()
        launcher.connect()
        from service.doctor import as_table, examine

        checks = examine(settings, given.workers)
    except LorayError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        return 1
    if given.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks]))
    else:
        console.print(as_table(checks))
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
