"""`--set`: what an override of a run file's field does, what it takes away, and what it may do to a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.config import FullBlock, LoraBlock, QloraBlock, leaves, run_from_json
from service.errors import ConfigError
from tests.unit.run_files import SMALL, load, problems


def _made(directory: Path, text: str, *overrides: str) -> dict[str, Any]:
    """What `resolved.json` of a run holds."""
    document: dict[str, Any] = json.loads(json.dumps(load(directory, text, *overrides).as_json()))
    return document


def test_an_override_wins_over_the_file_and_every_value_has_its_source(tmp_path: Path) -> None:
    resolved = load(tmp_path, f"{SMALL}optim: {{lr: 1e-3, epochs: 2}}\n", "optim.lr=5e-4", "data.seq_len=64")
    assert (resolved.config.optim.lr, resolved.config.optim.epochs, resolved.config.data.seq_len) == (5e-4, 2, 64)
    written = {key: source for key, source in resolved.sources.items() if source != "default"}
    assert written == {
        "model.id": "file",
        "data.train": "file",
        "optim.epochs": "file",
        "optim.lr": "--set",
        "data.seq_len": "--set",
    }
    assert list(resolved.sources) == [key for key, _ in leaves(resolved.as_json()["config"])]


@pytest.mark.parametrize(
    ("override", "leaf"), [("model=other", "model.id"), ("method=lora", "method.type"), ("publish=a", "publish.name")]
)
def test_an_override_by_shorthand_is_reported_with_its_source(tmp_path: Path, override: str, leaf: str) -> None:
    assert load(tmp_path, SMALL, override).sources[leaf] == "--set"


def test_overriding_one_field_of_a_block_keeps_the_others(tmp_path: Path) -> None:
    resolved = load(tmp_path, f"{SMALL}method: lora\npublish: tickets\n", "method.r=4", "model.revision=v1")
    assert resolved.config.method == LoraBlock(r=4)
    assert (resolved.config.model.id, resolved.config.model.revision) == ("base", "v1")
    assert resolved.config.publish is not None and resolved.config.publish.name == "tickets"


def test_a_field_of_a_block_that_the_file_leaves_out_can_be_overridden(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL, "method.r=4").config
    assert config.method == LoraBlock(r=4)


def test_an_override_can_switch_publishing_off(tmp_path: Path) -> None:
    resolved = load(tmp_path, f"{SMALL}publish: tickets\n", "publish=null")
    assert resolved.config.publish is None and resolved.sources["publish"] == "--set"


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", "optim.lr=[", "optim.lrr=3", "optim.lr=x"])
def test_a_bad_override_is_refused_and_named(tmp_path: Path, override: str) -> None:
    assert override.split("=")[0] in problems(tmp_path, SMALL, override)


def test_a_resolved_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    text = f"{SMALL}method: {{type: lora, targets: [q_proj, v_proj]}}\noptim: {{warmup: 3}}\nmemory: {{micro: 2}}\n"
    resolved = load(tmp_path, text, "publish=tickets")
    assert run_from_json(json.loads(json.dumps(resolved.as_json())), text) == resolved


def test_an_override_of_the_method_takes_away_what_the_file_says_of_another_one(tmp_path: Path) -> None:
    text = f"{SMALL}method: {{type: qlora, r: 8, double_quant: false, rank_pattern: {{q_proj: 4}}}}\n"
    for override in ("method=full", "method.type=full"):
        resolved = load(tmp_path, text, override)
        assert resolved.config.method == FullBlock() and resolved.config.optim.lr == 2e-5
        assert {key: source for key, source in resolved.sources.items() if key.startswith("method")} == {
            "method.type": "--set"
        }
    kept = load(tmp_path, text, "method=lora").config.method
    assert kept == LoraBlock(r=8, rank_pattern={"q_proj": 4})
    assert load(tmp_path, f"{SMALL}method: {{r: 8}}\n", "method=qlora").config.method == QloraBlock(r=8)


def test_what_two_overrides_contradict_each_other_in_is_a_problem_of_theirs(tmp_path: Path) -> None:
    text = f"{SMALL}method: {{type: lora, alpha: 8}}\noptim: {{batch: {{rows: 4}}}}\n"
    message = problems(tmp_path, text, "method.r=4", "method=full", "optim.batch.tokens=64", "optim.batch.rows=2")
    assert "2 problems." in message and "method.alpha" not in message
    assert "  method.r: is no key of method.type full" in message
    assert "  optim.batch: rows 2 and tokens 64 are both given" in message


def test_an_override_in_tokens_takes_away_the_files_rows(tmp_path: Path) -> None:
    resolved = load(tmp_path, f"{SMALL}optim: {{batch: {{rows: 4}}}}\n", "optim.batch.tokens=4096")
    assert (resolved.config.optim.batch.rows, resolved.config.optim.batch.tokens) == (None, 4096)
    assert (resolved.sources["optim.batch.rows"], resolved.sources["optim.batch.tokens"]) == ("default", "--set")


@pytest.mark.parametrize(
    ("written", "override", "workers", "sources"),
    [
        ("{min: 1, max: 4}", "scale.workers=2", (2, 2), {"scale.workers": "--set"}),
        (
            "{min: 1, max: 4}",
            "scale.workers.min=2",
            (2, 4),
            {"scale.workers.min": "--set", "scale.workers.max": "file"},
        ),
        ("3", "scale.workers.min=1", (1, 3), {"scale.workers.min": "--set", "scale.workers.max": "file"}),
        ("3", "scale.workers={min: 1, max: 2}", (1, 2), {"scale.workers.min": "--set", "scale.workers.max": "--set"}),
    ],
)
def test_an_override_makes_workers_a_number_or_a_range(
    tmp_path: Path, written: str, override: str, workers: tuple[int, int], sources: dict[str, str]
) -> None:
    resolved = load(tmp_path, f"{SMALL}scale: {{workers: {written}}}\n", override)
    assert (resolved.config.scale.min_workers, resolved.config.scale.max_workers) == workers
    assert {key: source for key, source in resolved.sources.items() if key.startswith("scale.workers")} == sources


def test_a_block_that_two_keys_share_is_overridden_for_one_of_them_only(tmp_path: Path) -> None:
    text = f"{SMALL}evaluate: {{every: &often {{steps: 5}}}}\ncheckpoint: {{every: *often}}\n"
    config = load(tmp_path, text, "checkpoint.every.steps=7", "data.eval=held.jsonl").config
    assert (config.evaluate.every.steps, config.checkpoint.every.steps) == (5, 7)


def test_a_run_that_goes_on_may_be_spread_stored_and_stopped_otherwise(tmp_path: Path) -> None:
    made = _made(tmp_path, f"{SMALL}scale: {{workers: 2}}\n", "memory.micro=4")
    given = [
        "scale.workers.min=1",
        "scale.strategy=zero2",
        "memory.micro=2",
        "checkpoint.keep_last=3",
        "publish=tickets",
    ]
    resumed = run_from_json(made, SMALL, given)
    config = resumed.config
    assert (config.scale.min_workers, config.scale.max_workers, config.scale.strategy) == (1, 2, "zero2")
    assert (config.memory.micro, config.checkpoint.keep_last) == (2, 3)
    assert config.publish is not None and config.publish.name == "tickets"
    assert resumed.overrides == ("memory.micro=4", *given)
    assert resumed.sources["scale.workers.max"] == "file" and resumed.sources["scale.strategy"] == "--set"
    assert resumed.sources["optim.lr"] == "auto"
    assert run_from_json(json.loads(json.dumps(resumed.as_json())), SMALL) == resumed


def test_what_would_change_what_is_learnt_is_refused_field_by_field_in_a_run_that_goes_on(tmp_path: Path) -> None:
    made = _made(tmp_path, f"{SMALL}method: full\n")
    with pytest.raises(ConfigError) as caught:
        run_from_json(
            made, SMALL,
            ["optim.lr=1e-3", "method=lora", "method.r=8", "model=other", "optim.lrr=1", "data={}", "scale.workers=0"],
        )  # fmt: skip
    message = str(caught.value)
    assert "7 problems." in message
    for line in (
        "optim.lr: the run has 2e-05, asked for 0.001, which would change what is learnt. Leave it out, or start a new run",
        "method.type: the run has 'full', asked for 'lora'",
        "method.r: the run has no such field with method.type full",
        "model.id: the run has 'base', asked for 'other'",
        "optim.lrr: unknown key. Did you mean optim.lr?",
        "data: is a block of fields",
        "scale.workers: must be greater than or equal to 1, not 0.",
    ):
        assert f"  {line}" in message


def test_asking_for_what_a_run_has_already_is_no_problem(tmp_path: Path) -> None:
    made = _made(tmp_path, f"{SMALL}optim: {{warmup: 0}}\n")
    assert run_from_json(made, SMALL, ["optim={warmup: 0}", "method=lora"]).config == run_from_json(made, SMALL).config
