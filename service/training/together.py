"""Runs that train in one process on one copy of their frozen base.

Each run has a model of its own, as it would alone, with adapters, optimizer, data and logs; only the base's tensors are the
same ones. Plain LoRA runs go through it together: in a round, the micro-batches of all runs that are in their steps are one
batch, every sequence through its own run's adapter (as in mLoRA, arXiv:2312.02515), as long as that is no larger than the
largest micro-batch that one of them tried before its first step. What else computes does so alone, in turns: loading,
evaluation, runs whose parts draw random numbers or are quantised, the last look at the model. Checkpoints, storage and the
gate's process are no turns. A run's draws are what they would be alone, and in float32 so are its losses, but for rounding.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from service.config import LoraBlock, QloraBlock, RunConfig
from service.errors import ConfigError, TrainingError
from service.training.batches import Batches
from service.training.methods.fused import Fused, beside, fused_linears
from service.training.methods.loading import load_base
from service.training.objectives.sft import Batch, SupervisedLoss


@dataclass(eq=False)
class Seat:
    """A run's place in the rounds. `compute` while `stepping`; `away` where it does something long between its steps."""

    together: Together
    objective: SupervisedLoss
    batches: Batches
    fused: Fused
    max_tokens: int  # of a batch, padding included
    batch: Batch | None = None  # waits for a round
    loss: float | BaseException | None = field(default=None)  # what the round has brought
    computed_s: float = 0.0  # which took so long
    waited_s: float = 0.0  # for others, since the caller set it to 0

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, rounds wait for this run."""
        self.together.join(self)
        try:
            yield
        finally:
            self.together.leave(self)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, they do not."""
        self.together.leave(self)
        try:
            yield
        finally:
            self.together.join(self)

    def compute(self, batch: Batch) -> float:
        """The summed loss of a micro-batch, in nats; its gradients are added to the run's parameters."""
        began = time.monotonic()
        loss = self.together.compute(self, batch)
        self.waited_s += time.monotonic() - began - self.computed_s
        return loss


class Together:
    """What the runs of one process share."""

    def __init__(self) -> None:
        self._base: tuple[object, Any] | None = None
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # the first one has the turn
        self._changed = threading.Condition()
        self._stepping: list[Seat] = []
        self.num_joint = 0  # batches that held several runs' sequences

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, nobody else computes. Who has waited longest is next: a plain lock would go back to whoever let it go."""
        mine = threading.Event()
        with self._guard:
            self._waiting.append(mine)
            if self._waiting[0] is mine:
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                self._waiting.popleft()
                if self._waiting:
                    self._waiting[0].set()

    def base(self, path: Path, config: RunConfig, device: torch.device) -> Any:
        """A model of its own structure whose tensors are those of all runs here; call it within a turn.

        Raises ConfigError where a run would change the base, or needs another one than the first had.
        """
        method = config.method
        if not isinstance(method, LoraBlock) or method.bias != "none":
            raise ConfigError(
                "runs can share a frozen base only: set method.type to lora or qlora, and method.bias to none."
            )
        quantised = method.double_quant if isinstance(method, QloraBlock) else None
        key = (str(path), config.precision, method.base_bits, quantised, device)
        if self._base is None:
            self._base = key, load_base(path, config, device).requires_grad_(False)
        if self._base[0] != key:
            raise ConfigError(f"this run needs the base {key}, and those that it trains with have {self._base[0]}.")
        base = self._base[1]
        tensors = [*base.parameters(), *base.buffers()]
        return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})

    def seat(self, objective: SupervisedLoss, batches: Batches, max_tokens: int) -> Seat | None:
        """A place in the rounds; None for a run that must compute alone. In float16 it is the loss scale, each run's own."""
        fused = fused_linears(objective.model) if batches.precision != "fp16" else None
        return Seat(self, objective, batches, fused, max_tokens) if fused else None

    def join(self, seat: Seat) -> None:
        """From now on rounds wait for it."""
        with self._changed:
            self._stepping.append(seat)

    def leave(self, seat: Seat) -> None:
        """They do not any more."""
        with self._changed:
            self._stepping.remove(seat)
            self._changed.notify_all()

    def compute(self, seat: Seat, batch: Batch) -> float:
        """As `Seat.compute`. The first of those who wait computes for all, when everybody has come."""
        for group in _groups(self._round(seat, batch)):
            self._compute(group)
        if isinstance(seat.loss, BaseException):
            raise seat.loss
        assert seat.loss is not None
        return seat.loss

    def _round(self, seat: Seat, batch: Batch) -> list[tuple[Seat, Batch]]:
        """What the caller is to compute: everybody's when all have come and it is the first; nothing when another did."""
        with self._changed:
            seat.batch, seat.loss = batch, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: seat.loss is not None or self._is_mine(seat))
            if not self._is_mine(seat):
                return []
            parts = [(other, other.batch) for other in self._stepping if other.batch is not None]
            for other, _ in parts:
                other.batch = None
            return parts

    def _is_mine(self, seat: Seat) -> bool:
        return self._stepping[0] is seat and all(other.batch is not None for other in self._stepping)

    def _compute(self, group: Sequence[tuple[Seat, Batch]]) -> None:
        """One pass forwards and backwards; what it brings, or what was raised, is everybody's in it.

        Where several do not get through it forwards, for memory or whatever one of them has, each is tried alone.
        """
        first, began, summed = group[0][0], time.monotonic(), list[torch.Tensor]()
        losses: Sequence[float | BaseException]
        try:
            with self.turn(), beside([(seat.fused, len(batch.ids_BT)) for seat, batch in group]):
                began = time.monotonic()
                with first.batches.compute():
                    summed = first.objective.each([batch for _, batch in group])
                losses = torch.stack(summed).tolist()
                torch.autograd.backward(summed)
            self.num_joint += len(group) > 1
        except BaseException as error:
            losses = [error, *(_of_another(error) for _ in group[1:])]
        if len(group) > 1 and not summed:
            del losses  # with the error, and what it keeps alive
            for part in group:
                self._compute([part])
            return
        with self._changed:
            for (seat, _), loss in zip(group, losses, strict=True):
                seat.loss, seat.computed_s = loss, time.monotonic() - began
            self._changed.notify_all()


def _of_another(error: BaseException) -> BaseException:
    """For a run whose sequences were in a batch that failed: its own copy, because a traceback belongs to one thread."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return type(error)(str(error))
    return TrainingError(f"a batch that this run shared with others failed: {type(error).__name__}: {error}")


def _groups(parts: Sequence[tuple[Seat, Batch]]) -> Iterator[list[tuple[Seat, Batch]]]:
    """Neighbours that may be one batch: alike in their linears and their roads, and together within everybody's bound."""
    group: list[tuple[Seat, Batch]] = []
    for seat, batch in parts:
        if group and not _fit([*group, (seat, batch)]):
            yield group
            group = []
        group.append((seat, batch))
    if group:
        yield group


def _fit(group: Sequence[tuple[Seat, Batch]]) -> bool:
    first = group[0][0]
    longest = max(batch.ids_BT.shape[1] for _, batch in group)
    num_tokens = longest * sum(len(batch.ids_BT) for _, batch in group)
    return all(
        num_tokens <= seat.max_tokens
        and seat.fused.keys() == first.fused.keys()
        and seat.objective.roads == first.objective.roads
        and (seat.batches.capacity is None) == (first.batches.capacity is None)
        for seat, _ in group
    )
