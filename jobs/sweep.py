"""Run one sweep from beginning to end.

    python -m jobs.sweep sweep.yaml [--set search.trials=4 ...]
    python -m jobs.sweep --resume SWEEP [--set search.budget.tokens=1000000 ...]
    python -m jobs.sweep sweep.yaml --sweep-id-file FILE

What a bare `ray job submit` runs and, in the third form, what a RayJob's every attempt runs: it begins the sweep that the
file names, or goes on with it. Exits with 0 when the sweep ended or was stopped as asked, 1 when it failed, 2 when its input
was wrong: then there is no sweep, 130 when a second Ctrl-C gave up waiting. The work is `tune/sweep.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from jobs.ending import ended
from service.config_values import read_text
from service.domain import RunState
from service.settings import load_settings


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line above; exits with 2 when it is neither of the two."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sweep", description="Run one sweep.")
    parser.add_argument("sweep_file", nargs="?", help="a YAML sweep file, or a run file with ranges in it")
    parser.add_argument("--resume", metavar="SWEEP", help="go on with a sweep: its id, or latest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument(
        "--sweep-id-file", metavar="FILE", help="has the id of the sweep, which goes on where it was begun before"
    )
    given = parser.parse_args(arguments)
    if (given.sweep_file is None) == (given.resume is None):
        parser.error("give a sweep file, or --resume SWEEP")
    if given.resume and given.sweep_id_file:
        parser.error("--sweep-id-file cannot go with --resume: a sweep goes on under its own id")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; the exit code."""
    given = parsed(arguments)

    def work(console: Console) -> None:
        if given.sweep_id_file:
            begin_or_go_on(given.sweep_file, given.sweep_id_file, given.set, console)
        else:
            run(given.sweep_file, given.resume, given.set, console)

    return ended(work, rayjob=given.sweep_id_file is not None)


def run(sweep_file: str | None, resume: str | None, overrides: Sequence[str], console: Console) -> None:
    """Begin a sweep, or go on with one, and wait for its end."""
    from tune.sweep_file import load_sweep

    settings = load_settings()
    if sweep_file is not None:
        resolved, sweep = load_sweep(sweep_file, overrides), None
        from tune.sweep import run_sweep
    else:
        from tune.sweep import reopen, run_sweep

        assert resume is not None, "one of the two is given"
        sweep, resolved = reopen(settings.home, resume, overrides)
    run_sweep(resolved, settings, console, resume=sweep)


def begin_or_go_on(sweep_file: str, id_file: str, overrides: Sequence[str], console: Console) -> None:
    """Begin the sweep whose id is in `id_file`, or go on with it as it was begun; one that is over is left alone."""
    from tune.sweep import reopen_if_begun, run_sweep
    from tune.sweep_file import load_sweep

    settings, resolved = load_settings(), load_sweep(sweep_file, overrides)
    sweep_id = read_text(id_file, "sweep id file", "text").strip()
    begun = reopen_if_begun(settings.home, sweep_id)
    if begun is None:
        run_sweep(resolved, settings, console, sweep_id=sweep_id)
    elif begun[0].status().state is RunState.SUCCEEDED:
        console.print(f"Sweep {sweep_id} is over already.", highlight=False)
    else:
        run_sweep(begun[1], settings, console, resume=begun[0])


if __name__ == "__main__":
    sys.exit(main())
