"""What a run would do, before anything is spent: data cards, steps, tokens, parameters; memory, time and advice on request.

`make_run_plan` is what every run begins with: it prepares the data, counts, and refuses what cannot work. `detailed` adds
what only `loray plan` shows: memory by rehearsal (`memory.py`), time by measurement (`probe.py`) or from an earlier run,
and advice. No weight is loaded here.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from service.base_models import BaseModel, resolve_base_model
from service.config import ResolvedRun, RunConfig
from service.data import shards
from service.data.checkup import Checkup
from service.data.prepare import Prepared, prepare_run
from service.data.rendered import renderer_for
from service.data.shards import DataCard, TokenRows
from service.domain import RunState
from service.errors import NotFoundError
from service.runs import list_runs
from service.settings import Settings
from service.training import compatibility, methods
from service.training.batches import Batches, MicroBatch, make_plan, micro_sequences
from service.training.memory import MemoryPlan, Shape, Work, plan_memory
from service.training.methods.loading import meta_base
from service.training.probe import ProbeJob, ProbeResult, run_probe
from service.training.start_checks import head_examples
from service.training.strategy import World

LOOKED_AT_STEPS = 2000  # for the largest micro-batch, evenly over the run: more than that only repeat
EARLIER_RUNS = 20  # the newest, among which one like this is looked for


Digests = tuple[str, str | None, str | None]  # of the prepared data to train, to evaluate and to test on


@dataclass(frozen=True)
class TimePlan:
    """Seconds of the whole run; without `loading_s`, what starts Ray's workers, and the gate."""

    seconds_per_step: float
    training_s: float
    evaluation_s: float
    source: str  # where the figures come from


@dataclass(frozen=True)
class RunPlan:
    """The figures of a run. Bytes are of the whole model; `memory` has those of a worker."""

    base: BaseModel
    train: DataCard
    eval: DataCard | None
    test: DataCard | None
    num_steps: int
    steps_per_epoch: int
    micro: int  # sequences of a micro-batch at most
    total_tokens: int  # that the model will read, padding left out
    supervised_tokens: int  # of them, those that are trained on
    total_parameters: int
    trainable_parameters: int
    trainable_weight_bytes: int
    frozen_weight_bytes: int
    memory: MemoryPlan | None = None
    time: TimePlan | None = None
    probe: ProbeResult | None = None
    advice: tuple[str, ...] = ()
    checkups: tuple[Checkup, ...] = ()  # of the sources to train on

    def as_json(self) -> dict[str, Any]:
        """For `loray plan --json`."""
        return asdict(self) | {
            "base": {"name": self.base.name, "digest": self.base.digest, "path": str(self.base.path)},
            "checkups": [checkup.as_json() for checkup in self.checkups],
        }


def make_run_plan(resolved: ResolvedRun, settings: Settings, digests: Digests | None = None) -> RunPlan:
    """Resolve the base, prepare the data (cached by content), count. Raises ConfigError, DataError, ModelError.

    `digests` of the data as prepared before stand in for the source files of a resumed run.
    """
    config = resolved.config
    base = resolve_base_model(config.model.id, settings.cache, config.model.revision, settings.home)
    architecture = meta_base(base.path).config
    compatibility.refuse(config, architecture)
    data = _prepared_before(digests, settings) if digests else _prepared(config, base, settings)
    train, held_out = data.train, data.eval
    rows = shards.load(train.digest, home=settings.home, cache=settings.cache)
    steps = make_plan(config, rows)
    longest = max(card.longest for card in (train, held_out, data.test) if card)
    compatibility.refuse_steps(config, steps.num_steps, longest, architecture)
    skeleton = methods.skeleton(base.path, config)
    trainable_bytes, frozen_bytes = methods.weight_bytes(skeleton, config)
    drawn = [steps.rows(step) for step in range(steps.num_steps)]
    return RunPlan(
        base=base,
        train=train,
        eval=held_out,
        test=data.test,
        num_steps=steps.num_steps,
        steps_per_epoch=steps.steps_per_epoch,
        micro=micro_sequences(config, rows.lengths, config.scale.max_workers, gpu=torch.cuda.is_available()),
        total_tokens=sum(int(rows.lengths[step].sum()) for step in drawn),
        supervised_tokens=sum(int(rows.supervised[step].sum()) for step in drawn),
        total_parameters=sum(p.numel() for p in skeleton.parameters()),
        trainable_parameters=sum(p.numel() for p in skeleton.parameters() if p.requires_grad),
        trainable_weight_bytes=trainable_bytes,
        frozen_weight_bytes=frozen_bytes,
        checkups=data.checkups,
    )


