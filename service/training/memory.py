"""How much memory a worker needs: the real step, rehearsed on tensors without content, and what saving and loading add.

The model, the objective, the optimizer and the strategy are the run's own (`live_bytes.py` says how they can run without
content), given the largest micro-batch of the plan. So there is no formula for activations here, and none for what
DeepSpeed holds. What a rehearsal cannot see is added with its reason: the copy of the state that a checkpoint is written
from, the shards of a saved model, a loader's way of reading. Bytes are per worker, above what the process takes with its
libraries. Decides nothing: `plan.py` shows, `compatibility.py` refuses and advises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from service.config import FullBlock, RunConfig
from service.errors import TrainingError
from service.training import methods, optim
from service.training.live_bytes import Bytes, Rehearsal
from service.training.methods.full import SHARD_BYTES as MODEL_SHARD_BYTES
from service.training.methods.loading import STORAGE
from service.training.objectives.attention import BY_EXAMPLE, attend_by_example
from service.training.objectives.sft import Batch, SupervisedLoss, TokenArrays, collate
from service.training.quantised_rehearsal import quantise
from service.training.strategy import DataParallel, Strategy, World

PARTS = (
    *("frozen weights", "trainable weights", "gradients", "optimizer", "activations", "buffers"),
    *("checkpoint", "runtime"),
)
# What Python and the allocator take beside tensors, seen over ddp and ZeRO with and without adapters: 3 to 40 MB, and
# under zero3 DeepSpeed's hooks and records of each module besides: 24 to 70 kB of each.
RUNTIME = 24 * 2**20
RUNTIME_OF_MODULE = {"zero3": 48 * 2**10}
FLOAT32 = 4

Packs = Sequence[Sequence[TokenArrays]]


@dataclass(frozen=True)
class Shape:
    """A micro-batch without its content."""

    sequences: int
    tokens: int
    supervised: int
    starts: Sequence[int]  # of packed examples, padding included; () where nothing is packed

    @classmethod
    def of(cls, packs: Packs) -> Shape:
        """The shape of what `collate` makes of these."""
        batch = collate(packs, torch.device("cpu"))
        positions = batch.positions_BT
        starts = () if positions is None else tuple((positions == 0).flatten().nonzero()[:, 0].tolist())
        sequences, tokens = batch.ids_BT.shape
        return cls(sequences, tokens, int(batch.trained_BT[:, 1:].sum()), starts)

    def batch(self, device: torch.device) -> Batch:
        """A batch of this shape that holds nothing."""
        shape = (self.sequences, self.tokens)
        ids, trained = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.long, torch.bool))
        return Batch(ids, trained, torch.zeros_like(ids) if self.starts else None)


@dataclass(frozen=True)
class Work:
    """What one worker computes at most: its largest micro-batch, and the first one, which the head is probed with."""

    largest: Shape
    first: Shape
    world_size: int
    packed: bool  # rows may share a sequence
    accumulates: bool  # several micro-batches a step
    saves_between: bool  # a checkpoint is uploaded while training goes on


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a worker. `parts` are what is alive at the peak of training, and add up to it."""

    device: str
    parts: Bytes
    peaks: Bytes  # load, train, save, resume
    host_bytes: int  # beside a GPU, in host memory: the copy that a checkpoint or a model is written from
    sequences: int
    tokens: int  # of the longest sequence of the micro-batch
    supervised: int

    @property
    def peak(self) -> int:
        """The largest of all."""
        return max(self.peaks.values())


