"""What was saved is what was trained: checked in a fresh process before anything is published.

    python -m service.training.gate JOB.json

The trainer leaves a probe: a few rows and the log-probabilities it gave them. The fresh process looks at every saved
tensor (`saved_weights.py`), loads what was saved with plain transformers and PEFT (`reloaded.py`), never with the
trainer's code, and demands the same figures. An empty, unchanged or swapped tensor, a model that answers as its base does,
or one that computes something else ends the run as FAILED, with every reason at once. An adapter (`lora`, `qlora`) is
loaded onto the base as the trainer held it; a full model stands alone.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import FullBlock, QloraBlock, RunConfig
from service.domain import ModelKind
from service.errors import GateError, ModelError

if TYPE_CHECKING:
    from service.training.reloaded import Compute
    from service.training.saved_weights import Findings

TIME_LIMIT_S = 3600  # reading a 70B model twice from a network disk

# Nats: the least that counts as a difference between two computations of the same thing. float32: the order of summation.
# bfloat16: one rounding of a logit near 8. float16 rounds eight times finer.
FLOORS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.00625}
# The same where float32 weights (of a full model, or biases) are rounded as they are saved or loaded, and activations are
# then carried in that type from layer to layer. SmolLM2-135M, 197 tokens: 0.27 in bfloat16, 0.042 in float16, where a batch of 4 against
# single rows gave 0.19 and 0.018. What is saved itself is compared to the last bit, by `Probe.weights`.
ROUNDED_FLOORS = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.0625}


@dataclass(frozen=True)
class Probe:
    """Rows and what the trainer gave them: one list of log-probabilities (nats) over all supervised tokens, in order.

    Computed by PEFT's and transformers' own products, as the gate will: how far the trainer's faster ones are from those is
    looked at before (`handover.make_probe`).
    """

    examples: list[tuple[list[int], list[int]]]  # ids, mask
    log_probs: list[float]
    noise: float  # the trainer's own largest difference between a batch and single rows
    weights: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # of a full model: `saved_weights.WeightDigests.of`


@dataclass(frozen=True)
class GateJob:
    """What the fresh process is told. Paths are absolute or relative to the working directory."""

    model: str
    base: str
    kind: ModelKind
    precision: str
    probe: Probe
    base_bits: int = 16
    double_quant: bool = True
    started_from: str | None = None  # the adapter that training began with

    @classmethod
    def read(cls, path: Path) -> GateJob:
        """The job that `run_gate` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "probe": Probe(**values["probe"])})


@dataclass(frozen=True)
class GateReport:
    """The gate's figures; differences in nats per token."""

    alive: int  # of an adapter's updates, magnitudes and biases, or a full model's tensors: changed by training
    total: int
    largest_difference: float  # reloaded against trained
    tolerance: float
    change_from_base: float  # reloaded against base, largest
    rounded_away: int = 0  # tensors that moved less than their stored type shows
    uncompared: int = 0  # tensors that the base's files do not have under their name


def run_gate(model: Path, base: Path, probe: Probe, config: RunConfig, started_from: Path | None = None) -> GateReport:
    """Check in a fresh process what a run of this `config` saved in `model`. Raises GateError with every reason.

    `started_from` is the directory of the adapter that `method.init_from` names.
    """
    with tempfile.TemporaryDirectory(prefix="loray-gate-") as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps(asdict(job_of(model, base, probe, config, started_from))), encoding="utf-8")
        answer = _answer_of_fresh_process(job)
    if answer["reasons"]:
        raise GateError(f"the saved model is not what was trained: {' '.join(answer['reasons'])} It is not published.")
    return GateReport(**answer["report"])


def job_of(model: Path, base: Path, probe: Probe, config: RunConfig, started_from: Path | None = None) -> GateJob:
    """All that the fresh process needs to know of a run's `config`, by value."""
    method = config.method
    if isinstance(method, FullBlock):
        return GateJob(str(model), str(base), "full", config.precision, probe)
    assert (started_from is None) == (method.init_from is None), "method.init_from comes with its directory"
    return GateJob(
        model=str(model),
        base=str(base),
        kind="adapter",
        precision=config.precision,
        probe=probe,
        base_bits=method.base_bits,
        double_quant=isinstance(method, QloraBlock) and method.double_quant,
        started_from=None if started_from is None else str(started_from),
    )


def check(job: GateJob) -> tuple[GateReport | None, list[str]]:
    """The report and the reasons against the model, in this process. No report where it cannot be loaded at all."""
    from safetensors import SafetensorError

    try:
        found = _look_at_tensors(job)
        if not found.loadable:
            return None, found.reasons
    except (ModelError, OSError, SafetensorError) as error:
        return None, [f"its files cannot be read: {error}"]
    try:
        reloaded, noise = _reloaded_values(job)
    except (ModelError, OSError, ValueError, KeyError, RuntimeError) as error:
        # Whatever stops transformers or PEFT from loading it would stop its users.
        return None, [*found.reasons, f"it cannot be loaded: {type(error).__name__}: {error}"]
    if not all(map(math.isfinite, reloaded)):
        return None, [*found.reasons, "the saved model gives log-probabilities that are not finite."]
    report = _report(job, found, reloaded, noise, _base_values(job))
    return report, [*found.reasons, *_differences(report)]


