"""A run's resumable state over its life: when a checkpoint is taken, what goes into it, how a run goes on from one.

The writing and reading itself is `checkpoint.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from service.config import RunConfig
from service.errors import ModelError
from service.runs import Run
from service.training.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    Identity,
    checkpoint_at,
    is_there,
    newest_checkpoint,
)
from service.training.stopping import Progress
from service.training.strategy import Strategy, World


class Keeper:
    """Takes and loads the checkpoints of one attempt. Every worker makes the same calls.

    `flush` writes this worker's logs: a checkpoint is visible only after them. `event(kind, text)` tells the user.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        identity: Identity,
        config: RunConfig,
        cache: Path,
        strategy: Strategy,
        names: frozenset[str],
        flush: Callable[[], None],
        event: Callable[[str, str], None],
    ) -> None:
        self.progress = Progress()
        block = config.checkpoint
        if config.stop.patience:  # the best one is what is saved as the model
            block = block.model_copy(update={"keep_best": max(1, block.keep_best)})
        self.saver = CheckpointSaver(run, world, identity, block, event)
        self._run, self._world, self._identity, self._config, self._cache = run, world, identity, config, cache
        self._strategy, self._names, self._flush, self._event = strategy, names, flush, event
        self._num_best = block.keep_best  # checkpoints kept for being the best; with any, the model is the best one's
        self._lowest: list[float] = []  # of this attempt's evaluations, as many as are kept for it
        self._measured: tuple[int, float] | None = None  # the last evaluation: after which step, and `stop.metric`
        self._saved_step, self._saved_at = 0, time.monotonic()

    def resume(self) -> int:
        """Load the newest whole checkpoint, if any; the step to go on with."""
        retry_s = self._config.checkpoint.retry_s
        checkpoint, passed_over = newest_checkpoint(
            self._run.uri, self._identity, self._world, self._cache, retry_s=retry_s, event=self._event
        )
        for line in passed_over:
            self._event("checkpoint_passed_over", line)
        if checkpoint is None:
            return 0
        with checkpoint:
            self._load(checkpoint)
            self.progress = Progress.from_json(checkpoint.extra)
            self._strategy.load_scalars({k: v for k, v in checkpoint.extra.items() if v is not None})
            changed = f" (not bit for bit: {'; '.join(checkpoint.changes)})" if checkpoint.changes else ""
            self._event("resumed", f"from the checkpoint of step {checkpoint.step}{changed}")
            self._saved_step = checkpoint.step
        self._forget_a_best_that_was_not_kept()
        return self._saved_step

    def _forget_a_best_that_was_not_kept(self) -> None:
        """Where `stop.patience` or `checkpoint.keep_best` was set only on resuming: the best starts anew."""
        best, retry_s = self.progress.best_step, self._config.checkpoint.retry_s
        if not self._num_best or best is None:
            return
        if not is_there(self._run.uri, best, self._world, retry_s=retry_s, event=self._event):
            self.progress = Progress()
            self._event("best_forgotten", f"step {best} was the best so far, and its checkpoint was not kept")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in what was measured after a step."""
        self.progress = self.progress.after(step, metrics, self._config.stop)
        value = metrics.get(self._config.stop.metric, math.nan)
        if math.isfinite(value):
            self._measured = step, value
            self._lowest = sorted([*self._lowest, value])[: self._num_best]

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a checkpoint belongs after this step. The same answer on all workers: the minutes are the first one's."""
        every = self._config.checkpoint.every
        if step == num_steps or (every.steps > 0 and step % every.steps == 0):
            return True
        if (value := self._measured_after(step)) is not None and value in self._lowest:
            return True
        if not every.minutes:
            return False
        return bool(self._world.from_first(int(time.monotonic() - self._saved_at >= 60 * every.minutes)))

    def take(self, step: int) -> None:
        """Take a snapshot, unless there is one of this step; it is uploaded while training goes on."""
        if step == self._saved_step:
            return
        extra = {**self.progress.as_json(), **self._strategy.scalars(), "metric": self._measured_after(step)}
        self.saver.save(step, self._strategy.state(), extra, self._flush)
        self._saved_step, self._saved_at = step, time.monotonic()

    def back_to_the_best(self, step: int) -> int:
        """With `checkpoint.keep_best` or `stop.patience`, the model is that of the best evaluation; its step.

        Where its checkpoint has been damaged meanwhile, the model stays the last step's, and the run's events say so.
        """
        best = self.progress.best_step
        if not self._num_best or best is None or best == step:
            return step
        retry_s = self._config.checkpoint.retry_s
        found = checkpoint_at(
            self._run.uri, best, self._identity, self._world, self._cache, retry_s=retry_s, event=self._event
        )
        if isinstance(found, str):
            text = f"step {best} was the best, and its checkpoint cannot be used: {found} The model is from step {step}"
            self._event("best_passed_over", text)
            return step
        with found:
            self._load(found)
        figures = f"{self._config.stop.metric} {self.progress.best:.4f}"
        self._event("best", f"step {best}, {figures}: the model is from there")
        return best

    def _measured_after(self, step: int) -> float | None:
        return self._measured[1] if self._measured and self._measured[0] == step else None

    def _load(self, checkpoint: Checkpoint) -> None:
        odd = sorted(self._names ^ set(checkpoint.names))
        if odd:
            raise ModelError(
                f"the checkpoint of step {checkpoint.step} and this run do not train the same tensors: {len(odd)} differ, "
                f"among them {', '.join(odd[:3])}. Resume with the versions that the run was started with."
            )
        self._strategy.load_state(checkpoint.read)
