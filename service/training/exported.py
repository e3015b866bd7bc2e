"""What Prometheus reads of a run while it goes on: step, speed, workers, GPU time, checkpoints, and storage that fails.

    exported = Exported(run, "default", num_steps)      # in the driver, once it is connected to Ray
    exported.take(rows)                                 # new rows of the run's metrics, often

Ray's agent on the driver's node shows them on its metrics port, each name with `ray_` before it. The truth is in the run's
directory; this only looks at it. What to alert on is `k8s/components/monitoring`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.errors import StorageError
from service.logs import LogReader
from service.runs import Run

LOOK_EVERY_S = 10.0  # at status and events; rows of metrics are handed in
LABELS = ("run", "project")
GAUGES = {
    "loray_train_step": "Optimizer steps made.",
    "loray_train_steps": "Optimizer steps that the run will have made.",
    "loray_train_tokens_per_s": "Tokens a second, by all workers.",
    "loray_train_workers": "Workers of the running attempt.",
    "loray_train_gpus": "GPUs that these hold.",
    "loray_train_last_step_timestamp_seconds": "When the newest step was seen, in Unix time.",
    "loray_train_last_checkpoint_timestamp_seconds": "When the newest checkpoint was whole, in Unix time; 0 without one.",
}
COUNTERS = {
    "loray_train_gpu_seconds": "GPUs held, times seconds.",
    "loray_train_storage_failures": "Times that the run's storage did not answer, as workers and driver saw it.",
    "loray_train_restarts": "Attempts after the first: a lost worker, too little memory, a change of the cluster.",
}


@dataclass
class Seen:
    """The figures of a run as far as it has been looked at. Pure: time is handed in, in seconds of Unix time."""

    gauges: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GAUGES, 0.0))
    added: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))  # since it was last taken
    attempt: int = 0

    def steps(self, rows: Iterable[Mapping[str, Any]], now: float) -> None:
        """New rows of metrics, in order."""
        for row in rows:
            self.gauges["loray_train_step"] = row["step"]
            self.gauges["loray_train_last_step_timestamp_seconds"] = now
            if row.get("train/tokens_per_s"):
                self.gauges["loray_train_tokens_per_s"] = row["train/tokens_per_s"]

    def status(self, details: Mapping[str, Any]) -> None:
        """What the run's status says."""
        before, self.attempt = self.attempt, int(details.get("attempt", 1))
        if before:
            self.added["loray_train_restarts"] += self.attempt - before
        self.gauges["loray_train_workers"] = details.get("workers", 0)
        self.gauges["loray_train_gpus"] = details.get("gpus", 0)

    def events(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """New rows of events."""
        for row in rows:
            if row["kind"] == "checkpoint":
                name = "loray_train_last_checkpoint_timestamp_seconds"
                self.gauges[name] = max(self.gauges[name], row["time"])
            elif row["kind"] == "storage_away":
                self.added["loray_train_storage_failures"] += 1

    def passed(self, seconds: float) -> None:
        """So much time went by with the GPUs held."""
        self.added["loray_train_gpu_seconds"] += seconds * self.gauges["loray_train_gpus"]


class Exported:
    """A run's figures in Ray's metrics, under `run` and `project`. `seconds` is the clock, in Unix time."""

    def __init__(self, run: Run, project: str, num_steps: int, seconds: Callable[[], float] = time.time) -> None:
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
        self._seen.gauges["loray_train_last_step_timestamp_seconds"] = seconds()  # so that a run that never begins ages
        self._looked_at = seconds() - LOOK_EVERY_S

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take new rows of metrics in, look at status and events where it is time, and show all of it."""
        now = self._seconds()
        self._seen.steps(rows, now)
        since = now - self._looked_at
        if since >= LOOK_EVERY_S:
            self._looked_at = now
            self._look()
            self._seen.passed(since)
        for name, gauge in self._gauges.items():
            gauge.set(self._seen.gauges[name])
        for name, counter in self._counters.items():
            if self._seen.added[name]:
                counter.inc(self._seen.added[name])
                self._seen.added[name] = 0.0

    def _look(self) -> None:
        try:
            self._seen.status(self._run.status().details)
            self._seen.events(row for _, row in self._events.new_rows())
        except StorageError:  # counted, and asked again: watching a run is no reason to end it
            self._seen.added["loray_train_storage_failures"] += 1
