"""Train one run file from beginning to end.

    python -m jobs.train run.yaml [--set optim.max_steps=4 ...] [--no-wait] [--profile]
    python -m jobs.train --resume RUN [--set scale.workers=2 ...] [--no-wait] [--profile]
    python -m jobs.train run.yaml --run-id-file FILE

What `loray train` submits to a cluster, what a bare `ray job submit` runs, and, in the third form, what a RayJob's every
attempt runs: it begins the run that the file names, or goes on with it. Exits with 0 when the run succeeded or was
stopped as asked, 1 when it failed, 2 when its input was wrong: then there is no run, 130 when a second Ctrl-C gave up
waiting. The work is `training/driver.py`; of several trainings as one run, `training/repeats.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from jobs.ending import ended
from service.config import load_run, read_text, run_from_json
from service.domain import RunState
from service.launcher import NO_WAIT
from service.settings import load_settings


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line above; exits with 2 when it is neither of the two. `--no-wait` has become an override."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train one run file.")
    parser.add_argument("run_file", nargs="?", help="a YAML run file")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run: its id, or latest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument("--no-wait", action="append_const", dest="set", const=NO_WAIT, help="fail at once without room")
    parser.add_argument("--profile", action="store_true", help="leave a trace of a few steps in the run")
    parser.add_argument("--run-id", help="the id of the new run; made from the time and its name unless given")
    parser.add_argument(
        "--run-id-file", metavar="FILE", help="has the id of the run, which goes on where it was begun before"
    )
    parser.add_argument(
        "--asked-at", type=float, default=time.time(), help="when it was asked for, in seconds of Unix time"
    )
    given = parser.parse_args(arguments)
    if (given.run_file is None) == (given.resume is None):
        parser.error("give a run file, or --resume RUN")
    if given.resume and (given.run_id or given.run_id_file):
        parser.error("--run-id cannot go with --resume: a run goes on under its own id")
    if given.run_id and given.run_id_file:
        parser.error("give --run-id or --run-id-file, one of the two")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    given = parsed(arguments)
    return ended(lambda console: train(given, console), rayjob=given.run_id_file is not None)


def train(given: argparse.Namespace, console: Console) -> None:
    """Begin a run, or go on with one, and wait for its end."""
    settings = load_settings()
    resolved = load_run(given.run_file, given.set) if given.run_file else None
    from service.training import repeats
    from service.training.driver import reopen, reopen_if_begun

    resume = reopen(settings.home, given.resume) if given.resume else None
    if given.run_id_file:
        given.run_id = read_text(given.run_id_file, "run id file", "text").strip()
        resume = reopen_if_begun(settings.home, given.run_id)
    if resume and resume.status().state is RunState.SUCCEEDED:
        console.print(f"Run {resume.id} has succeeded already.", highlight=False)
        return
    if resume:
        resolved = run_from_json(resume.resolved(), resume.run_yaml(), given.set)
    assert resolved is not None
    repeats.train(
        resolved, settings, console,
        resume=resume, run_id=given.run_id, profile=given.profile, asked_at=given.asked_at,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
