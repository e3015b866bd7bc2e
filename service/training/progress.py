"""A run's progress on the terminal, read from its own metrics: the driver and `loray runs attach` show the same.

On a terminal one live line (step, loss, tokens/s, time left); elsewhere a plain line a step, for job logs.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from service.errors import StorageError
from service.logs import LogReader, figure
from service.runs import Run


class ProgressView:
    """Shows the steps of a run as they are logged. Use as a context manager and call `poll` now and then."""

    def __init__(self, run: Run, num_steps: int, console: Console) -> None:
        self._reader = LogReader(run.path("metrics"))
        self._num_steps = num_steps
        self._console = console
        self._first: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._bar.add_task("step", total=num_steps, figures="waiting for the first step")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        for row in self._new_rows()[-1:]:  # of what an earlier attempt did, only where it stands
            self._show(row)
        self._first = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.poll()
        self._bar.stop()

    def poll(self) -> list[dict[str, Any]]:
        """Read what is new, show it and return it."""
        rows = self._new_rows()
        for row in rows:
            self._show(row)
        return rows

    def _new_rows(self) -> list[dict[str, Any]]:
        """Progress is no reason to end a run: a storage that hiccups is asked again."""
        try:
            return [row for _, row in self._reader.new_rows()]
        except StorageError as error:
            self._bar.console.print(f"progress cannot be read just now: {error}", markup=False, highlight=False)
            return []

    def say(self, line: str) -> None:
        """A line beside the progress, such as why a new attempt begins."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, row: dict[str, Any]) -> None:
        if not self._console.is_terminal:
            line = f"step {row['step']}/{self._num_steps}  {self._figures(row)}"
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        self._bar.update(self._task, completed=row["step"], figures=self._figures(row))
        if "eval/loss" in row:
            self._bar.console.print(
                f"step {row['step']}: held-out loss {figure(row['eval/loss']):.4f}", highlight=False
            )

    def _figures(self, row: dict[str, Any]) -> str:
        parts = [f"loss {figure(row['train/loss']):.4f}"] if "train/loss" in row else []
        if not self._console.is_terminal and "eval/loss" in row:
            parts.append(f"held-out loss {figure(row['eval/loss']):.4f}")
        if "test/loss" in row:
            parts.append(f"test loss {figure(row['test/loss']):.4f}")
        if "train/tokens_per_s" in row:
            parts += [f"{row['train/tokens_per_s']:.0f} tokens/s", f"{self._time_left(row['step'])} left"]
        return "  ".join(parts)

    def _time_left(self, step: int) -> str:
        """From the mean time of the steps seen by this view."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return "?"
        seconds = (now - self._first[1]) / (step - self._first[0]) * (self._num_steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
