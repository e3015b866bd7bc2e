"""The training loop without Ray, against an independent loop in plain PyTorch, and against itself stopped and resumed."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from service import storage
from service.domain import RunState
from service.errors import GateError, OutOfMemoryError, TrainingError
from service.runs import Run
from service.settings import Settings
from service.training.checkpoint import newest_step
from service.training.loop import TrainJob, train
from service.training.objectives.sft import Batch, SupervisedLoss
from service.training.strategy import LossScale, World
from tests.integration import small_runs
from tests.integration.oracle import oracle_losses

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]
# Float32 sums in another order: relative to losses near 4, after ten steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(str(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run_file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_run_file(tmp_path_factory.mktemp("run"), base)


@pytest.fixture(scope="module")
def finished(run_file: Path, settings: Settings) -> tuple[Run, TrainJob]:
    """The reference: one worker, never stopped."""
    run, job = small_runs.make_job(run_file, settings, ["memory.micro=6"])
    train(job, World.current())
    return run, job


def stop(run: Run, metrics: dict[str, float]) -> None:
    run.request_stop("after a step")


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.metrics() if "train/loss" in row]


def test_losses_equal_a_plain_torch_loop_step_by_step(
    base: Path, run_file: Path, finished: tuple[Run, TrainJob]
) -> None:
    run, _ = finished
    rows = [json.loads(line) for line in (run_file.parent / "train.jsonl").read_text().splitlines()]
    order = [row["ids"] for row in run.ledger()]
    expected = oracle_losses(base, rows, order, lr=1e-2)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)
    assert expected[-1] < 0.8 * expected[0]  # it learns, so equality is no coincidence of standing still


def test_every_row_is_drawn_once_in_every_epoch(finished: tuple[Run, TrainJob]) -> None:
    run, _ = finished
    steps = [row["ids"] for row in run.ledger()]
    assert [len(ids) for ids in steps] == [6, 6, 6, 2] * 2
    for epoch in (steps[:4], steps[4:]):
        assert sorted(number for ids in epoch for number in ids) == list(range(1, 21))
    assert steps[:4] != steps[4:]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_does_not_change_the_loss(
    micro: int, run_file: Path, settings: Settings, finished: tuple[Run, TrainJob]
) -> None:
    run, job = small_runs.make_job(run_file, settings, [f"memory.micro={micro}"])
    train(job, World.current())
    assert losses(run) == pytest.approx(losses(finished[0]), rel=TOLERANCE)


def test_moments_that_do_not_fit_in_the_first_update_are_out_of_memory_of_this_micro_batch(
    run_file: Path, settings: Settings
) -> None:
    def ask_for_too_much(*of_the_step: object) -> None:
        torch.empty(2**50)  # a petabyte: the allocator refuses it as it would refuse moments

    run, job = small_runs.make_job(run_file, settings, ["memory.micro=6"])
    hook = register_optimizer_step_pre_hook(ask_for_too_much)
    try:
        with pytest.raises(OutOfMemoryError, match="micro-batch of 6 sequence") as raised:
            train(job, World.current())
    finally:
        hook.remove()
    assert raised.value.micro == 6 and losses(run) == []


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_begins(
    run_file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[weakref.ref[torch.Tensor]] = []
    compute = SupervisedLoss.forward

    def forward(objective: SupervisedLoss, batch: Batch, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            assert not before or before[-1]() is None
        loss = compute(objective, batch, **options)
        if loss.requires_grad:
            before.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(SupervisedLoss, "forward", forward)
    _, job = small_runs.make_job(run_file, settings, ["memory.micro=2", "optim.max_steps=2", "data.pack=never"])
    train(job, World.current())
    assert len(before) > 4  # two steps of three


def test_two_workers_give_the_losses_and_draws_of_one(
    run_file: Path, settings: Settings, finished: tuple[Run, TrainJob], tmp_path: Path
) -> None:
    run, job = small_runs.make_job(run_file, settings, ["memory.micro=2"])
    results = run_workers(job, 2, tmp_path)
    assert losses(run) == pytest.approx(losses(finished[0]), rel=TOLERANCE)
    assert [sorted(r["ids"]) for r in run.ledger()] == [sorted(r["ids"]) for r in finished[0].ledger()]
    both = {name.split("-")[1] for name in storage.list_names(run.path("ledger"))}
    assert both == {"r0", "r1"}  # each worker really drew a part
    assert results["gate"]["alive"] == results["gate"]["total"] == 14


def test_a_stopped_and_resumed_run_equals_one_never_stopped_bit_for_bit(run_file: Path, settings: Settings) -> None:
    long = ["memory.micro=6", "optim.epochs=40"]  # so that the request is seen before the end
    whole, job = small_runs.make_job(run_file, settings, long)
    train(job, World.current())
    run, job = small_runs.make_job(run_file, settings, long)

    steps = itertools.count(1)

    def stop_after_three(metrics: dict[str, float]) -> None:
        if next(steps) == 3:
            run.request_stop("three steps are enough")

    stopped = train(job, World.current(), stop_after_three)
    assert stopped.stopped == "three steps are enough"
    assert 3 <= stopped.step < 160
    assert not storage.list_names(run.path("model"))
    run.clear_stop()
    train(dataclasses.replace(job, attempt=2), World.current())
    assert losses(run) == losses(whole)
    assert [r["ids"] for r in run.ledger()] == [r["ids"] for r in whole.ledger()]
    assert saved_weights(run) == saved_weights(whole)


def test_patience_that_is_set_on_resuming_begins_with_a_best_that_can_be_saved(
    run_file: Path, settings: Settings
) -> None:
    often = ["memory.micro=6", "optim.epochs=3", "evaluate.every.steps=1", "checkpoint.every.steps=0", "optim.lr=0.3"]
    run, job = small_runs.make_job(run_file, settings, often)
    stopped = train(job, World.current(), functools.partial(stop, run))
    best = min((row["eval/loss"], row["step"]) for row in run.metrics() if "eval/loss" in row)[1]
    run.clear_stop()
    config = {**job.config, "stop": {**job.config["stop"], "patience": 50}}
    ended = train(dataclasses.replace(job, attempt=2, config=config), World.current())
    assert stopped.step < ended.step
    forgotten = [event for event in run.events() if event["kind"] == "best_forgotten"]
    assert bool(forgotten) == (best != stopped.step)
    losses_after = {
        row["step"]: row["eval/loss"] for row in run.metrics() if row["step"] > stopped.step - (not forgotten)
    }
    assert ended.step == min(losses_after, key=lambda step: (losses_after[step], step))


@pytest.fixture(scope="module")
def unlearned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps that unlearns its held-out rows (digits; it trains on letters), on every machine.

    Its best evaluation is thus among the first, and that one's checkpoint long written when the last step ends.
    """
    directory = tmp_path_factory.mktemp("unlearned")
    file = small_runs.write_run_file(directory, base, memory={"micro": 6}, evaluate={"every": {"steps": 1}})
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "0123456789"}]
    (directory / "eval.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return file


LONG = ["optim.epochs=5", "optim.lr=0.2", "optim.schedule=constant"]


def test_patience_ends_a_run_that_gets_no_better_and_its_best_is_the_model(unlearned: Path, settings: Settings) -> None:
    run, job = small_runs.make_job(unlearned, settings, [*LONG, "stop.patience=2", "checkpoint.every.steps=0"])
    result = train(job, World.current())
    measured = {row["step"]: row["eval/loss"] for row in run.metrics() if "eval/loss" in row}
    best = min(measured, key=lambda step: measured[step])
    assert max(measured) == best + 2 < 20
    assert result.step == best and result.stopped is None and result.gate is not None


def test_an_attempt_that_another_has_succeeded_makes_no_checkpoint_visible(run_file: Path, settings: Settings) -> None:
    """Its driver was cut off, and another has gone on: what this one writes would be among the other's."""
    run, job = small_runs.make_job(run_file, settings, ["memory.micro=6", "checkpoint.every.steps=1"])

    def taken_over(metrics: dict[str, float]) -> None:
        if run.status().state is RunState.CREATED:
            run.set_state(RunState.RUNNING, attempt=2)

    with pytest.raises(TrainingError, match="attempt 2 has begun"):
        train(job, World.current(), taken_over)
    assert newest_step(run.uri) is None and not storage.list_names(run.path("model"))


@pytest.fixture(scope="module")
def kept_best(unlearned: Path, settings: Settings) -> tuple[Run, TrainJob, dict[int, float]]:
    """A run that is told to keep the best three, and its held-out loss by step."""
    run, job = small_runs.make_job(
        unlearned, settings, [*LONG, "checkpoint={every: {steps: 0}, keep_last: 1, keep_best: 3}"]
    )
    train(job, World.current())
    return run, job, {row["step"]: row["eval/loss"] for row in run.metrics()}


def test_the_best_checkpoints_are_kept_whatever_their_order(kept_best: tuple[Run, TrainJob, dict[int, float]]) -> None:
    run, _, measured = kept_best
    best = sorted(measured, key=lambda step: measured[step])[:3]
    assert best != sorted(best) or max(best) < max(measured)  # not simply the last ones
    assert [int(name) for name in storage.list_names(run.path("checkpoints"))] == sorted({*best, max(measured)})


def test_the_model_is_the_best_evaluations(kept_best: tuple[Run, TrainJob, dict[int, float]]) -> None:
    run, _, measured = kept_best
    best = min(measured, key=lambda step: measured[step])
    assert best < max(measured)
    from safetensors.torch import load

    at_best: dict[str, list[float]] = {}
    for name in storage.list_names(run.path("checkpoints", f"{best:08d}")):
        if name.endswith(".safetensors"):
            tensors = load(storage.read_bytes(run.path("checkpoints", f"{best:08d}", name)))
            at_best |= {key: value.flatten().tolist() for key, value in tensors.items() if key.endswith("/weight")}
    saved = saved_weights(run)
    assert sorted(saved.values()) == sorted(at_best.values())


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_steps_model_and_says_so(
    unlearned: Path, settings: Settings
) -> None:
    run, job = small_runs.make_job(unlearned, settings, [*LONG, "checkpoint.keep_best=1"])

    steps = itertools.count(1)

    def damage_the_best(metrics: dict[str, float]) -> None:
        if next(steps) == 20:
            for file in Path(run.path("checkpoints")).glob("*/*.safetensors"):
                file.write_bytes(b"")

    result = train(job, World.current(), damage_the_best)
    said = [event["text"] for event in run.events() if event["kind"] == "best_passed_over"]
    best = [event for event in run.events() if event["kind"] == "best"]
    assert result.step == 20 and result.gate is not None
    assert (len(said), len(best)) == (1, 0) and "cannot be used" in said[0]


@pytest.mark.long
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(
    run_file: Path, settings: Settings, finished: tuple[Run, TrainJob]
) -> None:
    run, job = small_runs.make_job(run_file, settings, ["memory.micro=6", "checkpoint.every.steps=2"])
    train(job, World.current())
    newest = sorted(Path(run.path("checkpoints")).iterdir())[-1]
    shard = next(newest.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
    result = train(dataclasses.replace(job, attempt=2), World.current())
    said = [event["text"] for event in run.events() if event["kind"] in ("checkpoint_passed_over", "resumed")]
    assert "00000008 is not whole" in said[0] and "step 6" in said[1]
    assert result.step == 8 and losses(run) == losses(finished[0])
    assert saved_weights(run) == saved_weights(finished[0])


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ["precision=fp16", "optim.lr=1e-3"],
        ["method=full", "optim.name=adafactor", "optim.lr=1e-3"],
        ["method=full", "optim.name=adamw8bit", "optim.lr=1e-3"],
    ],
    ids=["fp16", "adafactor", "adamw8bit"],
)
def test_other_precisions_and_optimizers_learn_resume_bit_for_bit_and_pass_the_gate(
    options: list[str], run_file: Path, settings: Settings
) -> None:
    whole, job = small_runs.make_job(run_file, settings, [*options, "optim.epochs=10"])
    gate = train(job, World.current()).gate
    assert gate is not None and gate.alive == gate.total
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    run, job = small_runs.make_job(run_file, settings, [*options, "optim.epochs=10"])
    assert train(job, World.current(), functools.partial(stop, run)).step < 40
    run.clear_stop()
    train(dataclasses.replace(job, attempt=2), World.current())
    assert losses(run) == losses(whole)
    names = [name for name in storage.list_names(whole.path("model")) if name.endswith(".safetensors")]
    assert names and all(
        storage.read_bytes(run.path("model", name)) == storage.read_bytes(whole.path("model", name)) for name in names
    )


