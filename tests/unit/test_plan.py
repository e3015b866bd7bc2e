"""What a plan counts, refuses and shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from service.cli.planned import plan_tables
from service.config import load_run
from service.data import shards
from service.domain import RunState
from service.errors import ConfigError
from service.logs import LogWriter
from service.runs import Run
from service.settings import Settings
from service.training.plan import RunPlan, detailed, make_run_plan
from tests.integration import tiny
from tests.integration.small_runs import write_run_file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home and a cache of its own."""
    return Settings(str(tmp_path / "home"), tmp_path / "cache")


def _detailed(run_file: Path, settings: Settings, *overrides: str) -> RunPlan:
    resolved = load_run(str(run_file), overrides)
    return detailed(make_run_plan(resolved, settings), resolved, settings, probe=False)


def test_steps_tokens_and_parameters_are_counted(base: Path, settings: Settings, tmp_path: Path) -> None:
    resolved = load_run(str(write_run_file(tmp_path / "run", base, num_rows=20)))
    plan = make_run_plan(resolved, settings)
    rows = shards.load(plan.train.digest, home=settings.home, cache=settings.cache)
    assert (plan.num_steps, plan.steps_per_epoch) == (8, 4)  # 20 rows, 6 a step, two epochs
    assert plan.total_tokens == 2 * rows.lengths.sum()
    assert plan.supervised_tokens == 2 * rows.supervised.sum() < plan.total_tokens
    shapes = {
        "q": (64, 64),
        "k": (64, 32),
        "v": (64, 32),
        "o": (64, 64),
        "gate": (64, 128),
        "up": (64, 128),
        "down": (128, 64),
    }
    assert plan.trainable_parameters == 2 * sum(4 * (i + o) for i, o in shapes.values())  # layers, r 4: A and B
    assert plan.trainable_weight_bytes == 4 * plan.trainable_parameters


def test_the_plan_of_a_run_goes_through_json_and_tables(base: Path, settings: Settings, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "run", base)
    plan = _detailed(run_file, settings, "checkpoint.every.steps=0")
    shown = json.loads(json.dumps(plan.as_json()))
    assert sum(shown["memory"]["parts"].values()) == shown["memory"]["peaks"]["train"]
    assert set(shown["memory"]["peaks"]) == {"load", "train", "save", "resume"}
    console = Console(width=200, record=True, file=io.StringIO())
    for table in plan_tables(load_run(str(run_file)), plan):
        console.print(table)
    text = console.export_text()
    for words in (
        "peak: train",
        "activations",
        "loray plan --probe",
        "checkpoint.every is off",
        "trainable parameters",
    ):
        assert words in text


def test_what_cannot_work_is_refused_with_every_reason_before_data_is_read(
    base: Path, settings: Settings, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path / "run", base)
    (tmp_path / "run" / "train.jsonl").unlink()
    overrides = ["scale.offload=all", "method={type: lora, base_bits: 8, bias: all}"]
    with pytest.raises(ConfigError, match=r"(?s)scale\.offload all.*method\.bias all") as refusal:
        make_run_plan(load_run(str(run_file), overrides), settings)
    assert "ddp keeps everything on the worker" in str(refusal.value)


def test_warmup_beyond_the_last_step_is_refused(base: Path, settings: Settings, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "run", base)
    with pytest.raises(ConfigError, match=r"would never reach optim\.lr"):
        make_run_plan(load_run(str(run_file), ["optim.warmup=9"]), settings)


def test_the_largest_micro_batch_is_what_is_planned_for(base: Path, settings: Settings, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "run", base)
    plan = _detailed(run_file, settings, "data.pack=never", "memory.micro=3")
    assert plan.memory is not None
    assert (plan.memory.sequences, plan.memory.tokens) == (3, plan.train.longest)
    packed = _detailed(run_file, settings, "data.seq_len=256", "memory.micro=1").memory
    assert packed is not None
    assert packed.sequences == 1 and plan.train.longest < packed.tokens <= 256


def test_time_comes_from_an_earlier_run_of_the_same_kind(base: Path, settings: Settings, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path / "run", base)
    assert _detailed(run_file, settings).time is None
    _finished_run(settings, run_file, "method={type: full}", tokens_per_s=1.0)
    assert _detailed(run_file, settings).time is None
    run = _finished_run(settings, run_file, tokens_per_s=100.0)
    plan = _detailed(run_file, settings)
    assert plan.time is not None
    assert plan.time.training_s == pytest.approx(plan.total_tokens / 100.0)
    assert plan.time.seconds_per_step == pytest.approx(plan.time.training_s / plan.num_steps)
    assert run.id in plan.time.source and "rough" in plan.time.source


def _finished_run(settings: Settings, run_file: Path, *overrides: str, tokens_per_s: float) -> Run:
    resolved = load_run(str(run_file), overrides)
    run = Run.create(settings.home, "earlier", resolved.text, resolved.as_json())
    with LogWriter(run.path("metrics"), "a1-r0") as log:
        log.append({"step": 1, "train/tokens_per_s": tokens_per_s})
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.SUCCEEDED)
    return run


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        # Published: Llama 2 in arXiv:2307.09288's checkpoints, SmolLM2 and Qwen2.5 in their model cards.
        ({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
          "vocab_size": 32000}, 6_738_415_616),
        ({"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
          "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}, 134_515_008),
    ],
)  # fmt: skip
def test_parameters_are_those_that_were_published(
    base: Path, settings: Settings, tmp_path: Path, shape: dict[str, Any], parameters: int
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    for file in base.iterdir():
        (large / file.name).write_bytes(file.read_bytes())  # tokenizer; the weights are not looked into
    config = json.loads((large / "config.json").read_text())
    kept = {key: config[key] for key in ("architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id")}
    (large / "config.json").write_text(json.dumps({**kept, **shape, "max_position_embeddings": 4096}))
    run_file = write_run_file(tmp_path / "run", large)
    run_file.write_text(run_file.read_text() + yaml.safe_dump({"publish": "large"}))
    plan = make_run_plan(load_run(str(run_file), ["method=full", "precision=bf16"]), settings)
    assert plan.total_parameters == plan.trainable_parameters == parameters
    assert (plan.trainable_weight_bytes, plan.frozen_weight_bytes) == (4 * parameters, 0)
