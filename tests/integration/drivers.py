"""A driver in a process of its own, and what can be seen of the run while it goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

from service import storage
from service.runs import Run, list_runs
from tests.integration.place import ROOT, Place, wait_until


@contextmanager
def training(place: Place, *arguments: str) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """A driver in a process of its own, and its run, a new one without `--resume`; ended at the end whatever happens."""
    given = () if "--resume" in arguments else (str(place.run_file),)
    with driving(place, "jobs.train", *given, *arguments, found=lambda: list_runs(place.settings.home)) as process:
        yield place.newest(), process


@contextmanager
def driving(
    place: Place, module: str, *arguments: str, found: Callable[[], Sequence[object]]
) -> Iterator[subprocess.Popen[str]]:
    """A job's driver once what it makes is there, one more than was `found` before, or with `--resume` any."""
    before = 0 if "--resume" in arguments else len(found())
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=place.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        try:
            wait_until(lambda: process.poll() is not None or len(found()) > before, "it has begun")
            assert process.poll() is None, process.communicate()[0][-3000:]
            yield process
        finally:
            process.kill()


def train_workers() -> list[psutil.Process]:
    """The Ray Train workers on this machine that train now: the test session has one cluster, and one run at a time."""
    return processes("RayTrainWorker")


def processes(name: str) -> list[psutil.Process]:
    """Those on this machine whose command line has `name`."""
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def checkpoints(run: Run) -> list[int]:
    names = storage.list_names(run.path("checkpoints"))
    return [int(name) for name in names if storage.exists(run.path("checkpoints", name, "checkpoint.json"))]


def trains(run: Run, attempt: int) -> bool:
    return any(name.startswith(f"a{attempt}-r0") for name in storage.list_names(run.path("metrics")))
