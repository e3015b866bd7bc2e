"""Strategies against an independent loop in plain PyTorch, and against one another: the same losses, weights and state.

Two processes over gloo, without Ray. One launch runs many cases, see `strategy_worker.py` and `strategy_launch.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from service import storage
from service.runs import Run
from service.settings import Settings
from service.training.loop import TrainJob
from tests.integration import small_runs
from tests.integration.strategy_launch import (
    CLIP,
    DECAY,
    SEED,
    Launch,
    run_workers,
    save_base,
    save_biased_base,
    to_bfloat16,
)
from tests.integration.strategy_worker import LRS, rows_of_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]
ZERO = ("zero1", "zero2", "zero3")
METHODS = ("lora", "full", "tied")  # tied: full, where the head's weight is the embedding's
# Float32 sums in another order, relative to losses near 6.
TOLERANCE = 1e-5
# AdamW moves a weight whose gradient is nothing but rounding by noise / |noise| of the rate: seen 5e-5, of 1e-2 at first.
WEIGHT_TOLERANCE = 2e-4
# bfloat16 gradients are added up in another order where ZeRO-3's hooks stand between the layers: seen 2e-3.
BF16_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    untied = save_base(directory / "untied")
    return {"lora": untied, "qlora": untied, "full": untied, "tied": save_base(directory / "tied", tied=True)}


def launch_in(tmp_path_factory: pytest.TempPathFactory, name: str, bases: dict[str, Path]) -> Launch:
    launch = Launch(tmp_path_factory.mktemp(name), bases["lora"])
    launch.bases = bases
    return launch


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Every strategy and method on two workers, in float32."""
    launch = launch_in(tmp_path_factory, "trained", bases)
    for strategy, method in itertools.product(("ddp", *ZERO), METHODS):
        launch.case(f"{strategy}-{method}", strategy, method)
    launch.run()
    return launch


def plain_loop(base: Path, method: str, bias: str = "none") -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in one process, in plain PyTorch, transformers and PEFT: a row at a time, dense logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if method == "lora":
        torch.manual_seed(SEED)
        config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", bias=bias, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.ndim == 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0)
    losses = []
    for step, lr in enumerate(LRS):
        rows = [(torch.tensor(ids).long(), torch.tensor(mask).bool()) for ids, mask in rows_of_step(step)]
        supervised = sum(int(mask[1:].sum()) for _, mask in rows)
        total = 0.0
        for ids, mask in rows:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]].sum()
            (nats / supervised).backward()  # type: ignore[no-untyped-call]
            total += float(nats.item())
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / supervised)
    return losses, {name: p.detach() for name, p in trained.items()}


def assert_close(launch: Launch, names: Sequence[str], tolerance: float = TOLERANCE) -> None:
    """The first case's losses, gradient norms and evaluations, by all others."""
    first, *others = (launch.result(name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        for key in ("losses", "norms", "evaluated"):
            assert other[key] == pytest.approx(first[key], rel=tolerance), (name, key)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str = "") -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one if key.endswith(kind))


def equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_strategy_learns_what_a_plain_loop_learns(trained: Launch, bases: dict[str, Path], method: str) -> None:
    losses, weights = plain_loop(bases[method], "lora" if method == "lora" else "full")
    for strategy in ("ddp", *ZERO):
        assert trained.result(f"{strategy}-{method}")["losses"] == pytest.approx(losses, rel=TOLERANCE), strategy
        state = trained.state(f"{strategy}-{method}")
        seen = {key.removesuffix("/weight"): value for key, value in state.items() if key.endswith("/weight")}
        assert largest_difference(weights, seen) < WEIGHT_TOLERANCE, strategy


@pytest.mark.parametrize("method", METHODS)
def test_every_strategy_has_the_same_gradient_norms_evaluations_and_state(trained: Launch, method: str) -> None:
    names = [f"{strategy}-{method}" for strategy in ("ddp", *ZERO)]
    assert_close(trained, names)
    state = trained.state(names[0])
    for name in names[1:]:
        other = trained.state(name)
        assert {key: value.shape for key, value in other.items()} == {key: value.shape for key, value in state.items()}
        assert largest_difference(state, other, "/step") == 0
        assert largest_difference(state, other, "/exp_avg") < 1e-6
        assert largest_difference(state, other, "/exp_avg_sq") < 1e-8