def _look_at_tensors(job: GateJob) -> Findings:
    from service.training import reloaded, saved_weights
    from service.training.saved_weights import Weights

    base = Weights.of_model(Path(job.base))
    if job.kind == "full":
        saved = Weights.of_model(Path(job.model))
        fixed = reloaded.buffer_names(Path(job.model))
        return saved_weights.inspect_model(saved, base, fixed=fixed, digests=job.probe.weights)
    saved = Weights.of_adapter(Path(job.model))
    started_from = Weights.of_adapter(Path(job.started_from)) if job.started_from else None
    magnitudes = {}
    if saved_weights.has_magnitudes(saved) and started_from is None:
        magnitudes = reloaded.initial_magnitudes(reloaded.load_model(Path(job.base), _compute(job)), Path(job.model))
    return saved_weights.inspect_adapter(saved, base, started_from=started_from, magnitudes=magnitudes)


def _reloaded_values(job: GateJob) -> tuple[list[float], float]:
    """The probe's log-probabilities by what was saved, and how much batch size and attention's road alone change them."""
    from service.training import reloaded

    compute, rows = _compute(job), job.probe.examples
    if job.kind == "full":
        model = reloaded.load_model(Path(job.model), compute)
    else:
        model = reloaded.load_adapter(reloaded.load_model(Path(job.base), compute), Path(job.model))
    values = reloaded.log_probs(model, rows, compute)
    alone = [value for row in rows for value in reloaded.log_probs(model, [row], compute)]
    masked = reloaded.log_probs(model, rows, compute, attention_mask=True)
    del model
    reloaded.free_memory()
    return values, max(_largest(values, alone), _largest(values, masked))


def _base_values(job: GateJob) -> list[float]:
    """The same by the base alone: loaded anew, because an adapter may have changed its biases."""
    from service.training import reloaded

    compute = _compute(job)
    return reloaded.log_probs(reloaded.load_model(Path(job.base), compute), job.probe.examples, compute)


def _report(job: GateJob, found: Findings, reloaded: list[float], noise: float, base: list[float]) -> GateReport:
    return GateReport(
        alive=found.alive,
        total=found.total,
        largest_difference=_largest(job.probe.log_probs, reloaded),
        tolerance=_tolerance(job, found.rounded, noise),
        change_from_base=_largest(base, reloaded),
        rounded_away=found.rounded_away,
        uncompared=found.uncompared,
    )


def _tolerance(job: GateJob, rounded: bool, noise: float) -> float:
    """float32: fixed. Else twice the noise that trainer and gate have measured, and at least the type's floor.

    bitsandbytes computes int8 products of float16 numbers whatever the precision is, and picks the columns that it leaves out
    of int8 by the batch: SmolLM2-135M moved by up to 0.67 nats between a batch of 4 and single rows.
    """
    precision = "fp16" if job.base_bits == 8 and job.precision == "fp32" else job.precision
    if precision == "fp32":
        return FLOORS["fp32"]
    floors = ROUNDED_FLOORS if rounded else FLOORS
    return max(floors[precision], 2 * max(job.probe.noise, noise))


def _differences(report: GateReport) -> list[str]:
    reasons = []
    if not report.largest_difference <= report.tolerance:
        reasons.append(
            f"log-probabilities differ by {report.largest_difference:.4g} nats from the trainer's, at most "
            f"{report.tolerance:.4g} is noise."
        )
    if not report.change_from_base > 0:
        reasons.append("training changed nothing: the base answers exactly the same.")
    return reasons


def _compute(job: GateJob) -> Compute:
    from service.training.reloaded import Compute

    return Compute(job.precision, job.base_bits, job.double_quant)  # type: ignore[arg-type]  # read from JSON


def _largest(left: Sequence[float], right: Sequence[float]) -> float:
    differences = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf  # max() would pass over a NaN


def _answer_of_fresh_process(job: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "service.training.gate", str(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise GateError(f"the gate's process did not answer within {TIME_LIMIT_S} s; it was ended.") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise GateError(
            f"the gate's process ended with {done.returncode} and no answer: {done.stderr[-800:]}"
        ) from None
    return answer


def main() -> None:
    """Print `{"report": ..., "reasons": [...]}` as the last line of standard output."""
    report, reasons = check(GateJob.read(Path(sys.argv[1])))
    print(json.dumps({"report": asdict(report) if report else None, "reasons": reasons}))


if __name__ == "__main__":
    main()