def detailed(plan: RunPlan, resolved: ResolvedRun, settings: Settings, *, probe: bool) -> RunPlan:
    """The plan with memory, time and advice. `probe`: two steps are really made, in a process of its own."""
    config = resolved.config
    rows = shards.load(plan.train.digest, home=settings.home, cache=settings.cache)
    held_out = shards.load(plan.eval.digest, home=settings.home, cache=settings.cache) if plan.eval else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = plan_memory(config, plan.base.path, _work(config, rows, device), device)
    probed = _probe(config, plan, settings) if probe else None
    time = _measured(config, plan, probed, rows, held_out) if probed else _from_earlier_run(resolved, plan, settings)
    return replace(plan, memory=memory, probe=probed, time=time, advice=tuple(_advice(config, plan, memory)))


def memory_on_cluster(plan: RunPlan, resolved: ResolvedRun, settings: Settings) -> MemoryPlan:
    """The memory of a worker in a pod, on a GPU where `kubernetes.gpus` says so, whatever this machine has."""
    device = torch.device("cuda" if resolved.config.kubernetes.gpus else "cpu")
    rows = shards.load(plan.train.digest, home=settings.home, cache=settings.cache)
    return plan_memory(resolved.config, plan.base.path, _work(resolved.config, rows, device), device)


def _prepared(config: RunConfig, base: BaseModel, settings: Settings) -> Prepared:
    return prepare_run(config, renderer_for(config, base.path), home=settings.home)


def _prepared_before(digests: Digests, settings: Settings) -> Prepared:
    train, held_out, test = digests

    def found(digest: str | None) -> DataCard | None:
        return shards.find(digest, home=settings.home) if digest else None

    return Prepared(shards.find(train, home=settings.home), found(held_out), found(test))


