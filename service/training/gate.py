"""What was saved is what was trained: checked in a fresh process before anything is published.

    python -m service.training.gate ADAPTER_DIR BASE_DIR PROBE_FILE PRECISION

The trainer leaves a probe: a few rows and the log-probabilities it gave them. This process loads the base and the saved
adapter with plain transformers and PEFT, never with the trainer's code, and demands the same figures. An empty or
unchanged tensor, an adapter that changes nothing, or one that computes something else ends the run as FAILED.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.errors import GateError

TIME_LIMIT_S = 3600  # reading a 70B model twice from a network disk
FLOAT32_TOLERANCE = 1e-4  # nats: summation order alone
BF16_FLOOR = 0.05  # nats: one rounding of a logit near 8


@dataclass(frozen=True)
class Probe:
    """Rows and what the trainer gave them: one list of log-probabilities (nats) over all supervised tokens, in order."""

    examples: list[tuple[list[int], list[int]]]  # ids, mask
    log_probs: list[float]
    noise: float  # the trainer's own largest difference between a batch and single rows

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class GateReport:
    """The gate's figures; differences in nats per token."""

    alive: int  # LoRA pairs whose update B A is not zero
    total: int
    largest_difference: float  # reloaded against trained
    tolerance: float
    change_from_base: float  # reloaded against base, largest


def run_gate(adapter: Path, base: Path, probe: Path, precision: str) -> GateReport:
    """Check in a fresh process. Raises GateError with every reason."""
    command = [sys.executable, "-m", "service.training.gate", str(adapter), str(base), str(probe), precision]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise GateError(f"the gate's process did not answer within {TIME_LIMIT_S} s; it was ended.") from None
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise GateError(
            f"the gate's process ended with {done.returncode} and no answer: {done.stderr[-800:]}"
        ) from None
    if answer["reasons"]:
        raise GateError(
            f"the saved adapter is not what was trained: {' '.join(answer['reasons'])} It is not published."
        )
    return GateReport(**answer["report"])


def check(adapter: Path, base: Path, probe: Probe, precision: str) -> tuple[GateReport | None, list[str]]:
    """The report and the reasons against the adapter, in this process."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    reasons = _broken_tensors(tensors)
    if reasons:
        return None, reasons
    dead, total = _dead_pairs(tensors)
    if dead:
        reasons.append(f"{len(dead)} of {total} updates are zero: {', '.join(dead[:5])}.")
    trained = probe.log_probs
    base_values, reloaded = _reload(adapter, base, probe, precision)
    tolerance = FLOAT32_TOLERANCE if precision == "fp32" else max(BF16_FLOOR, 2 * probe.noise)
    report = GateReport(
        alive=total - len(dead),
        total=total,
        largest_difference=_largest(trained, reloaded),
        tolerance=tolerance,
        change_from_base=_largest(base_values, reloaded),
    )
    if not report.largest_difference <= tolerance:
        reasons.append(
            f"log-probabilities differ by {report.largest_difference:.4g} nats from the trainer's, at most "
            f"{tolerance:.4g} is noise."
        )
    if not report.change_from_base > 0:
        reasons.append("the adapter changes nothing: the base answers exactly the same.")
    return report, reasons


def _broken_tensors(tensors: dict[str, Any]) -> list[str]:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    infinite = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.isfinite().all()]
    reasons = [] if tensors else ["adapter_model.safetensors holds no tensor."]
    reasons += [f"{len(empty)} tensors are empty: {', '.join(empty[:3])}."] if empty else []
    reasons += [f"{len(infinite)} tensors are not finite: {', '.join(infinite[:3])}."] if infinite else []
    return reasons


def _dead_pairs(tensors: dict[str, Any]) -> tuple[list[str], int]:
    pairs = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    dead = [p for p in pairs if not _is_alive(tensors[f"{p}.lora_A.weight"], tensors.get(f"{p}.lora_B.weight"))]
    return dead, len(pairs)


def _is_alive(a: Any, b: Any) -> bool:
    return b is not None and bool((b.float() @ a.float()).abs().max() > 0)


def _reload(adapter: Path, base: Path, probe: Probe, precision: str) -> tuple[list[float], list[float]]:
    """Log-probabilities of the probe by the base alone, then with the adapter: transformers and PEFT only."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False, local_files_only=True)
    model.to(device).eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        base_values = _log_probs(model, probe)
        return base_values, _log_probs(PeftModel.from_pretrained(model, adapter).eval(), probe)


def _log_probs(model: Any, probe: Probe) -> list[float]:
    import torch

    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in probe.examples)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in probe.examples], device=device)
    mask = torch.tensor([m + [0] * (longest - len(m)) for _, m in probe.examples], device=device).bool()
    attention = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in probe.examples], device=device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1][mask[:, 1:]]
    targets = ids[:, 1:][mask[:, 1:]]
    values: list[float] = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    return values


def _largest(left: Sequence[float], right: Sequence[float]) -> float:
    differences = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf  # max() would pass over a NaN


def main() -> None:
    """Print `{"report": ..., "reasons": [...]}` as the last line of standard output."""
    adapter, base, probe, precision = sys.argv[1:]
    report, reasons = check(Path(adapter), Path(base), Probe.load(Path(probe)), precision)
    print(json.dumps({"report": asdict(report) if report else None, "reasons": reasons}))


if __name__ == "__main__":
    main()
