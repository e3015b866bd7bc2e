"""ZeRO (arXiv:1910.02054) through DeepSpeed: what every worker holds whole under `ddp` is split between the workers.

DeepSpeed is given float32 trainable weights, our own AdamW and no fp16 or bf16 block: it splits, sums and steps; the
compute precision is the loop's autocast, the storage of frozen weights the loader's. Bytes a trainable weight, on each
of N workers, between steps and while gradients are added up:

    ddp    16               weight 4, gradient 4, AdamW's moments 8
    zero1  8 + 12 / N       whole weight and gradient; a float32 copy to step and the moments are split
    zero2  4 + 16 / N       whole weight; gradients are split as soon as a bucket of them is summed
    zero3  20 / N           weights too: each is gathered when its layer runs, and split again after it

zero1 and zero2 cost about what `ddp` costs in messages and are for full fine-tuning whose moments do not fit. They do
nothing for adapters, whose state is megabytes while the frozen base stays whole: take `ddp`. zero3 also splits the
frozen base, so it is for models that do not fit one worker at all; every forward and backward pass then moves all
weights over the network, which on anything slower than NVLink or InfiniBand is most of the time. `offload: optimizer`
keeps moments and the stepped copy in host memory and steps there (PyTorch's AdamW: nothing is compiled, an update takes
seconds a billion weights); `all` (zero3) keeps the split weights there too. Both are for when it does not fit otherwise.

Under zero3 a weight is whole only inside the forward or backward pass of a module that owns it. An objective that uses a
weight by itself does so inside a child module that holds the same parameter.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from service.config import RunConfig
from service.training import optim
from service.training.strategy import LossScale, Named, StepSums, Tensors, Update, World
from service.training.zero_setup import STAGE, deepspeed_on, engine_config, let_go, spread_while_loading

__all__ = ["Zero", "spread_while_loading"]

MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
)  # AdamW's, which is the only optimizer here: others' state cannot be split and named


class Zero:
    """A DeepSpeed engine as a `Strategy`. All calls are collective, and every worker makes as many in each step."""

    equal_rounds = True

    def __init__(
        self,
        config: RunConfig,
        objective: torch.nn.Module,
        named: Named,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        deepspeed = deepspeed_on(world.device)
        self._named, self._optimizer, self._world = named, optimizer, world
        self._stage = STAGE[config.scale.strategy]
        self._scale = LossScale() if config.precision == "fp16" else None
        self._supervised = 1
        stored = [getattr(p, "ds_tensor", p).dtype for _, p in named]
        assert set(stored) == {torch.float32}, f"trainable weights are float32, seen {stored}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports on the way
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=optimizer,
                config=engine_config(config, objective, world.device),
                dist_init_required=False,
            )
        self._inner = self._engine.optimizer
        weakref.finalize(self, let_go, self._engine).atexit = False

    def begin(self, supervised_tokens: int) -> None:
        """Forget gradients, of an abandoned step too; DeepSpeed has no call for that before an update."""
        self._supervised = supervised_tokens
        inner = self._inner
        # The backward pass starts from 1 and the division comes last, in float32: 1 / tokens has no exact bfloat16. In
        # float16, which ends at 65,504, it starts from the scale of the step's mean.
        begins_at = self._scale.value if self._scale else supervised_tokens
        inner.override_loss_scale(begins_at / self._world.size)
        inner.zero_grad()
        if self._stage == 3:
            inner.grad_partitions_flat_buffer.zero_()  # else a weight that is not used would keep its last gradient
        else:
            inner.micro_step_id = -1
            for sums in (inner.all_grad_tensors, inner.averaged_gradients):
                sums.update(dict.fromkeys(sums))

    def backward(self, loss_sum: torch.Tensor, *, last: bool) -> None:
        """Gradients of the loss; what DeepSpeed multiplies in, it takes out of their mean over the workers before the update."""
        self._inner.clear_backward_seen_flag()  # what calling the engine would do: the loop calls the objective itself
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_sum * (self._world.size / self._supervised), scale_wrt_gas=False)

    def finish(self, loss_sum: float, *, stop: bool) -> StepSums:
        """The gradients were summed on the way; what is left is the loss and the request to stop."""
        sums = torch.tensor([loss_sum, float(stop)], dtype=torch.float64, device=self._world.device)
        loss, stops = self._world.add_up(sums).tolist()
        return StepSums(loss / self._supervised, stops > 0)

    def update(self, lr: float) -> Update:
        """DeepSpeed clips and steps; it leaves the weights alone when the norm is not finite."""
        optim.set_lr(self._optimizer, lr)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if self._scale is None:
            return Update(norm)
        scale = self._scale.value
        return Update(norm, skipped=not self._scale.accept(math.isfinite(norm)), loss_scale=scale)

    def state(self) -> Iterator[tuple[str, Tensors]]:
        """One parameter at a time is whole."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        states = [self._optimizer.state[flat] for flat in self._flat_parts() if self._optimizer.state.get(flat)]
        if states:
            self._link_moments()
        for name, parameter in self._named:
            tensors = {"weight": _whole(safe_get_full_fp32_param(parameter))}
            if states:
                tensors["step"] = states[0]["step"].detach().cpu().clone()
                for key in MOMENTS:
                    tensors[key] = _whole(safe_get_full_optimizer_state(parameter, key))
            yield name, tensors

    def load_state(self, read: Callable[[str], Tensors]) -> None:
        """One parameter at a time is whole. All have taken equally many steps: DeepSpeed keeps one count for many."""
        self._forget_prefetched()
        steps: set[float] = set()
        for name, parameter in self._named:
            tensors = read(name)
            self._set(parameter, tensors["weight"], None)
            if "step" in tensors:
                if not steps:
                    self._make_moments()
                steps.add(float(tensors["step"]))
                for key in MOMENTS:
                    self._set(parameter, tensors[key], key)
        assert len(steps) <= 1, f"all parameters have taken the same number of steps, seen {steps}"
        for flat in self._flat_parts():
            if steps:
                self._optimizer.state[flat]["step"].fill_(*steps)
            else:
                self._optimizer.state.pop(flat, None)
        if self._stage < 3:
            self._inner.update_lp_params()

    def _forget_prefetched(self) -> None:
        """Weights on their way to the layer that DeepSpeed expects next, which nobody may gather or split meanwhile."""
        if self._stage == 3:
            self._inner.empty_partition_cache()

    def _flat_parts(self) -> list[torch.Tensor]:
        """What AdamW really steps on this worker: flat float32 parts of all trainable weights."""
        inner = self._inner
        parts = inner.fp32_partitioned_groups_flat if self._stage == 3 else inner.single_partition_of_fp32_groups
        return list(parts)

    def _make_moments(self) -> None:
        """AdamW makes its moments in the first step; a resumed run needs a place for them before."""
        for flat in self._flat_parts():
            if not self._optimizer.state.get(flat):
                zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
                self._optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        self._link_moments()

    def _link_moments(self) -> None:
        """DeepSpeed links parameters to moments once, after the first group's first step: those of later groups are missing."""
        if self._stage < 3:
            self._inner._hp_optimizer_states_linked = False
            self._inner._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: torch.Tensor, key: str | None) -> None:
        """Put this worker's part of a whole weight (`key` None) or moment in its place."""
        from deepspeed import utils
        from deepspeed.runtime.zero import GatheredParameters

        if self._stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        size = parameter.ds_tensor.numel()  # as large on all workers: the last part is padded
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self._world.size - value.numel()))
        part = padded[size * self._world.rank :][:size]
        if key is not None:
            utils.safe_set_local_optimizer_state(parameter, part, key)
            return
        utils.safe_set_local_fp32_param(parameter, part)
        with GatheredParameters([parameter], modifier_rank=0):  # what computes is another copy than what is stepped
            parameter.data.copy_(value)

    def scalars(self) -> dict[str, float]:
        """The loss scale and how many good steps it has seen."""
        return self._scale.scalars() if self._scale else {}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Go on with the same loss scale."""
        if self._scale:
            self._scale.load(scalars)

    def gathered(self) -> AbstractContextManager[None]:
        """Whole under zero3, too, for as long as it is open; under zero1 and zero2 they always are."""
        if self._stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        self._forget_prefetched()
        gathered: AbstractContextManager[None] = GatheredParameters([p for _, p in self._named])
        return gathered


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in memory of its own size: what DeepSpeed gathers has padding behind it."""
    return tensor.detach().cpu().clone()
