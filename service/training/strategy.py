"""How one run is spread over workers. `ddp`: every worker holds the whole model and computes its share of each step.

Gradients of the *sum* of token losses are added over the workers once a step, in one flat float32 buffer, and divided by
the number of supervised tokens of the whole global batch, which the plan knows beforehand. So neither the number of
workers nor the micro-batch changes the loss. One buffer a step is the right trade for adapters: a LoRA's gradients are a
few megabytes, and overlapping their exchange with the backward pass would gain nothing. The loss and the request to stop
travel in the same buffer, so that all workers agree on both without a second exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` 1 needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls) -> World:
        """From the torch process group where one exists (Ray Train makes it), else a world of one."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class StepSums:
    """What the workers agree on after a step: the loss per supervised token, and whether somebody asked to stop."""

    loss: float
    stop: bool


class GradientBuffer:
    """One flat float32 buffer behind the `.grad` of every trainable parameter, with two more cells for loss and stop."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], world: World) -> None:
        wrong = [p.dtype for p in parameters if p.dtype != torch.float32]
        assert not wrong, f"trainable weights are float32, seen {wrong[0]}"
        self._world = world
        self._flat = torch.zeros(sum(p.numel() for p in parameters) + 2, dtype=torch.float32, device=world.device)
        offset = 0
        for parameter in parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def clear(self) -> None:
        """Begin a step."""
        self._flat.zero_()

    def add_up(self, loss_sum: float, supervised_tokens: int, *, stop: bool) -> StepSums:
        """Sum over workers, then divide by the supervised tokens of the global batch; gradients are in place."""
        self._flat[-2] = loss_sum
        self._flat[-1] = float(stop)
        self._world.add_up(self._flat)
        stopping = bool(self._flat[-1].item() > 0)
        self._flat.div_(supervised_tokens)
        return StepSums(float(self._flat[-2].item()), stopping)

    def clip(self, largest: float) -> float:
        """The gradients' norm before clipping; scales them down to `largest` where that is above 0."""
        gradients = self._flat[:-2]
        norm = float(gradients.norm().item())
        if largest and norm > largest:
            gradients.mul_(largest / (norm + 1e-6))
        return norm