def plan_memory(config: RunConfig, base: Path, work: Work, device: torch.device) -> MemoryPlan:
    """Rehearse a step of the run on `device`. Raises ConfigError, ModelError as loading would; needs no weights.

    For a GPU of another machine the step is rehearsed on this one's CPU: attention may keep a little more there.

    ZeRO is rehearsed in a process of its own: DeepSpeed keeps process groups in globals, and patches PyTorch for good.
    """
    if config.scale.strategy == "ddp":
        return _rehearse(config, base, work, device)
    job = {"config": config.model_dump(mode="json", by_alias=True), "base": str(base), "device": str(device)}
    done = subprocess.run(
        [sys.executable, "-m", "service.training.memory"],
        input=json.dumps({**job, "work": asdict(work)}),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise TrainingError(f"{config.scale.strategy} could not be rehearsed: {done.stderr.strip()[-1500:]}")
    return MemoryPlan(**json.loads(lines[-1]))


def main() -> None:
    """Rehearse the job on standard input; the plan as JSON is the last line of standard output."""
    job = json.load(sys.stdin)
    largest, first = (Shape(**job["work"].pop(name)) for name in ("largest", "first"))
    config = RunConfig.model_validate(job["config"])
    plan = _rehearse(config, Path(job["base"]), Work(largest, first, **job["work"]), torch.device(job["device"]))
    print(json.dumps(asdict(plan)))


def _rehearse(config: RunConfig, base: Path, work: Work, device: torch.device) -> MemoryPlan:
    model: Any = methods.skeleton(base, config)
    kept = quantise(model, config)
    with warnings.catch_warnings(), _group(config, work.world_size) as world_size, Rehearsal() as rehearsal:
        warnings.simplefilter("ignore")  # DeepSpeed looks at addresses, which fake tensors have not
        here = device if torch.cuda.is_available() else torch.device("cpu")
        stage = _Stage(model, config, World(0, world_size, here), rehearsal)
        stage.set_up(kept, packed=work.packed)
        built = sum(rehearsal.live.live.values())
        stage.probe(work.first)
        build = rehearsal.live.peak
        stage.step([work.largest], warm_up=True)
        rehearsal.live.forget_peak()
        stage.step([work.largest] * (2 if work.accumulates else 1))
        forward = sum(build.values()) - built
        counted = _Counted(build, rehearsal.live.peak, rehearsal.live.live, forward)
        del stage
    return _summary(config, work, device, methods.skeleton(base, config), counted)


@dataclass(frozen=True)
class _Counted:
    """What a rehearsal saw: the peaks of building and of a step, and what stays between steps."""

    build: Bytes
    train: Bytes
    steady: Bytes
    forward: int  # a forward pass alone, as the gate's figures are made


class _Stage:
    """The run's model, objective, optimizer and strategy, inside a rehearsal."""

    def __init__(self, model: Any, config: RunConfig, world: World, rehearsal: Rehearsal) -> None:
        self._model, self._config, self._world, self._rehearsal = model, config, world, rehearsal
        self._live = rehearsal.live

    def set_up(self, kept: set[int], *, packed: bool) -> None:
        """Build all of it. `kept`: ids of the weights that keep their type, because they are quantised."""
        config, model, world = self._config, self._model, self._world

        def stored(parameter: torch.nn.Parameter) -> torch.dtype:
            if id(parameter) in kept:
                return parameter.dtype
            return torch.float32 if parameter.requires_grad else STORAGE[config.precision]

        self._rehearsal.give_storage(model, world.device, stored)
        methods.ready_to_train(model, config)
        self._objective = SupervisedLoss(model)
        self._objective.to = lambda *_: self._objective  # type: ignore[method-assign]  # it is there
        if packed and attend_by_example(model.get_base_model() if hasattr(model, "get_base_model") else model):
            attend = ALL_ATTENTION_FUNCTIONS[BY_EXAMPLE]
            AttentionInterface.register(BY_EXAMPLE, self._rehearsal.knowing(attend))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._optimizer = optim.build_optimizer(named, config.optim, config.method)
        self._strategy = self._build(named)
        self._assign()

    def _build(self, named: list[tuple[str, torch.nn.Parameter]]) -> Strategy:
        config = self._config
        if config.scale.strategy == "ddp":
            with self._live.counting_as("gradients"):
                fp16 = config.precision == "fp16"
                return DataParallel(named, self._optimizer, self._world, config.optim.clip, fp16=fp16)
        from service.training.zero import Zero

        return Zero(config, self._objective, named, self._optimizer, self._world)

    def _assign(self) -> None:
        """What DeepSpeed has moved elsewhere is still what it was."""
        weights: set[int] = set()
        for parameter in self._model.parameters():
            held = getattr(parameter, "ds_tensor", parameter)  # under zero3: this worker's share
            part = "trainable weights" if parameter.requires_grad else "frozen weights"
            self._live.assign([held], part)
            weights.add(held.untyped_storage()._cdata)
        engine = getattr(self._strategy, "_inner", None)
        gradients = getattr(engine, "grad_partitions_flat_buffer", None)  # zero3's, made once and for all
        if gradients is not None:
            self._live.assign([gradients], "gradients")
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        moved = [t for t in (*state, *stepped) if isinstance(t, torch.Tensor)]
        own = [t for t in moved if t.numel() and t.untyped_storage()._cdata not in weights]
        self._live.assign(own, "optimizer")

    def probe(self, first: Shape) -> None:
        """The loop's look at the head: the model's own forward, whose logits cover every position."""
        self._rehearsal.know(first.supervised, first.starts)
        self._model.eval()
        with self._live.counting_as("activations"), self._compute():
            self._objective.own_forward = True
            self._objective.log_probs(first.batch(self._world.device))
        self._objective.own_forward = self._objective.head is None
        self._model.train()

    def step(self, micro_batches: list[Shape], *, warm_up: bool = False) -> None:
        """One optimizer step. A warm-up of `ddp` is its update only: gradients are there from the beginning."""
        self._strategy.begin(1)
        if not (warm_up and self._config.scale.strategy == "ddp"):
            for turn, shape in enumerate(micro_batches):
                self._micro_batch(shape, last=turn == len(micro_batches) - 1)
        with self._live.counting_as("optimizer"):
            self._strategy.update(1e-5)
        self._assign()

    def _micro_batch(self, shape: Shape, *, last: bool) -> None:
        self._rehearsal.know(shape.supervised, shape.starts)
        before = self._live.alive()
        with self._live.counting_as("activations"):
            with self._compute():
                loss = self._objective(shape.batch(self._world.device))
            self._strategy.backward(loss, last=last)
        del loss
        self._live.assign_since(before, "gradients")

    def _compute(self) -> torch.autocast:
        dtype = STORAGE[self._config.precision]
        return torch.autocast(self._world.device.type, dtype=dtype, enabled=dtype is not torch.float32)


def _summary(config: RunConfig, work: Work, device: torch.device, model: Any, counted: _Counted) -> MemoryPlan:
    """Add what the rehearsal could not see. On a GPU, copies of the state and files being written are the host's."""
    trainable_bytes, frozen_bytes = methods.weight_bytes(model, config)
    trainable = trainable_bytes // FLOAT32
    moments = counted.steady.get("optimizer", 0) if config.scale.strategy == "ddp" else 2 * trainable_bytes
    snapshot = (trainable_bytes + moments) // work.world_size
    stored = STORAGE[config.precision].itemsize if isinstance(config.method, FullBlock) else FLOAT32
    written = 2 * min(stored * trainable, MODEL_SHARD_BYTES)  # a shard, and its bytes on their way into a file
    parts = {part: counted.train.get(part, 0) for part in PARTS}
    modules = sum(1 for _ in model.modules())
    parts["runtime"] = runtime = RUNTIME + modules * RUNTIME_OF_MODULE.get(config.scale.strategy, 0)
    steady = sum(counted.steady.values()) + runtime
    on_host = device.type == "cpu"
    if on_host and work.saves_between:
        parts["checkpoint"] = snapshot
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    peaks = {
        "load": max(trainable_bytes + frozen_bytes, sum(counted.build.values())) + runtime,
        "train": sum(parts.values()),
        "save": steady + max([counted.forward, *((snapshot, written) if on_host else ())]),
        "resume": steady + 3 * FLOAT32 * largest,  # one weight at a time with its two moments
    }
    host = 0 if on_host else max(snapshot, written)
    return MemoryPlan(
        device.type, parts, peaks, host, work.largest.sequences, work.largest.tokens, work.largest.supervised
    )


@contextmanager
def _group(config: RunConfig, world_size: int) -> Iterator[int]:
    """A process group of `world_size` of which only this worker exists; under `ddp` none is needed, and 1 is given."""
    if config.scale.strategy == "ddp":
        yield 1
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    with _nobody_to_disagree():
        yield world_size
    dist.destroy_process_group()


@contextmanager
def _nobody_to_disagree() -> Iterator[None]:
    """DeepSpeed compares its traces over the workers by content, which here nothing has."""
    try:
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    except ImportError:  # Zero says so, and how to install it
        yield
        return
    check = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = lambda _: None
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = check


if __name__ == "__main__":
    main()
