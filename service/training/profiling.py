"""`--profile`: where the time of a few steps goes, as a trace that a browser opens and a table of the costliest operations.

`profile/a<attempt>-rank-<rank>.json.gz` (ui.perfetto.dev or chrome://tracing) and `.txt` beside it, for every worker. The
first step is a warm-up of the model, the second one of the profiler, the next three are recorded. A shorter run leaves
what there was. Nothing of `torch.profiler` is imported, and no step pays for it, unless it was asked for.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from service import storage
from service.runs import Run

if TYPE_CHECKING:
    from torch.profiler import profile

RECORDED_STEPS = 3
TOP_OPERATIONS = 40


class Profiler(Protocol):
    """A context around the steps of a run; `step` is called at the end of each."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self) -> None:
        """A step has ended."""


def profiler(run: Run, rank: int, attempt: int, enabled: bool) -> Profiler:
    """The profiler of one worker, or one that does nothing."""
    return _Recording(run.path("profile", f"a{attempt}-rank-{rank:05d}")) if enabled else _Off()


class _Off:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was recorded."""

    def step(self) -> None:
        """Nothing is recorded."""


class _Recording:
    """First step: recorded in case no other follows. Second: warm-up. Third to fifth: recorded in its place."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._steps = 0
        self._first: profile | None = None
        self._main: profile | None = None
        self._keeping: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._first = _start(schedule=False)
        return self

    def step(self) -> None:
        """Moves on to the next phase; after the last one the trace goes to storage in a thread of its own."""
        self._steps += 1
        if self._steps == 1 and self._first:
            self._first.stop()
            self._main = _start(schedule=True)
        elif self._main:
            self._main.step()
            if self._steps == 2 + RECORDED_STEPS:
                self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeping is None:
            self._end()
        if self._keeping:
            self._keeping.join()

    def _end(self) -> None:
        """Stop, and keep the recorded steps; if there is none, the first one; if that was cut short, what there is of it."""
        recorded = self._first
        if self._main:
            self._main.stop()
            recorded = self._main if self._steps > 2 else self._first
        elif self._first:
            self._first.stop()
        assert recorded is not None
        self._keeping = threading.Thread(target=_keep, args=(recorded, self._uri), name="profile", daemon=True)
        self._keeping.start()


def _start(schedule: bool) -> profile:
    import torch
    from torch import profiler

    gpu = [profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    started = profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, *gpu],
        schedule=profiler.schedule(wait=0, warmup=1, active=RECORDED_STEPS, repeat=1) if schedule else None,
        profile_memory=True,
    )
    started.start()
    return started


def _keep(recorded: profile, uri: str) -> None:
    """Into the run's directory. A profile is no reason to end a run: where it cannot be stored, the log says so."""
    try:
        with tempfile.TemporaryDirectory(prefix="loray-profile-") as directory:
            file = Path(directory) / "trace.json.gz"
            recorded.export_chrome_trace(str(file))
            storage.put_file(file, f"{uri}.json.gz")
        storage.write_bytes(f"{uri}.txt", _table(recorded).encode())
    except OSError as error:  # StorageError is one, and so is a full temporary directory
        logging.getLogger("loray.train").warning(f"the profile could not be kept: {error}")


def _table(recorded: profile) -> str:
    averages = recorded.key_averages()
    gpu = any(event.self_device_time_total for event in averages)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    return str(averages.table(sort_by=order, row_limit=TOP_OPERATIONS))
