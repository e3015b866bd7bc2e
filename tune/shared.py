"""Trials that share one copy of their frozen base: a runner of its own, because Tune owns an actor for each trial.

One Ray Train worker has them all (`training/together.py`), each as a run like any other, driven from a thread here. A trial
that is stopped leaves and the next one joins. The stopping rule is Tune's successive halving, asked directly.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.errors import StorageError
from service.training.trainer import SharedCrew
from tune.directory import Sweep
from tune.sweep_file import ResolvedSweep
from tune.trial import LOOK_EVERY_S, TrialJob, TrialThread
from tune.trials import Trial
from tune.tuner import Queue, as_result, scheduler


@dataclass(frozen=True)
class _Name:
    """A trial as the scheduler knows one: an id, and a name, which is the number."""

    trial_id: str

    def __str__(self) -> str:
        return self.trial_id


def run_trials_together(
    sweep: Sweep,
    resolved: ResolvedSweep,
    job: TrialJob,
    queue: Queue,
    before: Sequence[Trial],
    parallel: int,
    tick: Callable[[], None],
) -> None:
    """As `tuner.run_trials`, `parallel` trials at a time in one worker."""
    rule: Any = scheduler(sweep, resolved, before)
    crew, waiting, running = SharedCrew(), deque(queue.waiting), dict[_Name, TrialThread]()
    while waiting or running:
        while waiting and len(running) < parallel:
            record = waiting.popleft()
            name = _Name(str(record.number))
            rule.on_trial_add(None, name)
            running[name] = TrialThread(job, record.number, record.newest_draw, None, crew, replay=True)
        for name, thread in list(running.items()):
            alive = thread.alive  # before its last measurements are read
            for report in thread.new_reports():
                rule.on_trial_result(None, name, as_result(report))
            if not alive:
                del running[name]
        tick()
        with suppress(StorageError):  # asked again
            if sweep.stop_requested():
                waiting.clear()
        time.sleep(LOOK_EVERY_S)
    crew.leave()  # whoever gives up before leaves it behind, and it ends with this process
