"""The gate: an adapter passes when it computes what the trainer computed, and every other one is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from service.config import LoraBlock
from service.errors import GateError
from service.training.gate import Probe, check, run_gate
from service.training.methods.lora import apply_lora, save_adapter
from service.training.objectives.sft import SupervisedLoss, collate
from tests.integration.tiny import save_base

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Tensors = dict[str, torch.Tensor]
LAYER_0 = "base_model.model.model.layers.0.self_attn.q_proj"
NUM_LINEARS = 14  # seven in each of two layers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    """A run's precision."""
    return str(request.param)


@pytest.fixture(scope="module")
def trained(base: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Probe]:
    """What the trainer leaves: its saved adapter, and what it computed with it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = apply_lora(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraBlock(type="lora", r=4), seed=3
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory, "base")
    draw = np.random.Generator(np.random.PCG64(4))
    examples = [
        (draw.integers(0, 90, n, dtype=np.int32), (np.arange(n) > n // 3).astype(np.uint8)) for n in (12, 20, 7)
    ]
    objective = SupervisedLoss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        together = objective.log_probs(collate(examples, torch.device("cpu")))
        alone = torch.cat([objective.log_probs(collate([example], torch.device("cpu"))) for example in examples])
    rows = [(ids.tolist(), mask.tolist()) for ids, mask in examples]
    return directory, Probe(rows, together.tolist(), float((together - alone).abs().max()))


def _reasons(
    trained: tuple[Path, Probe], base: Path, precision: str, copy: Path, change: Callable[[Tensors], Any]
) -> str:
    """What the gate says of a copy of the adapter whose tensors were changed."""
    shutil.copytree(trained[0], copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, copy / "adapter_model.safetensors")
    return " ".join(check(copy, base, trained[1], precision)[1])


def test_what_was_trained_passes_with_its_figures(trained: tuple[Path, Probe], base: Path, precision: str) -> None:
    report, reasons = check(trained[0], base, trained[1], precision)
    assert report is not None and reasons == []
    assert report.alive == report.total == NUM_LINEARS
    assert report.largest_difference <= report.tolerance < report.change_from_base


def test_a_zero_update_is_named(trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path) -> None:
    said = _reasons(trained, base, precision, tmp_path / "x", lambda t: t[f"{LAYER_0}.lora_B.weight"].zero_())
    assert f"1 of {NUM_LINEARS} updates are zero: {LAYER_0}" in said


def test_an_adapter_that_changes_nothing_is_told_so(
    trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path
) -> None:
    said = _reasons(
        trained, base, precision, tmp_path / "x", lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n]
    )
    assert f"{NUM_LINEARS} of {NUM_LINEARS} updates are zero" in said and "changes nothing" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.zeros(0, 4), "1 tensors are empty"), (torch.full((64, 4), torch.nan), "1 tensors are not finite")],
)
def test_an_empty_or_non_finite_tensor_is_named(
    trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path, value: torch.Tensor, said: str
) -> None:
    reasons = _reasons(
        trained, base, precision, tmp_path / "x", lambda t: t.update({f"{LAYER_0}.lora_B.weight": value})
    )
    assert f"{said}: {LAYER_0}.lora_B.weight" in reasons


def _swap_layers(tensors: Tensors) -> None:
    before = dict(tensors)
    for name in before:
        other = (
            name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1.")
        )
        tensors[name] = before[other]


def test_tensors_swapped_between_layers_are_found(
    trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path
) -> None:
    assert "log-probabilities differ by" in _reasons(trained, base, precision, tmp_path / "x", _swap_layers)


def test_another_base_is_found(trained: tuple[Path, Probe], precision: str, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    _, reasons = check(trained[0], other, trained[1], precision)
    assert "log-probabilities differ by" in " ".join(reasons)


def test_another_alpha_is_found(trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained[0], tmp_path / "x"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 2}))
    assert "log-probabilities differ by" in " ".join(check(copy, base, trained[1], precision)[1])


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_trainer_that_computed_nan_does_not_pass(
    trained: tuple[Path, Probe], base: Path, precision: str, place: int
) -> None:
    values = list(trained[1].log_probs)
    values[place] = float("nan")
    _, reasons = check(trained[0], base, Probe(trained[1].examples, values, trained[1].noise), precision)
    assert reasons


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_a_fresh_process_gives_the_same_verdict(
    trained: tuple[Path, Probe], base: Path, precision: str, tmp_path: Path
) -> None:
    adapter, probe = trained
    probe.save(tmp_path / "probe.json")
    report = run_gate(adapter, base, tmp_path / "probe.json", precision)
    assert report == check(adapter, base, probe, precision)[0]


def test_a_refusal_and_a_crash_of_the_fresh_process_are_gate_errors(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    Probe([([1, 2], [0, 1])], [-1.0], 0.0).save(tmp_path / "probe.json")
    with pytest.raises(GateError, match=r"(?s)no answer: .*adapter_model\.safetensors"):
        run_gate(tmp_path / "adapter", base, tmp_path / "probe.json", "fp32")
    save_file({f"{LAYER_0}.lora_B.weight": torch.zeros(0, 4)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(GateError, match=r"1 tensors are empty.*It is not published"):
        run_gate(tmp_path / "adapter", base, tmp_path / "probe.json", "fp32")


def test_a_probe_reads_back_as_it_was_saved(trained: tuple[Path, Probe], tmp_path: Path) -> None:
    trained[1].save(tmp_path / "probe.json")
    read = Probe.load(tmp_path / "probe.json")
    assert read.log_probs == trained[1].log_probs and read.noise == trained[1].noise
    assert [tuple(example) for example in read.examples] == trained[1].examples
