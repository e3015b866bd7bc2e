"""The training loop, top to bottom: load, wrap, resume, iterate, evaluate, checkpoint, save, pass the gate.

Plain PyTorch that knows nothing of Ray: it runs in one process, in several with a process group, or under Ray Train
(`trainer.py`), with the same losses. All that it needs is in a `TrainJob`, all that it leaves is in the run's directory.
Which rows belong to a step is decided by `data/planner.py`, what a loss is by `objectives/`, which weights move by
`methods/`, how they are spread by `strategy.py` and `zero.py`. Trainable weights, gradients and moments are float32;
`bf16` and `fp16` are the storage of frozen weights and the compute. This thread never waits for storage: `watch.py`
looks for stop requests and writes the logs, `checkpoint.py` uploads, both in threads of their own.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.base_models import BaseModel, resolve_base_model
from service.config import RunConfig
from service.data import shards
from service.data.planner import Rows
from service.data.shards import TokenRows
from service.errors import LorayError, ModelError, NotFoundError, TrainingError
from service.logs import LogWriter
from service.runs import Run
from service.settings import scratch
from service.training import handover, methods, optim, start_checks, strategy
from service.training.batches import Batches, make_plan, micro_sequences
from service.training.checkpoint import Identity
from service.training.exported import StorageAway, project_of
from service.training.gate import GateReport
from service.training.keeper import Keeper
from service.training.loader import Loader
from service.training.objectives.sft import Batch, SupervisedLoss
from service.training.patience import Patience
from service.training.profiling import profiler
from service.training.ranklog import RankLog
from service.training.strategy import World
from service.training.together import Seat, Together
from service.training.watch import Watch

AGREE_EVERY_S = 10.0  # inside a step longer than twice this, the workers agree so often on whether to stop

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
    test_digest: str | None = None  # read once, after the last step
    micro: int | None = None  # instead of memory.micro, after that did not fit
    profile: bool = False  # leave a torch profiler trace in the run
    asked_at: float = 0.0  # when the user asked, in seconds since the epoch: start-up is counted from here
    sharing: int = 1  # runs like this one that are to have room on the cluster at once

    @property
    def identity(self) -> Identity:
        """What a checkpoint must have come from to be resumed."""
        return Identity(self.config, self.base_digest, self.train_digest)


@dataclass(frozen=True)
class TrainResult:
    """How it ended. `stopped` holds the reason when it was asked to stop; then there is no model, but a checkpoint."""

    step: int
    metrics: Metrics
    stopped: str | None = None
    gate: GateReport | None = None
    head: str = "supervised positions"
    packing: str = ""
    seconds: float = 0.0


def train(
    job: TrainJob,
    world: World,
    report: Callable[[Metrics], None] | None = None,
    together: Together | None = None,
) -> TrainResult:
    """Train one run to its end, or until it is asked to stop. Every worker calls it with the same job.

    `report` is called on every worker with the same metrics after each step. `together`: what this run shares with others that
    train in other threads of this process. Raises TrainingError, ModelError, GateError,
    OutOfMemoryError where the micro-batch does not fit, StorageError where storage stayed away too long.
    """
    started = time.monotonic()
    config = RunConfig.model_validate(job.config)
    with StorageAway(job.run_id, project_of(config), str(world.rank)).showing() as away:
        patience = Patience([job.home], config.checkpoint.retry_s, "opening the run", away.heard)
        run = patience.insist(lambda: _open(job, world))
        log = RankLog(run, world.rank, job.attempt)
        closing: list[Callable[[], None]] = [log.close]
        try:
            session = _Session(job, config, world, run, log, away, closing, together)
            result = session.train_steps(report)
            if result.stopped is None:
                result = replace(result, gate=session.save_and_check())
        except BaseException as error:
            log.failed()
            _close_quietly(closing, error)
            raise
        for close in reversed(closing):
            close()
    return replace(result, seconds=time.monotonic() - started)


def _open(job: TrainJob, world: World) -> Run:
    try:
        return Run.open(job.home, job.run_id)
    except NotFoundError as error:
        raise TrainingError(
            f"worker {world.rank} on {world.place} does not find the run in LORAY_HOME, {job.home}: there it is not the "
            "driver's. Set LORAY_HOME to an s3:// URI, or to a directory that every node mounts at the same path; "
            "loray doctor looks at all nodes."
        ) from error


def _close_quietly(closing: list[Callable[[], None]], error: BaseException) -> None:
    """Close after a failure; what fails then is added to that failure's notes and never replaces it."""
    for close in reversed(closing):
        try:
            close()
        except LorayError as another:
            error.add_note(f"and then: {another}")


