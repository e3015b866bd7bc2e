"""The gate: a model passes when it computes what the trainer computed, and every other one is refused with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.training.gate import GateJob, GateReport, Probe, check
from service.training.saved_weights import WeightDigests, Weights, inspect_model
from tests.integration.tiny import save_base
from tests.integration.trained import base_with, edit_json, leave_adapter, leave_full

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

in_float32 = pytest.mark.parametrize("precision", ["fp32"], indirect=True)  # where precision makes no difference
Kind = Literal["adapter", "full"]
Tensors = dict[str, torch.Tensor]
Trained = tuple[Path, Probe]
LAYER_0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q_0, Q_1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
NUM_LINEARS = 14  # seven in each of two layers
NUM_TENSORS = 21  # with two norms a layer, the last norm, embedding and head


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    """A run's precision."""
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(base: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained LoRA as it was saved, and its probe."""
    directory = tmp_path_factory.mktemp("adapter")
    return directory, leave_adapter(base, directory, precision)


@pytest.fixture(scope="module")
def full(base: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model trained in full as it was saved, in several shards, and its probe."""
    directory = tmp_path_factory.mktemp("full")
    return directory, leave_full(base, directory, precision, shard="100KB")


def _check(
    kind: Kind, model: Path, base: Path, probe: Probe, precision: str, start: Path | None = None
) -> tuple[GateReport | None, str]:
    job = GateJob(str(model), str(base), kind, precision, probe, started_from=str(start) if start else None)
    report, reasons = check(job)
    return report, " ".join(reasons)


def _changed(source: Path, copy: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy whose tensors were changed, in one file."""
    shutil.copytree(source, copy)
    files = sorted(copy.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    change(tensors)
    for file in [*files, *copy.glob("*.index.json")]:
        file.unlink()
    name = "adapter_model.safetensors" if (copy / "adapter_config.json").exists() else "model.safetensors"
    save_file(tensors, copy / name, metadata={"format": "pt"})
    return copy


def test_a_trained_adapter_passes_with_its_figures(adapter: Trained, base: Path, precision: str) -> None:
    report, reasons = _check("adapter", adapter[0], base, adapter[1], precision)
    assert report is not None and reasons == ""
    assert report.alive == report.total == NUM_LINEARS
    assert report.largest_difference <= report.tolerance < report.change_from_base


def test_a_trained_model_passes_with_its_figures(full: Trained, base: Path, precision: str) -> None:
    assert len(list(full[0].glob("*.safetensors"))) > 1
    report, reasons = _check("full", full[0], base, full[1], precision)
    assert report is not None and reasons == ""
    assert report.alive == report.total == NUM_TENSORS
    assert (report.rounded_away, report.uncompared) == (0, 0)
    assert report.largest_difference <= report.tolerance < report.change_from_base


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_float16_passes(base: Path, tmp_path: Path, kind: Kind) -> None:
    leave = leave_adapter if kind == "adapter" else leave_full
    report, reasons = _check(kind, tmp_path / "x", base, leave(base, tmp_path / "x", "fp16"), "fp16")
    assert report is not None and reasons == ""
    assert report.largest_difference <= report.tolerance < report.change_from_base


@in_float32
def test_a_zero_update_is_named(adapter: Trained, base: Path, precision: str, tmp_path: Path) -> None:
    model = _changed(adapter[0], tmp_path / "x", lambda t: t[f"{LAYER_0}.lora_B.weight"].zero_())
    report, reasons = _check("adapter", model, base, adapter[1], precision)
    assert f"1 of {NUM_LINEARS} updates are zero: {LAYER_0}" in reasons
    assert report is not None and report.alive == NUM_LINEARS - 1


def test_a_model_that_answers_nothing_finite_is_refused(
    adapter: Trained, base: Path, precision: str, tmp_path: Path
) -> None:
    model = _changed(adapter[0], tmp_path / "x", lambda t: [v.mul_(1e30) for n, v in t.items() if "lora_B" in n])
    report, reasons = _check("adapter", model, base, adapter[1], precision)
    assert report is None and "not finite" in reasons


def test_an_expert_that_no_token_was_sent_to_is_not_dead_while_the_others_move(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in (0, 1)]
    before = {name: torch.ones(2, 2) for name in (*names, "model.norm.weight")}
    found = []
    for number, moved in enumerate((names[:1], [])):
        for part, changed in (("base", []), ("saved", [*moved, "model.norm.weight"])):
            directory = tmp_path / f"{part}-{number}"
            directory.mkdir()
            save_file({n: t + float(n in changed) for n, t in before.items()}, directory / "model.safetensors")
        of = (Weights.of_model(tmp_path / f"{part}-{number}") for part in ("saved", "base"))
        found.append(inspect_model(*of, fixed=(), digests={}))
    assert (found[0].reasons, found[0].alive) == ([], 3)
    assert "2 of 3 tensors are exactly the base's" in found[1].reasons[0]


@in_float32
def test_an_adapter_that_changes_nothing_is_told_so(
    adapter: Trained, base: Path, precision: str, tmp_path: Path
) -> None:
    model = _changed(adapter[0], tmp_path / "x", lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n])
    _, reasons = _check("adapter", model, base, adapter[1], precision)
    assert f"{NUM_LINEARS} of {NUM_LINEARS} updates are zero" in reasons and "changed nothing" in reasons


@in_float32
def test_a_dead_tensor_of_a_full_model_is_named(full: Trained, base: Path, precision: str, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    model = _changed(full[0], tmp_path / "x", lambda t: t.update({Q_0: before[Q_0].to(t[Q_0].dtype)}))
    report, reasons = _check("full", model, base, replace(full[1], weights={}), precision)
    assert f"1 of {NUM_TENSORS} tensors are exactly the base's: {Q_0}." in reasons
    assert report is not None and report.alive == NUM_TENSORS - 1


@in_float32
def test_the_base_saved_in_place_of_the_model_is_found(
    full: Trained, base: Path, precision: str, tmp_path: Path
) -> None:
    before = load_file(base / "model.safetensors")
    model = _changed(full[0], tmp_path / "x", lambda t: [t.update({n: before[n].to(v.dtype)}) for n, v in t.items()])
    _, reasons = _check("full", model, base, replace(full[1], weights={}), precision)
    assert f"{NUM_TENSORS} of {NUM_TENSORS} tensors are exactly the base's" in reasons
    assert "the base answers exactly the same" in reasons
    _, reasons = _check("full", model, base, full[1], precision)
    assert f"{NUM_TENSORS} of {NUM_TENSORS} tensors are not what the trainer held" in reasons


@in_float32
@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize(("value", "said"), [("empty", "1 tensors are empty"), ("nan", "1 tensors are not finite")])
def test_an_empty_or_non_finite_tensor_is_named(
    adapter: Trained, full: Trained, base: Path, precision: str, tmp_path: Path, kind: Kind, value: str, said: str
) -> None:
    directory, probe = adapter if kind == "adapter" else full
    name = f"{LAYER_0}.lora_B.weight" if kind == "adapter" else Q_0

    def spoil(tensors: Tensors) -> None:
        old = tensors[name]
        tensors[name] = old.new_zeros(0, 4) if value == "empty" else old.index_fill(0, torch.tensor(3), torch.nan)

    report, reasons = _check(kind, _changed(directory, tmp_path / "x", spoil), base, probe, precision)
    assert report is None and f"{said}: {name}" in reasons


@in_float32
@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("content", ["no bytes", "no tensors"])
def test_a_file_without_tensors_is_refused(
    adapter: Trained, full: Trained, base: Path, precision: str, tmp_path: Path, kind: Kind, content: str
) -> None:
    directory, probe = adapter if kind == "adapter" else full
    model = _changed(directory, tmp_path / "x", lambda tensors: tensors.clear())
    if content == "no bytes":
        next(model.glob("*.safetensors")).write_bytes(b"")
    report, reasons = _check(kind, model, base, probe, precision)
    assert report is None
    assert ("no safetensors file that can be read" if content == "no bytes" else "no tensor") in reasons


@in_float32
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_missing_tensor_is_named(
    adapter: Trained, full: Trained, base: Path, precision: str, tmp_path: Path, kind: Kind
) -> None:
    directory, probe = adapter if kind == "adapter" else full
    prefix = LAYER_0 if kind == "adapter" else Q_0
    model = _changed(directory, tmp_path / "x", lambda t: [t.pop(name) for name in list(t) if name.startswith(prefix)])
    report, reasons = _check(kind, model, base, probe, precision)
    assert report is None and "cannot be loaded" in reasons and prefix in reasons


def _swap_adapter_layers(tensors: Tensors) -> None:
    before = dict(tensors)
    turned = {".0.": ".1.", ".1.": ".0."}
    for name in before:
        number = next(n for n in turned if f"layers{n}" in name)
        tensors[name] = before[name.replace(number, turned[number])]


def _swap_queries(tensors: Tensors) -> None:
    tensors[Q_0], tensors[Q_1] = tensors[Q_1], tensors[Q_0]


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_tensors_swapped_between_layers_are_found(
    adapter: Trained, full: Trained, base: Path, precision: str, tmp_path: Path, kind: Kind
) -> None:
    directory, probe = adapter if kind == "adapter" else full
    model = _changed(directory, tmp_path / "x", _swap_adapter_layers if kind == "adapter" else _swap_queries)
    _, reasons = _check(kind, model, base, replace(probe, weights={}), precision)
    assert "log-probabilities differ by" in reasons
    if kind == "full":
        _, reasons = _check(kind, model, base, probe, precision)
        assert f"2 of {NUM_TENSORS} tensors are not what the trainer held: {Q_0}, {Q_1}." in reasons


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_another_base_is_found(adapter: Trained, full: Trained, precision: str, tmp_path: Path, kind: Kind) -> None:
    other = save_base(tmp_path / "other", seed=1)
    directory, probe = adapter if kind == "adapter" else full
    report, reasons = _check(kind, directory, other, probe, precision)
    assert report is not None
    if kind == "adapter":
        assert "log-probabilities differ by" in reasons
    else:
        assert report.change_from_base > 1  # a full model stands alone: the base is only what it must differ from


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_another_configuration_is_found(
    adapter: Trained, full: Trained, base: Path, precision: str, tmp_path: Path, kind: Kind
) -> None:
    directory, probe = adapter if kind == "adapter" else full
    copy = Path(shutil.copytree(directory, tmp_path / "x"))
    if kind == "adapter":
        edit_json(copy / "adapter_config.json", lora_alpha=16)
    else:
        edit_json(copy / "config.json", rms_norm_eps=1.0)
    assert "log-probabilities differ by" in _check(kind, copy, base, probe, precision)[1]


@in_float32
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_trainer_that_computed_nan_does_not_pass(adapter: Trained, base: Path, precision: str, place: int) -> None:
    values = list(adapter[1].log_probs)
    values[place] = float("nan")
    _, reasons = _check("adapter", adapter[0], base, replace(adapter[1], log_probs=values), precision)
    assert "log-probabilities differ by inf" in reasons


@in_float32
def test_rounding_alone_is_no_training(full: Trained, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    before = {name: tensor * 1.001 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})  # not on bfloat16's grid
    model = _changed(full[0], tmp_path / "x", lambda t: [t.update({n: before[n].bfloat16()}) for n in t])
    _, reasons = _check("full", model, base, replace(full[1], weights={}), "bf16")
    assert f"{NUM_TENSORS} of {NUM_TENSORS} tensors are exactly the base's" in reasons


def test_what_bfloat16_rounds_away_was_trained_all_the_same(base: Path, tmp_path: Path) -> None:
    rounded = base_with(tmp_path / "base", dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(rounded / "model.safetensors").items()}
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    probe = leave_full(rounded, tmp_path / "x", "bf16", lr=1e-4)
    report, reasons = _check("full", tmp_path / "x", rounded, probe, "bf16")
    assert reasons == "" and report is not None
    assert report.alive == report.total == NUM_TENSORS and report.rounded_away == 5  # the norms, whose weights are 1
    _, reasons = _check("full", tmp_path / "x", rounded, replace(probe, weights={}), "bf16")
    assert f"5 of {NUM_TENSORS} tensors are exactly the base's" in reasons


@in_float32
def test_a_weight_that_never_moved_is_dead_even_with_digests(full: Trained, base: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    digests = WeightDigests(torch.float32)
    model = _changed(full[0], tmp_path / "x", lambda t: [t.update({n: v.float()}) for n, v in t.items()])
    model = _changed(model, tmp_path / "y", lambda t: t.update({Q_0: before[Q_0]}))
    assert dict(digests.watch(load_file(model / "model.safetensors").items()))[Q_0].equal(before[Q_0])
    _, reasons = _check("full", model, base, replace(full[1], weights=digests.of), "fp32")
    assert f"1 of {NUM_TENSORS} tensors are exactly the base's: {Q_0}." in reasons
    assert "not what the trainer held" not in reasons
