"""The training loop, top to bottom: load, wrap, resume, iterate, report, checkpoint, save, pass the gate.

Plain PyTorch that knows nothing of Ray: it runs in one process, in several with a process group, or under Ray Train
(`trainer.py`), with the same losses. All that it needs is in a `TrainJob`, all that it leaves is in the run's directory.
Which rows belong to a step is decided by `data/planner.py`, what a loss is by `objectives/`, which weights move by
`methods/`. Trainable weights, gradients and moments are float32; `bf16` is the storage of frozen weights and the compute.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service import storage
from service.base_models import BaseModel, resolve_base_model
from service.config import RunConfig
from service.data import planner, prepare
from service.errors import LorayError, ModelError, TrainingError
from service.logs import LogWriter
from service.runs import Run
from service.training import optim
from service.training.checkpoint import Checkpoint, newest_checkpoint, prune, save_checkpoint
from service.training.gate import GateReport, Probe, run_gate
from service.training.methods.lora import apply_lora, save_adapter
from service.training.objectives.sft import Batch, SupervisedLoss, collate
from service.training.ranklog import RankLog
from service.training.strategy import GradientBuffer, World

PROBE_ROWS = 4
HEAD_TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}  # nats, see SupervisedLoss.probe
STOP_LOOK_SHARE = 0.01  # of the time goes into looking for a stop request: storage may be far away

Metrics = dict[str, float]


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs, in plain values that travel between processes."""

    home: str
    cache: str
    run_id: str
    attempt: int  # 1, and one more for each resume: later attempts win where their steps overlap
    config: dict[str, Any]  # RunConfig, as `model_dump(by_alias=True)` gives it
    base_source: str  # what every node resolves: model.id, or the absolute path where that is a directory
    base_digest: str  # what every node must find there
    train_digest: str
    eval_digest: str | None

    @property
    def config_digest(self) -> str:
        """Identifies what a checkpoint may be resumed with."""
        parts = [self.config, self.base_digest, self.train_digest]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrainResult:
    """How it ended. `stopped` holds the reason when it was asked to stop; then there is no model, but a checkpoint."""

    step: int
    metrics: Metrics
    stopped: str | None = None
    gate: GateReport | None = None
    head: str = "supervised positions"
    seconds: float = 0.0


def train(job: TrainJob, world: World, report: Callable[[Metrics], None] | None = None) -> TrainResult:
    """Train one run to its end, or until it is asked to stop. Every worker calls it with the same job.

    `report` is called on every worker with the same metrics after each step. Raises TrainingError, ModelError, GateError.
    """
    started = time.monotonic()
    run = Run.open(job.home, job.run_id)
    log = RankLog(run, world.rank, job.attempt)
    closing: list[Callable[[], None]] = [log.close]
    try:
        session = _Session(job, world, run, log)
        closing.insert(0, session.close)
        result = session.train_steps(report)
        if result.stopped is None and world.rank == 0:
            gate = session.save_and_check()
            result = TrainResult(result.step, result.metrics, gate=gate, head=result.head)
    except BaseException as error:
        log.failed()
        _close_quietly(closing, error)
        raise
    for close in closing:
        close()
    return TrainResult(
        result.step, result.metrics, result.stopped, result.gate, result.head, time.monotonic() - started
    )


def _close_quietly(closing: list[Callable[[], None]], error: BaseException) -> None:
    """Close after a failure; what fails then is added to that failure's notes and never replaces it."""
    for close in closing:
        try:
            close()
        except LorayError as another:
            error.add_note(f"and then: {another}")


