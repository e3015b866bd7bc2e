"""When a run has stopped getting better: a pure function of its evaluations, carried in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from service.config import StopBlock


@dataclass(frozen=True)
class Progress:
    """The lowest `stop.metric` so far, the step it was measured after, and how many evaluations have not beaten it."""

    best: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def after(self, step: int, metrics: Mapping[str, float], stop: StopBlock) -> Progress:
        """The progress after an evaluation; the same where `stop.metric` was not measured."""
        value = metrics.get(stop.metric)
        if value is None:
            return self
        if math.isfinite(value) and (self.best is None or value < self.best - stop.min_delta):
            return Progress(value, step, 0)
        return Progress(self.best, self.best_step, self.evaluations_since_best + 1)

    def exhausted(self, stop: StopBlock) -> bool:
        """Whether the run's patience is over."""
        return 0 < stop.patience <= self.evaluations_since_best

    def as_json(self) -> dict[str, float | int | None]:
        """For the checkpoint."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "evaluations_since_best": self.evaluations_since_best,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, float | int | None]) -> Progress:
        """What `as_json` gave, among other values."""
        step = values["best_step"]
        return cls(values["best"], None if step is None else int(step), int(values["evaluations_since_best"] or 0))
