"""A sweep on the terminal while it runs: one live table; elsewhere a line for each thing that happens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tune.leaderboard import Mode, ranked, shown, tokens
from tune.trials import ENDED, Trial, TrialState


def trials_table(trials: Sequence[Trial], metric: str) -> Table:
    """A row a trial, in order of their numbers: values, step, metric, state, tokens."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.changes))
    table = Table("trial", *keys, "step", metric, "state", "tokens")
    for trial in trials:
        step = f"{trial.step}/{trial.num_steps}" if trial.num_steps else ""
        values = [escape(shown(trial.changes.get(key))) for key in keys]
        count = f"{trial.tokens:,}" if trial.tokens else ""
        table.add_row(str(trial.number), *values, step, shown(trial.value), str(trial.state), count)
    return table


def best_so_far(trials: Sequence[Trial], metric: str, mode: Mode) -> str:
    """One line: the best figure of all that were measured, however far its trial got."""
    measured = [trial for trial in trials if trial.value is not None]
    if not measured:
        return "nothing measured yet"
    sign = 1.0 if mode == "min" else -1.0
    first = min(measured, key=lambda trial: sign * (trial.value or 0.0))
    values = ", ".join(f"{key} {shown(value)}" for key, value in first.changes.items())
    return f"best so far: trial {first.number}, {metric} {shown(first.value)} at step {first.model_step or first.step} ({values})"


def seconds_left(trials: Sequence[Trial], num_trials: int, done_at_start: float, elapsed_s: float) -> float | None:
    """At the pace so far; a trial that has ended counts whole, however early that was."""
    done = shares_done(trials)
    if done <= done_at_start:
        return None
    return elapsed_s * (num_trials - done) / (done - done_at_start)


def shares_done(trials: Sequence[Trial]) -> float:
    """In trials."""
    return sum(1.0 if trial.state in ENDED else trial.progress for trial in trials)


class SweepView:
    """Shows trials as they go on. Use as a context manager and call `show` with what has been read.

    `before` are the trials as an earlier driver has left them: a line each, for what they did does not happen again.
    """

    def __init__(
        self, metric: str, mode: Mode, num_trials: int, console: Console, before: Sequence[Trial] = ()
    ) -> None:
        self._metric, self._mode, self._num_trials, self._console = metric, mode, num_trials, console
        self._live = Live(console=console, refresh_per_second=2, transient=True)
        self._before: Mapping[int, Trial] = {
            trial.number: trial for trial in before if trial.state is not TrialState.WAITING
        }
        self._began, self._done_at_start = time.monotonic(), shares_done(before)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
            return self
        for trial in self._before.values():
            self.say(f"before this: {_ending(trial)}, {self._metric} {shown(trial.value)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """A line beside the table."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, trials: Sequence[Trial]) -> None:
        """Draw, or print what has changed since the last call."""
        left = seconds_left(trials, self._num_trials, self._done_at_start, time.monotonic() - self._began)
        stand = best_so_far(trials, self._metric, self._mode), f"{self._totals(trials)}, {_time(left)} left"
        if self._console.is_terminal:
            self._live.update(Group(Text("\n".join(stand)), trials_table(trials, self._metric)))
        else:
            for trial in trials:
                for line in news(self._before.get(trial.number), trial, self._metric):
                    self.say(line)
            if self._ended(trials) > self._ended(list(self._before.values())):
                self.say("; ".join(stand))
        self._before = {trial.number: trial for trial in trials}

    def _totals(self, trials: Sequence[Trial]) -> str:
        return f"{self._ended(trials)} of {self._num_trials} trials ended, {tokens(trials):,} tokens read"

    @staticmethod
    def _ended(trials: Sequence[Trial]) -> int:
        return sum(trial.state in ENDED for trial in trials)


def news(before: Trial | None, trial: Trial, metric: str) -> list[str]:
    """What has happened to a trial, a line each."""
    name = f"trial {trial.number}"
    lines = []
    known = len(before.curve) if before else 0
    if trial.state is not TrialState.WAITING and (before is None or before.state is TrialState.WAITING):
        values = "  ".join(f"{key} {shown(value)}" for key, value in trial.changes.items())
        lines.append(f"{name} begins: {values}  (run {trial.run})")
    if trial.state is TrialState.RUNNING and before is not None and before.state is TrialState.INTERRUPTED:
        lines.append(f"{name} goes on  (run {trial.run})")
    for step, (_, value) in list(zip(trial.steps, trial.curve, strict=True))[known:]:
        lines.append(f"{name}  step {step}/{trial.num_steps}  {metric} {value:.4f}")
    if trial.state in (*ENDED, TrialState.INTERRUPTED) and (before is None or before.state is not trial.state):
        why = f": {trial.why.splitlines()[0]}" if trial.why else ""
        lines.append(f"{_ending(trial)}{why}")
    return lines


def summary(trials: Sequence[Trial], metric: str, mode: Mode) -> Any:
    """The table after the end, best first."""
    return trials_table(ranked(trials, mode), metric)


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _ending(trial: Trial) -> str:
    return f"trial {trial.number} {trial.state} after step {trial.step}, {trial.tokens:,} tokens"
