"""Tokenise the data of one run file, before any accelerator is held.

    python -m jobs.prepare run.yaml [--set data.seq_len=2048 ...]

For a bare `ray job submit` on a cluster whose CPUs are cheap: a run of the same file that comes later finds its data
prepared. Exits with 0, 1 when something failed, 2 when its input was wrong. The work is `service/data/prepare.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from jobs.ending import exit_code
from service.config import load_run
from service.errors import LorayError
from service.settings import load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare as the command line says, and print the data cards; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.prepare", description="Tokenise the data of one run file.")
    parser.add_argument("run_file", help="a YAML run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    given = parser.parse_args(arguments)
    try:
        config, settings = load_run(given.run_file, given.set).config, load_settings()
        from service.data.prepare import prepare_for

        prepared = prepare_for(config, settings)
    except LorayError as error:
        return exit_code(error, Console(width=160))
    print(json.dumps(prepared.as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
