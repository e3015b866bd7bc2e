"""Planned memory: exact where it can be exact, near PyTorch's own count where it cannot, and moved by what moves it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from service.config import LoraBlock, RunConfig
from service.training import methods, optim
from service.training.memory import MemoryPlan, Shape, Work, plan_memory
from service.training.methods.fused import fuse
from service.training.objectives.attention import attend_by_example
from service.training.objectives.sft import SupervisedLoss, collate
from service.training.strategy import DataParallel, World

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ROWS, TOKENS = 4, 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an architecture and no weights: planning needs none."""
    directory = tmp_path_factory.mktemp("base")
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return directory


def _config(base: Path, **blocks: Any) -> RunConfig:
    values: dict[str, Any] = {"model": str(base), "data": {"train": "rows.jsonl"}, "precision": "bf16"}
    return RunConfig.model_validate({**values, **blocks})


def _packs(rows: int = ROWS, tokens: int = TOKENS, per_pack: int = 1) -> list[list[Any]]:
    ids = np.arange(tokens, dtype=np.int32)
    mask = (np.arange(tokens) >= tokens // 3).astype(np.uint8)
    return [[(ids, mask)] * per_pack for _ in range(rows)]


def _plan(base: Path, packs: Any = None, workers: int = 1, **blocks: Any) -> MemoryPlan:
    shapes = Shape.of(packs or _packs()), Shape.of(_packs(1))
    work = Work(*shapes, workers, packed=True, accumulates=workers > 1, saves_between=False)
    return plan_memory(_config(base, **blocks), base, work, CPU)


def _counted_by_torch(config: RunConfig, packs: Any) -> int:
    """The peak of a step with PyTorch's own account of its CPU allocator, everything before the step included."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float32)
        if isinstance(config.method, LoraBlock):
            model = methods.lora.apply_lora(model.to(torch.bfloat16), config.method, 0)
            fuse(model)
        attend_by_example(model.get_base_model() if hasattr(model, "get_base_model") else model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        objective = SupervisedLoss(model.train())
        strategy = DataParallel(named, optim.build_optimizer(named, config.optim, config.method), World(), 1.0)
        strategy.begin(1)
        strategy.update(1e-5)  # moments are made
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(collate(packs, CPU))
        strategy.backward(loss, last=True)
        del loss
        strategy.update(1e-5)
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_planned_peak_is_what_pytorch_counts_in_a_real_step_within_5_percent(base: Path, method: str) -> None:
    # 5 %: what kernels take for themselves, and oneDNN's copies of small weights, are not in the plan.
    packs = _packs(rows=8, tokens=96)
    plan = _plan(base, packs, method=method)
    tensors = plan.peaks["train"] - plan.parts["runtime"]
    assert tensors == pytest.approx(_counted_by_torch(_config(base, method=method), packs), rel=0.05)


def test_parts_add_up_to_the_peak_of_training(base: Path) -> None:
    plan = _plan(base)
    assert sum(plan.parts.values()) == plan.peaks["train"] == plan.peak


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_gradients_and_moments_are_exact(base: Path, method: str) -> None:
    config = _config(base, method=method)
    trainable, frozen = methods.weight_bytes(methods.skeleton(base, config), config)
    parts = _plan(base, method=method).parts
    assert parts["trainable weights"] == trainable
    assert parts["gradients"] == trainable + 8  # the loss and the request to stop travel in the same buffer
    counts = 4 * sum(1 for p in methods.skeleton(base, config).parameters() if p.requires_grad)
    assert parts["optimizer"] == 2 * trainable + counts  # two moments, and a count of steps for each weight
    buffers = 2 * 4 * SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2  # of rotary positions, kept twice
    assert parts["frozen weights"] == frozen + buffers


def test_four_bits_are_an_eighth_of_float32_and_their_scales_come_on_top(base: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    sixteen, four = _plan(base, method="lora").parts, _plan(base, method="qlora").parts
    linears = SHAPE["num_hidden_layers"] * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    saved = sixteen["frozen weights"] - four["frozen weights"]
    assert saved == pytest.approx(linears * (16 - 4.127) / 8, rel=0.01)  # bits a weight: QLoRA, section 3


def test_longer_rows_and_more_of_them_need_more_and_checkpointing_needs_less(base: Path) -> None:
    small, long, many = _plan(base), _plan(base, _packs(tokens=2 * TOKENS)), _plan(base, _packs(rows=2 * ROWS))
    less = _plan(base, memory={"checkpoint_activations": True})
    assert less.parts["activations"] < small.parts["activations"] / 2
    for plan in (long, many):
        assert plan.parts["activations"] == pytest.approx(2 * small.parts["activations"], rel=0.2)
    assert {plan.parts["optimizer"] for plan in (small, long, many, less)} == {small.parts["optimizer"]}


def test_packed_rows_are_planned_as_they_attend(base: Path) -> None:
    packed = _plan(base, _packs(rows=1, per_pack=4))
    alone = _plan(base, _packs(rows=4))
    assert (packed.sequences, packed.tokens) == (1, 4 * TOKENS)
    assert packed.parts["activations"] == pytest.approx(alone.parts["activations"], rel=0.1)


@pytest.mark.parametrize(("name", "most"), [("adamw8bit", 0.6), ("adafactor", 0.1)])
def test_lean_optimizers_are_planned_lean(base: Path, name: str, most: float) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    lean, adamw = (_plan(base, method="full", optim={"name": each}).parts["optimizer"] for each in (name, "adamw"))
    assert 0 < lean < most * adamw


def test_a_checkpoint_beside_training_is_counted_and_shared_between_workers(base: Path) -> None:
    def with_checkpoint(workers: int) -> MemoryPlan:
        work = Work(
            Shape.of(_packs()), Shape.of(_packs(1)), workers, packed=True, accumulates=False, saves_between=True
        )
        return plan_memory(_config(base, method="full"), base, work, CPU)

    one, two = with_checkpoint(1), with_checkpoint(2)
    assert one.parts["checkpoint"] == one.parts["trainable weights"] + one.parts["optimizer"]
    assert two.parts["checkpoint"] == one.parts["checkpoint"] // 2
    assert sum(one.parts.values()) == one.peaks["train"]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'loray[zero]'")
def test_zero_divides_moments_then_gradients_then_weights_between_the_workers(base: Path) -> None:
    def parts(strategy: str, workers: int) -> dict[str, int]:
        scale = {"strategy": strategy, "workers": workers}
        return _plan(base, workers=workers, method="full", scale=scale).parts

    whole, near = parts("ddp", 1)["trainable weights"], pytest.approx
    zero1, zero2, halves, quarters = parts("zero1", 4), parts("zero2", 4), parts("zero3", 2), parts("zero3", 4)
    shares = [plan["trainable weights"] / whole for plan in (zero1, zero2, halves, quarters)]
    assert shares == near([1, 1, 1 / 2, 1 / 4], rel=0.02)
    assert zero1["gradients"] >= whole  # and on top the bucket in which they travel, here as large as the model
    shares = [plan["gradients"] / whole for plan in (zero2, halves, quarters)]
    assert shares == near([1 / 4, 1 / 2, 1 / 4], rel=0.2)
    shares = [plan["optimizer"] / whole for plan in (zero1, zero2, halves, quarters)]
    assert shares == near([3 / 4, 3 / 4, 2 / 2, 2 / 4], rel=0.02)  # two moments; zero1 and zero2 also step a copy