@pytest.mark.parametrize("strategy", ["ddp", *ZERO])
def test_trainable_weights_and_moments_are_float32_and_whole_when_gathered(trained: Launch, strategy: str) -> None:
    for method in METHODS:
        result, state = trained.result(f"{strategy}-{method}"), trained.state(f"{strategy}-{method}")
        assert result["dtypes"] == ["torch.float32"]
        assert {value.dtype for value in state.values()} == {torch.float32}
        whole = {key.removesuffix("/weight"): list(v.shape) for key, v in state.items() if key.endswith("/weight")}
        assert result["shapes"] == whole


@pytest.mark.parametrize("strategy", ["ddp", *ZERO])
def test_nothing_of_a_model_stays_in_memory_when_its_strategy_is_dropped(trained: Launch, strategy: str) -> None:
    assert [trained.memory(f"{strategy}-{method}", rank)["alive"] for method in METHODS for rank in (0, 1)] == [0] * 6


def test_the_strategies_are_quiet(trained: Launch) -> None:
    assert "deepspeed" not in "".join(trained.said).lower()


@pytest.mark.long
def test_a_resumed_run_is_one_that_was_never_stopped_to_the_last_bit(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "resumed", bases)
    names = [f"{strategy}-{method}" for strategy in ("ddp", *ZERO) for method in METHODS]
    for name in names:
        strategy, _, method = name.partition("-")
        launch.case(name, strategy, method, load=trained.state_file(name, 2), first=2, steps=2)
    launch.run()
    for name in names:
        assert launch.result(name)["losses"] == trained.result(name)["losses"][2:], name
        assert equal_bits(launch.state(name), trained.state(name)), name


@pytest.mark.long
def test_a_state_goes_from_one_strategy_to_another_and_back(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "handed", bases)
    for method in METHODS:
        before = trained.state_file(f"ddp-{method}", 1)
        for step, strategy in ((1, "zero3"), (2, "ddp"), (3, "zero2")):
            name = launch.case(f"{method}-{step}", strategy, method, load=before, first=step, steps=1)
            before = launch.state_file(name, step + 1)
    launch.run()
    for method in METHODS:
        losses = [launch.result(f"{method}-{step}")["losses"][0] for step in (1, 2, 3)]
        assert losses == pytest.approx(trained.result(f"ddp-{method}")["losses"][1:], rel=TOLERANCE)
        state, unbroken = launch.state(f"{method}-3"), trained.state(f"ddp-{method}")
        assert largest_difference(state, unbroken, "/weight") < WEIGHT_TOLERANCE
        assert largest_difference(state, unbroken, "/step") == 0


@pytest.mark.long
def test_an_abandoned_step_leaves_nothing_behind(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "abandoned", bases)
    for strategy in ("ddp", *ZERO):
        launch.case(f"{strategy}-full", strategy, "full", abandon=True)
    for strategy in ZERO:
        launch.case(f"{strategy}-offloaded", strategy, "full", "optimizer", abandon=True)
    launch.run()
    for strategy in ("ddp", *ZERO):
        assert equal_bits(launch.state(f"{strategy}-full"), trained.state(f"{strategy}-full")), strategy
    for strategy in ZERO:
        losses = launch.result(f"{strategy}-offloaded")["losses"]
        assert losses == pytest.approx(trained.result(f"{strategy}-full")["losses"], rel=TOLERANCE), strategy