def test_steps_that_overflow_in_float16_are_made_again_and_no_row_is_lost(
    run_file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, finished: tuple[Run, TrainJob]
) -> None:
    monkeypatch.setattr(LossScale, "FIRST", 2.0**22)
    run, job = small_runs.make_job(run_file, settings, ["precision=fp16", "memory.micro=6"])
    train(job, World.current())
    log = storage.read_bytes(run.path("logs", "a1-rank-00000.log")).decode()
    assert "step 1: overflow in float16 at a loss scale of" in log
    assert run.ledger() == finished[0].ledger()


def test_a_profiled_run_leaves_a_trace_of_its_steps(run_file: Path, settings: Settings) -> None:
    run, job = small_runs.make_job(run_file, settings, ["memory.micro=6"])
    train(dataclasses.replace(job, profile=True), World.current())
    trace = json.loads(gzip.decompress(storage.read_bytes(run.path("profile", "a1-rank-00000.json.gz"))))
    assert sum(event["name"] == "aten::mm" for event in trace["traceEvents"]) > 10
    assert "aten::mm" in storage.read_bytes(run.path("profile", "a1-rank-00000.txt")).decode()


def test_a_checkpoint_every_so_many_minutes_comes_by_the_clock(run_file: Path, settings: Settings) -> None:
    by_clock = ["memory.micro=6", "optim.epochs=40", "checkpoint.every={minutes: 0.005}", "checkpoint.keep_last=99"]
    run, job = small_runs.make_job(run_file, settings, by_clock)
    result = train(job, World.current())
    taken = [int(name) for name in storage.list_names(run.path("checkpoints"))]
    assert 2 <= len(taken) < result.step == max(taken)  # some on the way, not one a step, and the last