def _work(config: RunConfig, rows: TokenRows, device: torch.device) -> Work:
    """The largest micro-batch of the run, and whatever else decides how much of it is in memory at once."""
    workers = config.scale.min_workers  # with the fewest, each has the most
    steps = make_plan(config, rows)
    micro = micro_sequences(config, rows.lengths, workers, gpu=device.type == "cuda")
    batches = Batches(config, World(0, workers, device), np.argsort(-rows.lengths, kind="stable"), micro)
    batches.capacity = config.data.seq_len if config.data.pack == "auto" else None
    looked_at = range(0, steps.num_steps, max(1, steps.num_steps // LOOKED_AT_STEPS))
    cut = [batches.of(steps.rows(step), rows) for step in looked_at]
    if config.scale.strategy == "ddp":  # it tries one of the longest rows before the first step
        cut.append([batches.largest(rows)])
    largest = max((batch for step in cut for batch in step), key=lambda batch: _size(batch, rows))
    every = config.checkpoint.every
    return Work(
        largest=Shape.of([[rows[row] for row in pack] for pack in largest]),
        first=Shape.of(head_examples(rows, [int(row) for row in steps.rows(0)])),
        world_size=workers,
        packed=batches.capacity is not None,
        accumulates=max(map(len, cut)) > workers,
        saves_between=bool(every.minutes or 0 < every.steps < steps.num_steps),
    )


def _size(batch: MicroBatch, rows: TokenRows) -> tuple[int, int]:
    """Tokens of a micro-batch, padding included, and the supervised ones among them."""
    longest = max(int(rows.lengths[pack].sum()) for pack in batch)
    return len(batch) * longest, sum(int(rows.supervised[pack].sum()) for pack in batch)


def _probe(config: RunConfig, plan: RunPlan, settings: Settings) -> ProbeResult:
    return run_probe(
        ProbeJob(
            home=settings.home,
            cache=str(settings.cache),
            config=config.model_dump(mode="json", by_alias=True),
            base=str(plan.base.path),
            train_digest=plan.train.digest,
            threads=max(1, len(os.sched_getaffinity(0)) // config.scale.max_workers),
        )
    )


def _measured(
    config: RunConfig, plan: RunPlan, probed: ProbeResult, rows: TokenRows, held_out: TokenRows | None
) -> TimePlan:
    workers = config.scale.max_workers
    training_s = plan.total_tokens * probed.seconds_per_token / workers + plan.num_steps * probed.update_s
    evaluated_tokens = plan.test.tokens if plan.test else 0
    if held_out is not None:
        every = config.evaluate.every.steps
        between = (plan.num_steps - 1) // every if every else 0
        evaluated_tokens += (1 + between + config.evaluate.at_start) * int(held_out.lengths.sum())
    evaluation_s = evaluated_tokens * probed.forward_s_per_token / workers
    shown = f"measured here: {probed.steps} steps in one process" + (f", divided by {workers}" if workers > 1 else "")
    return TimePlan(training_s / plan.num_steps, training_s, evaluation_s, shown)


def _from_earlier_run(resolved: ResolvedRun, plan: RunPlan, settings: Settings) -> TimePlan | None:
    """From the rate of the newest run that had the same base, method, precision, strategy and workers."""
    wanted = _kind(resolved.as_json()["config"])
    for run in reversed(list_runs(settings.home)[-EARLIER_RUNS:]):
        try:
            if run.status().state is not RunState.SUCCEEDED or _kind(run.resolved()["config"]) != wanted:
                continue
        except (KeyError, NotFoundError):  # a run of another time, or one that is being deleted
            continue
        rates = [row["train/tokens_per_s"] for row in run.metrics() if row.get("train/tokens_per_s")]
        if rates:
            training_s = plan.total_tokens / statistics.median(rates)
            source = f"rough: from the {statistics.median(rates):,.0f} tokens/s of run {run.id}; --probe measures"
            return TimePlan(training_s / plan.num_steps, training_s, 0.0, source)
    return None


def _kind(config: dict[str, Any]) -> list[Any]:
    scale = config["scale"]
    names = (config["model"]["id"], config["method"]["type"], config["precision"], config["memory"])
    return [*names, scale["workers"], scale["strategy"]]


def _advice(config: RunConfig, plan: RunPlan, memory: MemoryPlan) -> Iterator[str]:
    on_gpu = memory.device == "cuda"
    available = _worker_bytes(config, on_gpu=on_gpu)
    yield from _too_large(memory, available)
    figures = compatibility.Figures(
        trainable_bytes=plan.trainable_weight_bytes,
        frozen_bytes=plan.frozen_weight_bytes,
        worker_bytes=available,
        on_gpu=on_gpu,
    )
    yield from compatibility.advice(config, figures)


def _too_large(memory: MemoryPlan, available: int) -> Iterator[str]:
    phase = max(memory.peaks, key=lambda name: memory.peaks[name])
    if memory.peak > available:
        largest = max(memory.parts, key=lambda part: memory.parts[part])
        yield (
            f"this needs {memory.peak / 2**30:.1f} GiB a worker ({phase}), and a worker of this machine has "
            f"{available / 2**30:.1f} GiB. Most of training is {largest}: "
            + (
                "set memory.checkpoint_activations: true or lower memory.micro."
                if largest == "activations"
                else "take method.type: lora or qlora, scale.strategy: zero3, or more workers."
            )
        )


def _worker_bytes(config: RunConfig, *, on_gpu: bool) -> int:
    """A GPU's memory, or this host's shared between the workers."""
    if on_gpu:
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.scale.max_workers