@pytest.mark.long
def test_offload_to_the_host_changes_no_loss_and_resumes(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "offloaded", bases)
    kinds = [("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "all")]
    for (strategy, offload), method in itertools.product(kinds, ("lora", "full")):
        name = launch.case(f"{strategy}-{offload}-{method}", strategy, method, offload)
        half = launch.state_file(name, 2)
        launch.case(f"{name}-resumed", strategy, method, offload, load=half, first=2, steps=2)
    launch.run()
    for (strategy, offload), method in itertools.product(kinds, ("lora", "full")):
        name = f"{strategy}-{offload}-{method}"
        assert launch.result(name)["losses"] == pytest.approx(trained.result(f"ddp-{method}")["losses"], rel=TOLERANCE)
        assert launch.result(name)["norms"] == pytest.approx(trained.result(f"ddp-{method}")["norms"], rel=TOLERANCE)
        assert equal_bits(launch.state(f"{name}-resumed"), launch.state(name)), name


@pytest.mark.long
def test_bfloat16_rounds_the_compute_and_nothing_else(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "bf16", bases)
    for strategy, method in itertools.product(("ddp", *ZERO), ("lora", "full", "qlora")):
        launch.case(f"{strategy}-{method}", strategy, method, precision="bf16")
    launch.run()
    for method in ("lora", "full", "qlora"):
        ddp = launch.state(f"ddp-{method}")
        assert_close(launch, [f"{strategy}-{method}" for strategy in ("ddp", *ZERO)], BF16_TOLERANCE)
        for strategy in ("zero1", "zero2"):  # gradients added up in bfloat16 would differ by 1e-3
            assert_close(launch, [f"ddp-{method}", f"{strategy}-{method}"])
            assert largest_difference(ddp, launch.state(f"{strategy}-{method}"), "/exp_avg") < 1e-5
        for strategy in ZERO:
            assert {value.dtype for value in launch.state(f"{strategy}-{method}").values()} == {torch.float32}


@pytest.mark.long
def test_fp16_throws_an_overflown_step_away_and_goes_on_alike(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "fp16", bases)
    for strategy in ("ddp", *ZERO):
        launch.case(strategy, strategy, "full", precision="fp16", poison=1)
    launch.run()
    losses = launch.result("ddp")["losses"]
    for strategy in ("ddp", *ZERO):
        result = launch.result(strategy)
        assert result["skipped"] == [False, True, False, False]
        assert result["losses"][2:] == pytest.approx(losses[2:], rel=BF16_TOLERANCE)
        assert equal_bits(launch.state(strategy, 2), launch.state(strategy, 1)), strategy


@pytest.mark.long
def test_a_gradient_that_is_not_finite_is_reported_and_moves_no_weight(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "poisoned", bases)
    for strategy in ("ddp", *ZERO):
        launch.case(strategy, strategy, "full", steps=2, poison=1)
    launch.run()
    for strategy in ("ddp", *ZERO):
        assert not math.isfinite(launch.result(strategy)["norms"][1])
        assert equal_bits(launch.state(strategy, 2), trained.state(f"{strategy}-full", 1)), strategy


@pytest.mark.long
def test_options_of_lora_and_checkpointed_activations_train_alike(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "options", bases)
    for strategy in ("ddp", "zero2", "zero3"):
        launch.case(f"{strategy}-dora", strategy, lora={"dora": True})
        launch.case(f"{strategy}-plus", strategy, lora={"lora_plus_ratio": 4.0})
        launch.case(f"{strategy}-activations", strategy, "full", memory={"checkpoint_activations": True})
    launch.run()
    for option in ("dora", "plus", "activations"):
        assert_close(launch, [f"{strategy}-{option}" for strategy in ("ddp", "zero2", "zero3")])
    losses = launch.result("zero3-activations")["losses"]
    assert losses == pytest.approx(trained.result("ddp-full")["losses"], rel=TOLERANCE)


@pytest.mark.long
def test_biases_beside_adapters_train_in_float32_whatever_they_were_stored_in(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = save_biased_base(tmp_path_factory.mktemp("biased"))
    losses, weights = plain_loop(base, "lora", bias="all")
    assert any(name.endswith("v_proj.base_layer.bias") for name in weights)
    launch = launch_in(tmp_path_factory, "biases", bases)
    for strategy, precision in itertools.product(("ddp", "zero2", "zero3"), ("fp32", "bf16")):
        launch.case(f"{strategy}-{precision}", strategy, lora={"bias": "all"}, model=str(base), precision=precision)
    launch.run()
    for strategy in ("ddp", "zero2", "zero3"):
        assert launch.result(f"{strategy}-fp32")["losses"] == pytest.approx(losses, rel=TOLERANCE), strategy
        state = launch.state(f"{strategy}-fp32")
        assert largest_difference(weights, {name: state[f"{name}/weight"] for name in weights}) < WEIGHT_TOLERANCE
        assert {value.dtype for value in launch.state(f"{strategy}-bf16").values()} == {torch.float32}
        assert_close(launch, ["ddp-bf16", f"{strategy}-bf16"], BF16_TOLERANCE)


@pytest.mark.long
def test_one_worker_needs_no_process_group_and_learns_what_two_learn(
    trained: Launch, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    launch = launch_in(tmp_path_factory, "alone", bases)
    for strategy in ("ddp", *ZERO):
        launch.case(strategy, strategy, "full")
    launch.run(size=0)
    for strategy in ("ddp", *ZERO):
        assert launch.result(strategy)["losses"] == pytest.approx(trained.result("ddp-full")["losses"], rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_loop_comes_to_the_same_model_under_every_strategy_and_its_gate_lets_it_pass(
    tmp_path: Path, method: str
) -> None:
    base = small_runs.small_base(tmp_path / "base")
    options = {"type": method} | ({} if method == "full" else {"r": 4, "alpha": 8})
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    run_file = small_runs.write_run_file(tmp_path / "run", base, method=options)
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    ended = {}
    for strategy in ("ddp", "zero2", "zero3"):
        overrides = [f"scale.strategy={strategy}", "scale.workers=2", "optim.max_steps=4", "evaluate.every.steps=2"]
        overrides += ["optim.lr=1e-3"] if method == "full" else []
        run, job = small_runs.make_job(run_file, settings, overrides)
        file = tmp_path / f"{strategy}.json"
        file.write_text(json.dumps(dataclasses.asdict(job)))
        result = json.loads(run_workers("tests.integration.loop_worker", file, 2)[0].strip().splitlines()[-1])
        assert result["gate"]["alive"] == result["gate"]["total"] > 0
        losses = [row[key] for row in run.metrics() for key in ("train/loss", "eval/loss") if key in row]
        ended[strategy] = losses, load(storage.read_bytes(run.path("model", weights)))
    for strategy in ("zero2", "zero3"):
        assert ended[strategy][0] == pytest.approx(ended["ddp"][0], rel=TOLERANCE)
        assert largest_difference(ended[strategy][1], ended["ddp"][1]) < WEIGHT_TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.longer), "zero3"])
def test_a_sharded_run_goes_from_one_worker_to_two_and_back_with_the_losses_of_one(
    tmp_path: Path, strategy: str
) -> None:
    base = small_runs.small_base(tmp_path / "base")
    run_file = small_runs.write_run_file(tmp_path / "run", base, method={"type": "full"})
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    overrides = [f"scale.strategy={strategy}", "memory.micro=2", "optim.epochs=30", "optim.lr=1e-4"]

    def attempt(job: TrainJob, number: int, size: int, *steps: str) -> dict[str, Any]:
        config = {**job.config, "scale": {**job.config["scale"], "workers": size}}
        file = tmp_path / f"{job.run_id}-{number}.json"
        file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, attempt=number, config=config))))
        said = run_workers("tests.integration.loop_worker", file, size, *steps)[0]
        return dict(json.loads(said.strip().splitlines()[-1]))

    whole, job = small_runs.make_job(run_file, settings, overrides)
    assert attempt(job, 1, 1)["step"] == 120
    moved, job = small_runs.make_job(run_file, settings, overrides)
    for number, size in enumerate((1, 2), start=1):
        assert attempt(job, number, size, "2")["stopped"]
        moved.clear_stop()
    assert attempt(job, 3, 1)["step"] == 120

    def losses(run: Run) -> list[float]:
        return [row["train/loss"] for row in run.metrics()]

    def draws(run: Run) -> dict[int, list[int]]:
        """By step, whichever worker drew them."""
        ledger = list(run.ledger())
        return {step: sorted(i for row in ledger if row["step"] == step for i in row["ids"]) for step in range(1, 121)}

    assert losses(moved) == pytest.approx(losses(whole), rel=TOLERANCE)
    assert draws(moved) == draws(whole)
    assert [event["kind"] for event in moved.events()].count("resumed") >= 2


