"""When a run has stopped getting better: a pure function of its evaluations, carried in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from service.config import StopBlock


@dataclass(frozen=True)
class Progress:
    """The lowest `stop.metric` so far and the step it was measured after: the model is from there.

    Patience goes by `to_beat`, which only a value lower by `stop.min_delta` replaces, and counts evaluations since then.
    """

    best: float | None = None
    best_step: int | None = None
    to_beat: float | None = None
    evaluations_since: int = 0

    def after(self, step: int, metrics: Mapping[str, float], stop: StopBlock) -> Progress:
        """The progress after an evaluation; the same where `stop.metric` was not measured."""
        value = metrics.get(stop.metric)
        if value is None:
            return self
        best, best_step = self.best, self.best_step
        if math.isfinite(value) and (best is None or value < best):
            best, best_step = value, step
        if math.isfinite(value) and (self.to_beat is None or value < self.to_beat - stop.min_delta):
            return Progress(best, best_step, value, 0)
        return Progress(best, best_step, self.to_beat, self.evaluations_since + 1)

    def exhausted(self, stop: StopBlock) -> bool:
        """Whether the run's patience is over."""
        return 0 < stop.patience <= self.evaluations_since

    def as_json(self) -> dict[str, float | int | None]:
        """For the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, float | int | None]) -> Progress:
        """What `as_json` gave, among other values."""
        step = values["best_step"]
        since = int(values["evaluations_since"] or 0)
        return cls(values["best"], None if step is None else int(step), values["to_beat"], since)
