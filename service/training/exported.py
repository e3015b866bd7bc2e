"""What Prometheus reads of a run while it goes on: step, speed, workers, restarts, GPU time, checkpoints, storage that fails.

    exported = Exported(run, "default", num_steps, attempt)      # in the driver, once it is connected to Ray
    with exported.showing():
        exported.take(rows)                                      # new rows of the run's metrics, often

    with StorageAway(run.id, "default", "3").showing() as away:  # in every process of the run; this is worker 3
        Patience(places, retry_s, what, away.heard).insist(do)

Ray's agent on a process's node shows them on its metrics port, each name with `ray_` before it. The truth is in the run's
directory; this only looks at it. What to alert on is `k8s/components/monitoring`: gauges, which are there before anything
happens. Ray shows a counter from its first event on, so that nobody sees that one as an increase.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from service.config import RunConfig
from service.domain import DEFAULT_PROJECT, ModelRef
from service.errors import StorageError
from service.logs import LogReader
from service.runs import Run
from service.status import repeating

LOOK_EVERY_S = 10.0  # at status and events; rows of metrics are handed in
SHOW_EVERY_S = 5.0  # Ray forgets a gauge that was not set during two of its reports, 20 s
LABELS = ("run", "project")
GAUGES = {
    "loray_train_step": "Optimizer steps made.",
    "loray_train_steps": "Optimizer steps that the run will have made.",
    "loray_train_tokens_per_s": "Tokens a second, by all workers.",
    "loray_train_workers": "Workers of the running attempt.",
    "loray_train_gpus": "GPUs that these hold.",
    "loray_train_restarts": "Attempts after the first: a lost worker, too little memory, a change of the cluster, a resume.",
    "loray_train_last_step_timestamp_seconds": "When the newest step was seen, in Unix time.",
    "loray_train_last_checkpoint_timestamp_seconds": "When the newest checkpoint was whole, in Unix time; 0 without one.",
}
COUNTERS = {
    "loray_train_gpu_seconds": "GPUs held, times seconds.",
}
AWAY = "loray_train_storage_away"
AWAY_LABELS = (*LABELS, "process")  # `driver`, or a worker's rank


def project_of(config: RunConfig) -> str:
    """Whose run it is: the project of the model that it publishes."""
    return ModelRef.parse(config.publish.name).project if config.publish else DEFAULT_PROJECT


@dataclass
class Seen:
    """The figures of a run as far as it has been looked at. Pure: time is handed in, in seconds of Unix time."""

    gauges: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GAUGES, 0.0))
    added: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))  # since it was last taken

    def steps(self, rows: Iterable[Mapping[str, Any]], now: float) -> None:
        """New rows of metrics, in order."""
        for row in rows:
            self.gauges["loray_train_step"] = row["step"]
            self.gauges["loray_train_last_step_timestamp_seconds"] = now
            if row.get("train/tokens_per_s"):
                self.gauges["loray_train_tokens_per_s"] = row["train/tokens_per_s"]

    def status(self, details: Mapping[str, Any]) -> None:
        """What the run's status says."""
        self.gauges["loray_train_restarts"] = int(details["attempt"]) - 1
        self.gauges["loray_train_workers"] = details.get("workers", 0)
        self.gauges["loray_train_gpus"] = details.get("gpus", 0)

    def events(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """New rows of events."""
        for row in rows:
            if row["kind"] == "checkpoint":
                name = "loray_train_last_checkpoint_timestamp_seconds"
                self.gauges[name] = max(self.gauges[name], row["time"])

    def passed(self, seconds: float) -> None:
        """So much time went by with the GPUs held."""
        self.added["loray_train_gpu_seconds"] += seconds * self.gauges["loray_train_gpus"]


class Exported:
    """A run's figures in Ray's metrics, under `run` and `project`. `seconds` is the clock, in Unix time."""

    def __init__(
        self, run: Run, project: str, num_steps: int, attempt: int, seconds: Callable[[], float] = time.time
    ) -> None:
        from ray.util.metrics import Counter, Gauge

        labels = {"run": run.id, "project": project}
        self._run, self._seconds = run, seconds
        self._gauges = {name: Gauge(name, text, tag_keys=LABELS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, tag_keys=LABELS) for name, text in COUNTERS.items()}
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(labels)
        self._events = LogReader(run.path("events"))
        self._seen = Seen()
        self._seen.gauges["loray_train_steps"] = num_steps
        self._seen.gauges["loray_train_restarts"] = attempt - 1
        self._seen.gauges["loray_train_last_step_timestamp_seconds"] = seconds()  # so that a run that never begins ages
        self._looked_at = seconds() - LOOK_EVERY_S

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show it all while the block lasts, also while the driver waits for workers or storage and takes nothing in."""
        self._show()
        with repeating(self._show, SHOW_EVERY_S, "metrics"):
            yield

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take new rows of metrics in, and look at status and events where it is time."""
        now = self._seconds()
        self._seen.steps(rows, now)
        since = now - self._looked_at
        if since >= LOOK_EVERY_S:
            self._looked_at = now
            self._look()
            self._seen.passed(since)
        for name, counter in self._counters.items():
            if self._seen.added[name]:
                counter.inc(self._seen.added[name])
                self._seen.added[name] = 0.0

    def _show(self) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(self._seen.gauges[name])

    def _look(self) -> None:
        try:
            self._seen.status(self._run.status().details)
            self._seen.events(row for _, row in self._events.new_rows())
        except StorageError:  # asked again: watching a run is no reason to end it, and the driver's heartbeat tells
            pass


class StorageAway:
    """How much waits in one process for the run's storage: shown by Ray, so that it is seen while that storage is away.

    Where Ray does not run, nobody is told.
    """

    def __init__(self, run_id: str, project: str, process: str) -> None:
        self._labels = {"run": run_id, "project": project, "process": process}
        self._gauge: Any = None
        self._counting = threading.Lock()
        self._waiting = 0

    @contextmanager
    def showing(self) -> Iterator[Self]:
        """Show it while the block lasts, from 0 on."""
        self._show()
        with repeating(self._show, SHOW_EVERY_S, "storage away"):
            yield self

    def heard(self, kind: str, text: str) -> None:
        """An event of a `Patience`, in whatever thread."""
        with self._counting:
            self._waiting += {"storage_away": 1, "storage_back": -1}.get(kind, 0)

    def seen(self, write: Callable[[], None]) -> Callable[[], None]:
        """`write`, to be called again and again by the one who writes here: its last StorageError stands until it succeeds."""

        def seen_write() -> None:
            try:
                write()
            except StorageError:
                self._waiting = 1
                raise
            self._waiting = 0

        return seen_write

    def _show(self) -> None:
        if self._gauge is None and _ray_runs():
            from ray.util.metrics import Gauge

            text = "How much waits in a process of the run for its storage, which does not answer."
            self._gauge = Gauge(AWAY, text, tag_keys=AWAY_LABELS).set_default_tags(self._labels)
        if self._gauge is not None:
            self._gauge.set(self._waiting)


def _ray_runs() -> bool:
    """Whether this process is connected to Ray. A plain one never imports it, which takes a second."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # None, too, while it is being imported
    return is_initialized is not None and bool(is_initialized())
