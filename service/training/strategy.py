"""How one run is spread over workers: `ddp` here, ZeRO in `zero.py`. The loop asks both for the same few things.

`ddp`: every worker holds the whole model and computes its share of each step. Right whenever the model, its gradients and
its optimizer fit one worker: always for adapters, whose state is a few megabytes. Gradients of the *sum* of token losses
are added over the workers once a step, in one flat float32 buffer, and divided by the number of supervised tokens of the
whole global batch, which the plan knows beforehand. So neither the number of workers nor the micro-batch changes the
loss. One buffer a step is the right trade for adapters, and for full fine-tuning on few workers. The loss and the request
to stop travel in the same buffer, so that all workers agree on both without a second exchange.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from service.config import LoraBlock, RunConfig
from service.training import optim

Tensors = dict[str, torch.Tensor]
Named = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` 1 needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    place: str = field(default_factory=socket.gethostname)  # where this process runs, for people

    @classmethod
    def current(cls, place: str | None = None) -> World:
        """From the torch process group where one exists (Ray Train makes it), else a world of one."""
        place = place or socket.gethostname()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device, place)
        return cls(device=device, place=place)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some worker: the same answer on all."""
        return bool(self.add_up(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def from_first(self, value: int) -> int:
        """The first worker's value, on all."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            dist.barrier()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another worker was gone. gloo has no class of its own for it: its file names do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


@dataclass(frozen=True)
class StepSums:
    """What the workers agree on after the backward passes: the loss per supervised token, and whether to stop."""

    loss: float
    stop: bool


@dataclass(frozen=True)
class Update:
    """What the update did. `skipped` when fp16's search for its loss scale threw the step's gradients away."""

    grad_norm: float  # before clipping; not finite: the weights must not be used any more
    skipped: bool = False
    loss_scale: float = 1.0


class Strategy(Protocol):
    """In each step: `begin`, `backward` for every micro-batch, `finish`, `update`. All workers make the same calls."""

    equal_rounds: bool  # every worker needs the same number of micro-batches: give fillers where it has fewer

    def begin(self, supervised_tokens: int) -> None:
        """Start a step whose global batch has so many supervised tokens; forgets gradients that were not used."""

    def backward(self, loss_sum: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch's summed loss. `last` of this worker's micro-batches in the step."""

    def finish(self, loss_sum: float, *, stop: bool) -> StepSums:
        """Agree with the other workers on the loss and on stopping; the step's gradients are summed and divided."""

    def update(self, lr: float) -> Update:
        """Clip, and move the weights with this rate. A collective."""

    def state(self) -> Iterator[tuple[str, Tensors]]:
        """For each trainable parameter by name, in order: its whole float32 `weight` and moments, on the CPU.

        A collective: every worker goes through it to the end and sees the same tensors.
        """

    def load_state(self, read: Callable[[str], Tensors]) -> None:
        """Put back what `state` gave; `read` is asked for each name, in order, on every worker. A collective."""

    def scalars(self) -> dict[str, float]:
        """What else must be put back on resuming, such as fp16's loss scale."""

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Put back what `scalars` gave."""

    def gathered(self) -> AbstractContextManager[None]:
        """While inside, every trainable weight is whole on every worker, to be read. A collective."""


class DataParallel:
    """`ddp`: see the top of the file. `scaler` is fp16's search for the largest loss scale that does not overflow."""

    equal_rounds = False

    def __init__(
        self, named: Named, optimizer: torch.optim.Optimizer, world: World, clip: float, *, fp16: bool = False
    ) -> None:
        self._named, self._optimizer, self._world, self._clip = named, optimizer, world, clip
        self._scale = LossScale() if fp16 else None
        self._supervised = 1
        parameters = [p for _, p in named]
        wrong = [p.dtype for p in parameters if p.dtype != torch.float32]
        assert not wrong, f"trainable weights are float32, seen {wrong[0]}"
        self._flat = torch.zeros(sum(p.numel() for p in parameters) + 2, dtype=torch.float32, device=world.device)
        offset = 0
        for parameter in parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def begin(self, supervised_tokens: int) -> None:
        """Forget the last step's gradients."""
        self._flat.zero_()
        self._supervised = supervised_tokens

    def backward(self, loss_sum: torch.Tensor, *, last: bool) -> None:
        """Accumulate into the buffer; nothing is exchanged yet."""
        if self._scale:  # float16 ends at 65,504: what is scaled is the step's mean, not the sum
            loss_sum = loss_sum * (self._scale.value / self._supervised)
        loss_sum.backward()  # type: ignore[no-untyped-call]

    def finish(self, loss_sum: float, *, stop: bool) -> StepSums:
        """Sum over workers, then divide by the supervised tokens of the global batch; gradients are in place."""
        self._flat[-2] = loss_sum
        self._flat[-1] = float(stop)
        self._world.add_up(self._flat)
        loss, stops = self._flat[-2:].tolist()
        self._flat.div_(self._scale.value if self._scale else self._supervised)
        return StepSums(loss / self._supervised, stops > 0)

    def update(self, lr: float) -> Update:
        """Clip by the norm over all gradients, then step."""
        gradients = self._flat[:-2]
        norm = float(gradients.norm().item())
        scale = self._scale.value if self._scale else 1.0
        if self._scale and not self._scale.accept(math.isfinite(norm)):
            return Update(norm, skipped=True, loss_scale=scale)
        if math.isfinite(norm):
            if self._clip and norm > self._clip:
                gradients.mul_(self._clip / (norm + 1e-6))
            optim.set_lr(self._optimizer, lr)
            self._optimizer.step()
        return Update(norm, loss_scale=scale)

    def state(self) -> Iterator[tuple[str, Tensors]]:
        """Every worker holds everything: nothing is exchanged."""
        for name, parameter in self._named:
            moments = optim.moments(self._optimizer, parameter)
            yield name, {"weight": parameter.detach().cpu(), **moments}

    def load_state(self, read: Callable[[str], Tensors]) -> None:
        """Copy in place: the parameters stay the optimizer's own."""
        for name, parameter in self._named:
            tensors = read(name)
            with torch.no_grad():
                parameter.copy_(tensors["weight"])
            optim.restore_moments(self._optimizer, parameter, {k: t for k, t in tensors.items() if k != "weight"})

    def scalars(self) -> dict[str, float]:
        """The loss scale and how many good steps it has seen."""
        return self._scale.scalars() if self._scale else {}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Go on with the same loss scale."""
        if self._scale:
            self._scale.load(scalars)

    def gathered(self) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()


class LossScale:
    """fp16's dynamic loss scale (arXiv:1710.03740 section 3.2): halved at an overflow, doubled after `GROW_EVERY` good steps."""

    FIRST = 2.0**16
    GROW_EVERY = 2000

    def __init__(self) -> None:
        self.value = self.FIRST
        self.good = 0

    def accept(self, finite: bool) -> bool:
        """Whether a step's gradients may be used; moves the scale. Below 1 the search has failed: they are not fp16's fault."""
        if not finite and self.value > 1:
            self.value, self.good = self.value / 2, 0
            return False
        self.good += 1
        if self.good == self.GROW_EVERY:
            self.value, self.good = self.value * 2, 0
        return True

    def scalars(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"loss_scale": self.value, "good_steps": float(self.good)}

    def load(self, scalars: Mapping[str, float]) -> None:
        """What `scalars` gave, among other values."""
        self.value, self.good = scalars["loss_scale"], int(scalars["good_steps"])


def build_strategy(config: RunConfig, objective: torch.nn.Module, named: Named, world: World) -> Strategy:
    """The strategy of `scale.strategy` around an objective whose trainable parameters are `named`."""
    optimizer = optim.build_optimizer(named, config.optim, config.method)
    if config.scale.strategy == "ddp":
        return DataParallel(named, optimizer, world, config.optim.clip, fp16=config.precision == "fp16")
    from service.training.zero import Zero

    return Zero(config, objective, named, optimizer, world)


def loading(config: RunConfig) -> AbstractContextManager[None]:
    """Around loading the model: under zero3 every weight is spread over the workers as soon as it is read."""
    if config.scale.strategy != "zero3" or (isinstance(config.method, LoraBlock) and config.method.base_bits != 16):
        return nullcontext()
    from service.training.zero import spread_while_loading

    return spread_while_loading(config)