@pytest.mark.long
def test_zero3_never_holds_a_whole_model_while_loading_and_frees_it_when_dropped(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """140 MB of float32 weights, none larger than 3 MB. Half is a worker's own, and in training 2.5 times the whole.

    The allocator and gloo keep up to 125 MB of the first cases for themselves, then use it again: what a case leaves behind
    is what every one of four in a row leaves.
    """
    directory = tmp_path_factory.mktemp("large")
    large = save_base(directory / "base", hidden_size=384, intermediate_size=1536, num_hidden_layers=16)
    to_bfloat16(large)  # what is stored otherwise than it is used cannot stay a mapped file
    whole_bytes = sum(4 * tensor.numel() for file in large.glob("*.safetensors") for tensor in load_file(file).values())
    launch = launch_in(tmp_path_factory, "memory", {**bases, "full": large})
    launch.case("imports", "zero3", "lora", steps=1)
    launch.case("ddp", "ddp", "full", steps=0)
    repeated = [launch.case(f"zero3-{i}", "zero3", "full", steps=2) for i in range(4)]
    launch.run()
    for rank in (0, 1):
        assert launch.memory("ddp", rank)["load_bytes"] > 0.95 * whole_bytes
        assert launch.memory("zero3-0", rank)["load_bytes"] < 0.75 * whole_bytes
        assert min(launch.memory(name, rank)["left_bytes"] for name in repeated) < 0.25 * whole_bytes
