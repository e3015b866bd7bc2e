"""Train one run file from beginning to end.

    python -m jobs.train run.yaml [--set optim.max_steps=4 ...]
    python -m jobs.train --resume RUN

What `loray train` submits to a cluster, and what a bare `ray job submit` runs. Exits with 0 when the run succeeded or was
stopped as asked, 1 when it failed, 2 when its input was wrong: then there is no run. The work is `training/driver.py`.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from service.config import load_run, run_from_json
from service.errors import LorayError
from service.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    """The command line above; the exit code. The last line printed is the reason of a failure."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train one run file.")
    parser.add_argument("run_file", nargs="?", help="a YAML run file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run: its id, or latest")
    parser.add_argument("--run-id", help="the id of the new run; made from the time and its name unless given")
    given = parser.parse_args(arguments)
    if (given.run_file is None) == (given.resume is None):
        parser.error("give a run file, or --resume RUN")
    if given.resume and (given.set or given.run_id):
        parser.error("--set and --run-id cannot go with --resume: a run goes on as it is")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        settings = load_settings()
        resolved = load_run(given.run_file, given.set) if given.run_file else None
        from service.training.driver import reopen, train_run

        resume = reopen(settings.home, given.resume) if given.resume else None
        if resume:
            resolved = run_from_json(resume.resolved(), resume.run_yaml())
        assert resolved is not None
        train_run(resolved, settings, console, resume=resume, run_id=given.run_id)
    except LorayError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        return 2 if isinstance(error, ValueError | LookupError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