class _Session:
    """What lives as long as one attempt: the model, its optimizer, the data, the logs."""

    def __init__(self, job: TrainJob, world: World, run: Run, log: RankLog) -> None:
        self.job, self.world, self.run, self.log = job, world, run, log
        self.config = RunConfig.model_validate(job.config)
        cache = Path(job.cache)
        self.base = _verified_base(job, cache)
        self.rows = prepare.load(job.train_digest, home=job.home, cache=cache)
        self.eval_rows = prepare.load(job.eval_digest, home=job.home, cache=cache) if job.eval_digest else None
        self.lengths, self.supervised = self.rows.lengths, self.rows.supervised
        self.plan = make_plan(self.config, len(self.rows))
        self.micro_rows = micro_rows(self.config, max(self.lengths))
        self.model = load_model(self.base.path, self.config, world.device)
        self.named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.objective = SupervisedLoss(self.model)
        self.optimizer = optim.build_adamw(self.named, self.config.optim)
        self.gradients = GradientBuffer([p for _, p in self.named], world)
        writer = f"a{job.attempt}-r{world.rank}"
        self.metrics = LogWriter(storage.join(run.uri, "metrics"), writer)
        self.ledger = LogWriter(storage.join(run.uri, "ledger"), writer)
        self.events = LogWriter(storage.join(run.uri, "events"), writer)
        self._stop: str | None = None
        self._look_again_at = -math.inf

    def train_steps(self, report: Callable[[Metrics], None] | None) -> TrainResult:
        step = self._resume()
        head = self._probe_head()
        if step == 0 and self.config.evaluate.at_start:
            self._log(0, self._evaluate())
        last = self._metrics_of(step)
        while step < self.plan.num_steps:
            last, stop = self._step(step)
            step += 1
            finished = step == self.plan.num_steps
            if finished or _due(step, self.config.evaluate.every.steps):
                last |= self._evaluate()
            self._log(step, last)
            if finished or stop or _due(step, self.config.checkpoint.every.steps):
                self._checkpoint(step)
            if report:
                report(last)
            if stop and not finished:
                return TrainResult(step, last, stopped=self.run.stop_requested() or "asked to stop", head=head)
        return TrainResult(step, last, head=head)

    def _step(self, step: int) -> tuple[Metrics, bool]:
        """One optimizer step over the global batch; this worker computes its share of the micro-batches."""
        started = time.monotonic()
        rows = self.plan.rows(step)
        batches = planner.micro_batches(rows, self.lengths, self.micro_rows)
        mine = planner.share_of_rank(batches, self.lengths, self.world.rank, self.world.size)
        self.gradients.clear()
        loss_sum = 0.0
        suspects: list[int] = []
        for index in mine:
            torch.manual_seed(_draw_seed(self.config.seed, step, index))  # dropout: the same draws on any worker
            with self._compute():
                loss = self.objective.loss_sum(self._batch(batches[index]))
            value = float(loss.item())
            suspects += [] if math.isfinite(value) else batches[index]
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += value
            self._look_for_stop()
        supervised = sum(self.supervised[row] for row in rows)
        sums = self.gradients.add_up(loss_sum, supervised, stop=self._stop is not None)
        norm = self.gradients.clip(self.config.optim.clip)
        self._demand_finite(step, sums.loss, norm, suspects, rows)
        rate = optim.lr_at(step, self.plan.num_steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        drawn = [int(self.rows.row_numbers[row]) for index in mine for row in batches[index]]
        self.ledger.append({"step": step + 1, "ids": drawn})
        seconds = time.monotonic() - started
        metrics = {
            "train/loss": sums.loss,
            "train/grad_norm": norm,
            "train/supervised_tokens": float(supervised),
            "train/tokens_per_s": sum(self.lengths[row] for row in rows) / seconds,
            "optim/lr": rate,
            "train/epoch": (step + 1) / self.plan.steps_per_epoch,
            "memory/peak_bytes": float(_peak_bytes(self.world.device)),
        }
        return metrics, sums.stop

    def _demand_finite(self, step: int, loss: float, norm: float, suspects: list[int], rows: list[int]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        numbers = sorted(int(self.rows.row_numbers[row]) for row in suspects or rows)
        among = "in the micro-batch of" if suspects else "in the step of"
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}, {among} rows {numbers} of {self.rows.card.source}. "
            "Lower optim.lr, or look at these rows; the last checkpoint is from before."
        )

    @torch.no_grad()
    def _evaluate(self) -> Metrics:
        """Held-out loss in nats per supervised token, over all rows, shared between the workers."""
        if self.eval_rows is None:
            return {}
        lengths = self.eval_rows.lengths
        batches = planner.micro_batches(range(len(self.eval_rows)), lengths, self.micro_rows)
        mine = planner.share_of_rank(batches, lengths, self.world.rank, self.world.size)
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.model.eval()
        for index in mine:
            batch = collate([self.eval_rows[row] for row in batches[index]], self.world.device)
            with self._compute():
                log_probs = self.objective.log_probs(batch)
            total += torch.stack([-log_probs.double().sum(), log_probs.new_tensor(len(log_probs)).double()])
        self.model.train()
        nats, tokens = self.world.add_up(total).tolist()
        loss = nats / tokens
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if any; the step to go on with."""
        checkpoint, passed_over = newest_checkpoint(self.run.uri, self.job.config_digest)
        for line in passed_over:
            self._event("checkpoint_passed_over", line)
        if checkpoint is None:
            return 0
        parameters = dict(self.named)
        if set(parameters) != set(checkpoint.weights):
            raise ModelError(f"the checkpoint of step {checkpoint.step} holds other tensors than this method trains.")
        with torch.no_grad():
            for name, value in checkpoint.weights.items():
                parameters[name].copy_(value)
        optim.restore_moments(self.optimizer, self.named, checkpoint.moments)
        self._event("resumed", f"from the checkpoint of step {checkpoint.step}")
        return checkpoint.step

    def _checkpoint(self, step: int) -> None:
        """Logs first, on every worker, so that a resumed run has all rows before its checkpoint; then the state, once."""
        self.metrics.flush()
        self.ledger.flush()
        self.world.wait_for_all()
        if self.world.rank == 0:
            weights = {name: p.detach().cpu().contiguous() for name, p in self.named}
            state = Checkpoint(step, weights, optim.moments(self.optimizer, self.named))
            save_checkpoint(self.run.uri, state, self.job.config_digest)
            prune(self.run.uri, self.config.checkpoint.keep_last)
        self.log.say(f"checkpoint of step {step} is whole")
        self.log.keep()

    def save_and_check(self) -> GateReport:
        """Save the adapter in PEFT's format, free the memory, and have a fresh process reproduce the probe."""
        with tempfile.TemporaryDirectory(prefix="loray-gate-") as name:
            adapter, probe_file = Path(name) / "model", Path(name) / "probe.json"
            save_adapter(self.model, adapter, self.config.model.id)
            self._make_probe().save(probe_file)
            del self.objective, self.model, self.optimizer, self.gradients, self.named
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            base = _verified_base(self.job, Path(self.job.cache))  # again: the cache may have been deleted meanwhile
            report = run_gate(adapter, base.path, probe_file, self.config.precision)
            for file in sorted(adapter.iterdir()):
                storage.put_file(file, storage.join(self.run.uri, "model", file.name))
        return report

    def _make_probe(self) -> Probe:
        """The trainer's own log-probabilities of a few rows, and how much a batch alone changes them."""
        examples = [self.rows[row] for row in range(min(PROBE_ROWS, len(self.rows)))]
        self.model.eval()
        with self._compute():
            together = self.objective.log_probs(collate(examples, self.world.device))
            alone = torch.cat([self.objective.log_probs(collate([e], self.world.device)) for e in examples])
        return Probe(
            examples=[(ids.tolist(), mask.tolist()) for ids, mask in examples],
            log_probs=together.tolist(),
            noise=float((together - alone).abs().max().item()),
        )

    def _metrics_of(self, step: int) -> Metrics:
        """What an earlier attempt logged for a step, when this one resumes after it."""
        rows = [row for row in self.run.metrics() if row["step"] == step] if step else []
        return {name: value for row in rows for name, value in row.items() if name != "step"}

    def _probe_head(self) -> str:
        batch = self._batch(self.plan.rows(0)[: self.micro_rows])
        self.model.eval()
        with self._compute():
            difference = self.objective.probe(batch, HEAD_TOLERANCE[self.config.precision])
        self.model.train()
        head = "the model's own forward" if self.objective.own_forward else "supervised positions"
        self._event("head", f"{head} (differs from the model's own forward by {difference:.2g} nats)")
        return head

    def _batch(self, rows: list[int]) -> Batch:
        return collate([self.rows[row] for row in rows], self.world.device)

    def _compute(self) -> AbstractContextManager[Any]:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _look_for_stop(self) -> None:
        """Between micro-batches, as often as STOP_LOOK_SHARE allows."""
        before = time.monotonic()
        if before >= self._look_again_at:
            self._stop = self._stop or self.run.stop_requested()
            after = time.monotonic()
            self._look_again_at = after + (after - before) / STOP_LOOK_SHARE

    def _log(self, step: int, metrics: Metrics) -> None:
        figures = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        self.log.say(f"step {step}/{self.plan.num_steps}  {figures}")
        if self.world.rank == 0 and metrics:
            self.metrics.append({"step": step, **metrics})

    def _event(self, kind: str, text: str) -> None:
        self.log.say(f"{kind}: {text}")
        if self.world.rank == 0:
            self.events.append({"time": time.time(), "kind": kind, "text": text})

    def close(self) -> None:
        for log in (self.metrics, self.ledger, self.events):
            log.close()