@pytest.mark.long
def test_dropout_draws_do_not_depend_on_where_a_run_was_resumed(run_file: Path, settings: Settings) -> None:
    runs = []
    for attempts in (1, 2):
        run, job = small_runs.make_job(run_file, settings, ["method.dropout=0.3", "optim.epochs=20"])
        if attempts == 2:
            train(job, World.current(), functools.partial(stop, run))
            run.clear_stop()
            job = dataclasses.replace(job, attempt=2)
        train(job, World.current())
        runs.append(run)
    assert losses(runs[0]) == losses(runs[1])
    without, job = small_runs.make_job(run_file, settings, ["optim.epochs=20"])
    train(job, World.current())
    assert losses(without)[0] == losses(runs[0])[0]  # B is still zero, so the adapter's dropout changes nothing
    assert losses(without)[1] != losses(runs[0])[1]


def test_only_the_adapter_is_saved_and_it_is_pefts_own_format(base: Path, finished: tuple[Run, TrainJob]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, _ = finished
    assert storage.list_names(run.path("model")) == ["adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path("model"))
    ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {4}
    assert len(saved_weights(run)) == 28


def test_held_out_loss_equals_a_plain_computation(base: Path, finished: tuple[Run, TrainJob], run_file: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path("model")).eval()
    total, count = 0.0, 0
    for line in (run_file.parent / "eval.jsonl").read_text().splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        head, tail = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, f"{answer}<|im_end|>"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="sum"))
        count += len(tail)
    assert run.metrics()[-1]["eval/loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_row_that_gives_nan_stops_the_run_and_every_worker_names_that_row_alone(
    run_file: Path, settings: Settings, tmp_path: Path
) -> None:
    """The base has NaN in the embedding of `~`, which one row asks about: row 14."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    base = small_runs.small_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (tilde,) = AutoTokenizer.from_pretrained(base)("~", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][tilde] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    broken = small_runs.write_run_file(tmp_path / "run", base, optim={"lr": 1e-3, "batch": {"rows": 20}})
    file = broken.parent / "train.jsonl"
    rows = file.read_text().splitlines()
    rows[13] = rows[13].replace('"content": "', '"content": "~', 1)
    file.write_text("\n".join(rows) + "\n")
    run, job = small_runs.make_job(broken, settings, ["memory.micro=1", "data.pack=never"])
    with pytest.raises(AssertionError):
        run_workers(job, 2, tmp_path)
    for rank in (0, 1):
        log = storage.read_bytes(run.path("logs", f"a1-rank-{rank:05d}.log")).decode()
        assert "step 1: loss nan, among rows [14] of" in log
    assert not storage.list_names(run.path("model"))


def test_a_rate_that_blows_up_stops_the_run_and_names_the_rows(run_file: Path, settings: Settings) -> None:
    run, job = small_runs.make_job(run_file, settings, ["optim.lr=1e30", "optim.clip=0", "optim.warmup=0"])
    with pytest.raises(TrainingError, match=r"step \d+: loss .* rows \[[\d, ]+\] of .*train.jsonl") as caught:
        train(job, World.current())
    named = {int(number) for number in str(caught.value).partition("rows [")[2].partition("]")[0].split(",")}
    assert named <= set(range(1, 21)) and 0 < len(named) <= 6  # of the step's rows
    assert not storage.list_names(run.path("model"))
    assert "failed" in storage.read_bytes(run.path("logs", "a1-rank-00000.log")).decode()


def test_an_adapter_that_learnt_nothing_does_not_pass_the_gate(run_file: Path, settings: Settings) -> None:
    run, job = small_runs.make_job(run_file, settings, ["optim.lr=1e-45", "optim.max_steps=1"])
    with pytest.raises(GateError, match="14 of 14 updates are zero"):
        train(job, World.current())
    assert not storage.list_names(run.path("model"))


def saved_weights(run: Run) -> dict[str, list[float]]:
    from safetensors.torch import load

    tensors = load(storage.read_bytes(run.path("model", "adapter_model.safetensors")))
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def run_workers(job: TrainJob, world_size: int, directory: Path) -> dict[str, Any]:
    """The loop in `world_size` processes joined by gloo; the first one's result."""
    file = directory / "job.json"
    file.write_text(json.dumps(dataclasses.asdict(job)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.integration.loop_worker", str(file)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors.decode()[-2000:]
    result: dict[str, Any] = json.loads(outputs[0][0].decode().strip().splitlines()[-1])
    return result