class _Session:
    """What lives as long as one attempt: the model, its optimizer, the data, the logs."""

    def __init__(
        self,
        job: TrainJob,
        config: RunConfig,
        world: World,
        run: Run,
        log: RankLog,
        away: StorageAway,
        closing: list[Callable[[], None]],
        together: Together | None,
    ) -> None:
        self.job, self.config, self.world, self.run, self.log, self.away = job, config, world, run, log, away
        self.together = together
        self.seat: Seat | None = None  # its micro-batches are computed with other runs'
        self.turn: Callable[[], AbstractContextManager[None]] = together.turn if together else nullcontext
        writer = f"a{job.attempt}-r{world.rank}"
        self.metrics, self.ledger, self.events = (
            LogWriter(run.path(name), writer, flush_every_s=math.inf) for name in ("metrics", "ledger", "events")
        )
        logs = (self.metrics, self.ledger, self.events)
        self.watch = Watch(run, world.rank, job.attempt, log, logs, config.scale.stall_s, config.checkpoint.retry_s)
        closing.append(self.watch.close)
        self.born = time.time()
        where = f"{world.rank} of {world.size} on {world.place}, process {os.getpid()}"
        self.events.append({"time": time.time(), "kind": "worker", "text": where, "place": world.place})
        cache = Path(job.cache)
        insist = self._patience("the base and the data").insist
        base = insist(lambda: _verified_base(job, config, cache))
        self.rows = insist(lambda: shards.load(job.train_digest, home=job.home, cache=cache))
        held_out = job.eval_digest
        self.eval_rows = insist(lambda: shards.load(held_out, home=job.home, cache=cache)) if held_out else None
        self.plan = make_plan(config, self.rows)
        micro = job.micro or self._micro(packed=True)
        self.batches = Batches(config, world, np.argsort(-self.rows.lengths, kind="stable"), micro)
        self.watch.moved("loading the model")
        with self.turn(), strategy.loading(config):
            shared = together.base(base.path, config, world.device) if together else None
            self.model = methods.load_model(base.path, config, world.device, cache, job.home, shared)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.loaded = time.time()
        self.objective = SupervisedLoss(self.model)
        self.strategy = strategy.build_strategy(config, self.objective, named, world)
        names = frozenset(name for name, _ in named)
        self.keeper = Keeper(run, world, job.identity, config, cache, self.strategy, names, self._flush, self._event)
        closing.append(self.keeper.saver.close)
        self.step_seconds = 0.0  # of the last step, the first worker's: the same figure on all

    def train_steps(self, report: Callable[[Metrics], None] | None) -> TrainResult:
        with self.turn():
            step = self._start()
        if self.together:
            self.seat = self.together.seat(self.objective, self.batches, self._largest_tokens())
        last = self._metrics_of(step)
        stopped: str | None = None
        with (
            profiler(self.run, self.world.rank, self.job.attempt, enabled=self.job.profile) as profile,
            self._loader(self.plan.rows, self.plan.num_steps, self.rows) as self.loader,
            self.seat.stepping() if self.seat else nullcontext(),
        ):
            while step < self.plan.num_steps and stopped is None and not self._patience_is_over():
                self.watch.raise_if_failed()
                self.keeper.saver.raise_if_failed()
                with nullcontext() if self.seat else self.turn():
                    # Around the whole of it, because moments are made in an update.
                    with start_checks.out_of_memory_as_ours(self.batches.micro, self.world):
                        metrics, stop = self._step(step)
                    profile.step()
                if metrics is not None:  # else it was not made
                    step, last = step + 1, metrics
                    self._after_step(step, last, report)
                if stop or self.keeper.due(step, self.plan.num_steps):
                    self.watch.moved(f"checkpoint of step {step}")
                    with self._away():
                        self.keeper.take(step)
                if stop and step < self.plan.num_steps:
                    stopped = self.watch.stop_reason or "asked to stop"  # another worker may have seen the reason first
        self.keeper.saver.wait()
        if stopped is None:
            if (best := self.keeper.back_to_the_best(step)) != step:
                step, last = best, self._metrics_of(best)
            with self.turn():
                measured = self._test()
            if measured:
                last |= measured
                self._log(step, last)
        return TrainResult(step, last, stopped, head=self.head, packing=self.packing)

    def _start(self) -> int:
        """Resume, and try what must be tried before the first step; the number of steps already done."""
        self.watch.moved("looking for a checkpoint")
        step = self.keeper.resume()
        first, precision = [int(row) for row in self.plan.rows(0)], self.config.precision
        self.watch.moved("trying the head, packing and the largest micro-batch")
        with start_checks.out_of_memory_as_ours(self.batches.micro, self.world):
            self.head = start_checks.check_head(self.objective, self.batches, self.rows, first, precision)
            start_checks.check_causal(self.objective, self.batches, self.rows, first)
        self.packing = "a row a sequence, padded: data.pack is never"
        if self.config.data.pack == "auto":
            seq_len = self.config.data.seq_len
            self.packing = start_checks.check_packing(self.objective, self.batches, self.rows, first, seq_len)
            if self.batches.capacity is None and self.job.micro is None:
                self.batches.micro = self._micro(packed=False)
        start_checks.check_memory(self.objective, self.strategy, self.batches, self.rows)
        self._event("head", self.head)
        self._event("packing", self.packing)
        self._event("ready", self._startup())
        if step == 0 and self.config.evaluate.at_start:
            self._log(0, self._evaluate("eval", self.eval_rows))
        return step

    def _loader(self, rows_of: Callable[[int], Rows], num_steps: int, source: TokenRows) -> Loader:
        patience = self._patience("reading data")
        return Loader(rows_of, num_steps, self.batches, source, patience, fillers=self.strategy.equal_rounds)

    def _largest_tokens(self) -> int:
        sequences = self.batches.largest(self.rows)
        return len(sequences) * max(int(self.rows.lengths[pack].sum()) for pack in sequences)

    def _micro(self, *, packed: bool) -> int:
        gpu = self.world.device.type == "cuda"
        return micro_sequences(self.config, self.rows.lengths, self.world.size, packed=packed, gpu=gpu)

    def _after_step(self, step: int, metrics: Metrics, report: Callable[[Metrics], None] | None) -> None:
        """Evaluate where it is time, and tell everybody."""
        if step == self.plan.num_steps or _due(step, self.config.evaluate.every.steps):
            with self._away(), self.turn():
                metrics |= self._evaluate("eval", self.eval_rows)
            self.keeper.evaluated(step, metrics)
        self._log(step, metrics)
        if report:
            report(metrics)

    def _patience_is_over(self) -> bool:
        return self.keeper.progress.exhausted(self.config.stop)

    def _step(self, step: int) -> tuple[Metrics | None, bool]:
        """One optimizer step over the global batch; this worker computes its share of the micro-batches.

        The metrics are None when the step was not made: abandoned, because somebody asked to stop and it would have taken
        long, or overflown in float16, whose loss scale is smaller now.
        """
        started = time.monotonic()
        if self.seat:
            self.seat.waited_s = 0.0
        share = self.loader.begin(step)
        rows, batches, mine = np.asarray(share.rows), share.batches, share.mine
        supervised = int(self.rows.supervised[rows].sum())
        self.strategy.begin(supervised)
        loss_sum = 0.0
        suspects: list[int] = []
        for turn, index in enumerate(mine):
            if self._agree_to_stop(turn, len(mine)):
                return None, True
            self.watch.moved(f"step {step + 1}, micro-batch {turn + 1} of {len(mine)}")
            last = turn == len(mine) - 1
            if index is None:
                self._filler(last)
                continue
            if self.seat is None:  # else nothing draws, and another run may be drawing
                torch.manual_seed(_draw_seed(self.config.seed, step, index))  # dropout: the same draws on any worker
            batch = self.loader.take()
            assert batch is not None, "a turn with an index has a micro-batch"
            value = self.seat.compute(batch) if self.seat else self._compute(batch, last)
            suspects += [] if math.isfinite(value) else [row for pack in batches[index] for row in pack]
            loss_sum += value
        sums = self.strategy.finish(loss_sum, stop=self.watch.stop_reason is not None)
        self._demand_finite(step, "loss", sums.loss, rows, suspects)
        rate = optim.lr_at(step, self.plan.num_steps, self.config.optim)
        update = self.strategy.update(rate)
        if update.skipped:  # the same rows again, with a smaller scale: no draw is lost
            self.log.say(f"step {step + 1}: overflow in float16 at a loss scale of {update.loss_scale:g}")
            return None, sums.stop
        self._demand_finite(step, "gradient norm", update.grad_norm, rows, suspects)
        drawn = [int(self.rows.row_numbers[row]) for i in mine if i is not None for pack in batches[i] for row in pack]
        self.ledger.append({"step": step + 1, "ids": drawn})
        seconds = time.monotonic() - started - (self.seat.waited_s if self.seat else 0.0)
        self.step_seconds = self.world.from_first(int(1000 * seconds)) / 1000
        tokens = int(self.rows.lengths[rows].sum())
        metrics = {
            "train/loss": sums.loss,
            "train/grad_norm": update.grad_norm,
            "train/tokens": float(tokens),
            "train/supervised_tokens": float(supervised),
            "train/tokens_per_s": tokens / seconds,
            "train/data_wait_share": self.loader.waited_s / seconds,
            "optim/lr": rate,
            "train/epoch": self.plan.epochs(step + 1),
            "memory/peak_bytes": float(_peak_bytes(self.world.device)),
        }
        if self.config.precision == "fp16":
            metrics["optim/loss_scale"] = update.loss_scale
        return metrics, sums.stop

    def _compute(self, batch: Batch, last: bool) -> float:
        """The summed loss of a micro-batch, in nats; its gradients are added.

        Its graph is gone at the end: bitsandbytes' products keep weights there, under zero3 a gathered copy of each.
        """
        with self.batches.compute():
            loss = self.objective(batch)
        self.strategy.backward(loss, last=last)
        return float(loss.item())

    def _away(self) -> AbstractContextManager[None]:
        """Around what takes long between steps: runs that share this one's batches do not wait for it."""
        return self.seat.away() if self.seat else nullcontext()

    def _filler(self, last: bool) -> None:
        """A turn of a worker that has fewer micro-batches than another: where collectives must be equal, one of weight 0."""
        batch = self.loader.take()
        if not self.strategy.equal_rounds:
            return
        with self.batches.compute():
            loss = self.objective(batch)
        self.strategy.backward(loss * 0.0, last=last)

    def _agree_to_stop(self, turn: int, turns: int) -> bool:
        """Inside a long step: whether somebody was asked to stop. All workers look at the same turns.

        A step that takes less than twice AGREE_EVERY_S is finished instead, so that nothing has to be trained again.
        """
        seconds = self.step_seconds
        if turn == 0 or seconds < 2 * AGREE_EVERY_S:
            return False
        every = max(1, round(turns * AGREE_EVERY_S / seconds))
        return turn % every == 0 and self.world.any(self.watch.stop_reason is not None)

    def _demand_finite(
        self, step: int, what: str, value: float, rows: npt.NDArray[np.int64], suspects: Sequence[int]
    ) -> None:
        """Stop on all workers, which have the same value, and name the rows that any of them suspects; else the step's."""
        if math.isfinite(value):
            return
        suspected = torch.tensor([float(row in suspects) for row in rows], device=self.world.device)
        named = rows[self.world.add_up(suspected).cpu().numpy() > 0]
        numbers = self.rows.row_numbers[named if len(named) else rows].tolist()
        raise TrainingError(
            f"step {step + 1}: {what} {value}, among rows {self.rows.card.where(numbers)}. "
            "Lower optim.lr, or look at these rows; the last checkpoint is from before."
        )

    def _test(self) -> Metrics:
        """The loss on `data.test` of the model that is saved. Its rows are not even opened before."""
        if self.job.test_digest is None:
            return {}
        self.watch.moved("the test")
        digest, cache = self.job.test_digest, Path(self.job.cache)
        insist = self._patience("the test rows").insist
        return self._evaluate("test", insist(lambda: shards.load(digest, home=self.job.home, cache=cache)))

    @torch.no_grad()
    def _evaluate(self, name: str, rows: TokenRows | None) -> Metrics:
        """Held-out loss in nats per supervised token, over all rows, shared between the workers; `name` is in the metrics'."""
        if rows is None:
            return {}
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.model.eval()
        with self._loader(lambda _: range(len(rows)), 1, rows) as loader:
            mine = loader.begin(0).mine
            for turn, index in enumerate(mine):
                self.watch.moved(f"{name}, micro-batch {turn + 1} of {len(mine)}")
                with start_checks.out_of_memory_as_ours(self.batches.micro, self.world), self.batches.compute():
                    if (batch := loader.take()) is None:
                        continue
                    log_probs = self.objective.log_probs(batch)
                if index is not None:
                    total += torch.stack([-log_probs.double().sum(), log_probs.new_tensor(len(log_probs)).double()])
        self.model.train()
        nats, tokens = self.world.add_up(total).tolist()
        loss = nats / tokens
        return {f"{name}/loss": loss, f"{name}/perplexity": math.exp(min(loss, 700.0))}

    def save_and_check(self) -> GateReport | None:
        """Save the model, free the memory, and have a fresh process reproduce the probe; on the first worker only."""
        self.watch.moved("saving the model")
        with self.turn():
            probe = handover.make_probe(self.objective, self.batches, self.rows)
        weights = ((name, tensors["weight"]) for name, tensors in self.strategy.state())
        with scratch(Path(self.job.cache)) as aside:
            directory = aside / "model"
            if self.world.rank == 0:
                probe = handover.save(self.model, weights, directory, self.config, probe)
            for _ in weights:  # the other workers take part in gathering each weight
                pass
            del weights
            self._free_memory()
            if self.world.rank > 0:
                return None
            self.watch.moved("the gate")
            cache = Path(self.job.cache)
            insist = self._patience("the finished model").insist
            base = insist(
                lambda: _verified_base(self.job, self.config, cache)
            )  # its cache may have been deleted meanwhile
            return handover.check_and_keep(
                directory, base.path, probe, self.config, self.run, self.job.home, cache, insist
            )

    def _free_memory(self) -> None:
        del self.objective, self.model, self.strategy, self.keeper, self.seat
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _metrics_of(self, step: int) -> Metrics:
        """What was logged for a step by an earlier attempt, or before."""
        metrics = self._patience("the run's metrics").insist(self.run.metrics) if step else []
        rows = [row for row in metrics if row["step"] == step]
        return {name: value for row in rows for name, value in row.items() if name != "step"}

    def _patience(self, what: str) -> Patience:
        places = (self.job.home, self.job.base_source)
        return Patience(places, self.config.checkpoint.retry_s, what, self._event)

    def _startup(self) -> str:
        """Where the seconds between asking and the first step went."""
        now = time.time()
        parts = {"start the workers": self.born - (self.job.asked_at or self.born)}
        parts |= {"load the model": self.loaded - self.born, "wrap, resume and probe": now - self.loaded}
        return f"{sum(parts.values()):.1f} s: " + ", ".join(f"{what} {seconds:.1f}" for what, seconds in parts.items())

    def _flush(self) -> None:
        """Before a checkpoint: the logs up to there, and nothing where another driver has begun a later attempt."""
        newest = self.run.status().details.get("attempt", 0) if self.world.rank == 0 else 0
        if newest > self.job.attempt:
            raise TrainingError(
                f"attempt {self.job.attempt} of run {self.run.id} saves nothing any more: attempt {newest} has begun, because "
                "this one's driver was not heard of for too long. Leave the run to it."
            )
        self.metrics.flush()
        self.ledger.flush()

    def _log(self, step: int, metrics: Metrics) -> None:
        figures = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        self.log.say(f"step {step}/{self.plan.num_steps}  {figures}")
        if self.world.rank == 0 and metrics:
            self.metrics.append({"step": step, **metrics})

    def _event(self, kind: str, text: str) -> None:
        self.log.say(f"{kind}: {text}")
        self.away.heard(kind, text)  # by every worker: what it has of the events cannot be read while storage is away
        if self.world.rank == 0:
            self.events.append({"time": time.time(), "kind": kind, "text": text})


def _verified_base(job: TrainJob, config: RunConfig, cache: Path) -> BaseModel:
    base = resolve_base_model(job.base_source, cache, config.model.revision, job.home)
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