def make_plan(config: RunConfig, num_examples: int) -> planner.Plan:
    """The steps of a run over so many examples."""
    rows, epochs = config.optim.batch.rows, config.optim.epochs
    return planner.Plan(num_examples, rows, epochs, config.seed, config.optim.max_steps)


def micro_rows(config: RunConfig, longest: int) -> int:
    """Rows of a micro-batch: as the config says, or by itself."""
    if config.memory.micro == "auto":
        return planner.auto_micro_rows(config.optim.batch.rows, config.scale.workers, longest)
    return config.memory.micro


def load_model(path: Path, config: RunConfig, device: torch.device) -> Any:
    """The base in its storage precision, frozen, with the method's float32 weights in it, ready to train."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the model in {path} cannot be loaded as a causal language model: {error}") from error
    model.to(device)
    return apply_lora(model, config.method, config.seed).train()


def _verified_base(job: TrainJob, cache: Path) -> BaseModel:
    base = resolve_base_model(job.base_source, cache, RunConfig.model_validate(job.config).model.revision)
    if base.digest != job.base_digest:
        raise ModelError(
            f"base model {job.base_source!r} on this node has the digest {base.digest[:12]}, the run was planned with "
            f"{job.base_digest[:12]}. Give every node the same files, or an s3:// URI."
        )
    return base


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _draw_seed(seed: int, step: int, index: int) -> int:
    text = f"{seed}:{step}:{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _peak_bytes(device: torch.device) -> int:
    """Largest memory of this worker so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
