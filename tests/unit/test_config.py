"""What a run file and a serve file may say, and what their author hears when they say something else."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from service.config import (
    ResolvedRun,
    RunConfig,
    ServeConfig,
    dotted_names,
    leaves,
    load_run,
    load_serve,
    run_from_json,
)
from service.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model: base\ndata: {train: rows.jsonl}\n"


def _load(directory: Path, text: str, *overrides: str) -> ResolvedRun:
    file = directory / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_run(str(file), overrides)


def _problems(directory: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(directory, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("optim: {lrr: 1.0}", "optim.lrr: unknown key. Did you mean optim.lr?"),
        ("optim: {batch: {row: 3}}", "optim.batch.row: unknown key. Did you mean optim.batch.rows?"),
        ("optims: {}", "optims: unknown key. Did you mean optim?"),
        ("lr: 3", "lr: unknown key. Did you mean optim.lr?"),
        ("optim: {alpha: 3}", "optim.alpha: unknown key. Did you mean method.alpha?"),
        ("optim: {seq_len: 64}", "optim.seq_len: unknown key. Did you mean data.seq_len?"),
        ("evaluate: {steps: 5}", "evaluate.steps: unknown key. Did you mean evaluate.every.steps?"),
        ("scale: {zzzz: 1}", "scale.zzzz: unknown key. Known here: strategy, workers."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one_here_or_elsewhere(tmp_path: Path, line: str, said: str) -> None:
    assert said in _problems(tmp_path, f"{SMALL}{line}\n")


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "data: {seq_len: 4}\noptim: {lr: -1, schedule: cosin}\nscale: {workers: 0}\npublish: A B\n"
    message = _problems(tmp_path, text)
    for key in ("model: missing", "data.train: missing", "data.seq_len", "optim.lr", "optim.schedule", "scale.workers"):
        assert f"  {key}" in message
    assert "  publish.name" in message
    assert message.startswith(f"{tmp_path / 'run.yaml'}: 7 problems.")


@pytest.mark.parametrize(
    "line",
    [
        "method: {type: lora, r: '16'}",
        "method: {type: lora, r: 16.0}",
        "optim: {batch: {rows: true}}",
        "optim: {lr: '2e-4'}",
        "optim: {lr: .nan}",
        "optim: {lr: 1e999}",
        "seed: 1.5",
        "evaluate: {at_start: 1}",
        "data: {train: 3}",
        "model: {id: [a]}",
    ],
)
def test_a_value_of_another_type_is_refused_with_the_value_seen(tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    text = "\n".join(given for given in SMALL.splitlines() if not given.startswith(f"{key}:"))
    message = _problems(tmp_path, f"{text}\n{line}\n")
    assert "1 problem." in message and f"  {key}" in message and ", not " in message


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "1E-4", "+1e-4", ".1e-3", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, number: str) -> None:
    assert _load(tmp_path, f"{SMALL}optim: {{lr: {number}}}").config.optim.lr == pytest.approx(1e-4)
    assert _load(tmp_path, SMALL, f"optim.lr={number}").config.optim.lr == pytest.approx(1e-4)


@pytest.mark.parametrize("text", [f"{SMALL}seed: 1\nseed: 2\n", f"{SMALL}optim: {{lr: 1.0, lr: 2.0}}\n"])
def test_a_key_that_stands_twice_is_refused_by_name(tmp_path: Path, text: str) -> None:
    assert "stands twice" in _problems(tmp_path, text)


def test_an_override_wins_over_the_file_and_every_value_has_its_source(tmp_path: Path) -> None:
    resolved = _load(tmp_path, f"{SMALL}optim: {{lr: 1e-3, epochs: 2}}\n", "optim.lr=5e-4", "data.seq_len=64")
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
    assert _load(tmp_path, SMALL, override).sources[leaf] == "--set"


def test_overriding_one_field_of_a_block_keeps_the_others(tmp_path: Path) -> None:
    resolved = _load(tmp_path, f"{SMALL}method: lora\npublish: tickets\n", "method.r=4", "model.revision=v1")
    assert (resolved.config.method.type, resolved.config.method.r) == ("lora", 4)
    assert (resolved.config.model.id, resolved.config.model.revision) == ("base", "v1")
    assert resolved.config.publish is not None and resolved.config.publish.name == "tickets"


def test_a_field_of_a_block_that_the_file_leaves_out_can_be_overridden(tmp_path: Path) -> None:
    config = _load(tmp_path, SMALL, "method.r=4").config
    assert (config.method.type, config.method.r) == ("lora", 4)


def test_an_override_can_switch_publishing_off(tmp_path: Path) -> None:
    resolved = _load(tmp_path, f"{SMALL}publish: tickets\n", "publish=null")
    assert resolved.config.publish is None and resolved.sources["publish"] == "--set"


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", "optim.lr=[", "optim.lrr=3", "optim.lr=x"])
def test_a_bad_override_is_refused_and_named(tmp_path: Path, override: str) -> None:
    assert override.split("=")[0] in _problems(tmp_path, SMALL, override)


def test_a_bare_word_stands_for_a_blocks_main_key(tmp_path: Path) -> None:
    short = _load(tmp_path, f"{SMALL}method: lora\npublish: team/tickets\n")
    long = _load(
        tmp_path,
        "model: {id: base}\ndata: {train: rows.jsonl}\nmethod: {type: lora}\npublish: {name: team/tickets}\n",
    )
    assert short.config == long.config and short.sources == long.sources


@pytest.mark.parametrize("name", ["tickets@3", "Tickets", "a/b/c", "''", "../x"])
def test_publish_takes_a_bare_name_only(tmp_path: Path, name: str) -> None:
    assert "publish.name" in _problems(tmp_path, f"{SMALL}publish: {name}\n")


@pytest.mark.parametrize(
    ("written", "read"), [("0", 0), ("7", 7), ("10%", "10%"), ("2.5%", "2.5%"), ("100 %", "100 %")]
)
def test_warmup_is_steps_or_a_share(tmp_path: Path, written: str, read: int | str) -> None:
    assert _load(tmp_path, f"{SMALL}optim: {{warmup: {written}}}\n").config.optim.warmup == read


@pytest.mark.parametrize("written", ["-1", "101%", "'10'", "ten", "0.1", "-5%", "true"])
def test_any_other_warmup_is_refused(tmp_path: Path, written: str) -> None:
    assert "optim.warmup" in _problems(tmp_path, f"{SMALL}optim: {{warmup: {written}}}\n")


def test_a_resolved_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    text = f"{SMALL}method: {{type: lora, targets: [q_proj, v_proj]}}\noptim: {{warmup: 3}}\nmemory: {{micro: 2}}\n"
    resolved = _load(tmp_path, text, "publish=tickets")
    assert run_from_json(json.loads(json.dumps(resolved.as_json())), text) == resolved


@pytest.mark.parametrize("text", ["", "- a\n", "3\n", "a: [\n", "\x00", "x: !!python/object:os.system 3\n", "\ttab: 1"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    assert "run.yaml" in _problems(tmp_path, text)


def test_a_missing_a_binary_and_a_directory_file_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path / "binary", tmp_path):
        with pytest.raises(ConfigError, match=path.name):
            load_run(str(path))


def test_garbage_never_raises_anything_but_a_config_error(tmp_path: Path) -> None:
    """600 files of tokens drawn from YAML's grammar and our own words, from a fixed seed."""
    draw = random.Random(20)
    words = [name.split(".")[-1] for name in dotted_names(RunConfig)] + ["optim", "data", "model", "method", "publish"]
    signs = [
        ": ",
        ": ",
        ": ",
        "\n",
        "\n  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "&a ",
        "*a",
        "? ",
        "| ",
        "'",
        '"',
        "%",
        "!!set ",
    ]
    values = [
        "1",
        "1e-4",
        "-.inf",
        "null",
        "true",
        "lora",
        "2001-99-99",
        "0b2",
        "9" * 40,
        "<<",
        "~",
        "0o7",
        "é",
        "1:2:3",
    ]
    for _ in range(600):
        pieces = [draw.choice(draw.choice([words, signs, signs, values])) for _ in range(draw.randint(1, 30))]
        head = draw.choice(["", SMALL])
        try:
            _load(tmp_path, head + "".join(pieces))
        except ConfigError:
            continue


@pytest.mark.parametrize(
    "line",
    [
        "seed: 0x" + "f" * 5000,
        "seed: " + "9" * 5000,
        "optim: {lr: 0x" + "f" * 5000 + "}",
        "x: &a [*a]",
        "x: " + "[" * 1200,
        "? [1]\n: 2",
        "optim: {1: 2}",
        "x: 2001-99-99",
    ],
    ids=["hex", "digits", "float", "cycle", "deep", "list as key", "number as key", "date"],
)
def test_hostile_values_are_config_errors(tmp_path: Path, line: str) -> None:
    assert "run.yaml" in _problems(tmp_path, f"{SMALL}{line}\n")


def test_a_serve_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: base\nadapters: [tickets@1, tickets@2]\nengine: {slots: 4}\n")
    config = load_serve(str(file))
    assert (config.endpoint, config.port, config.adapters) == ("default", 8000, ("tickets@1", "tickets@2"))
    assert (config.engine.slots, config.engine.max_context) == (4, 2048)
    assert ServeConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_all_problems_of_a_serve_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("endpoint: ../x\nport: 70000\nengine: {slot: 4}\nadapters: tickets@1\n")
    with pytest.raises(ConfigError) as caught:
        load_serve(str(file))
    for key in (
        "model: missing",
        "endpoint",
        "port",
        "engine.slot: unknown key. Did you mean engine.slots?",
        "adapters",
    ):
        assert f"  {key}" in str(caught.value)


def _settled(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Keys with one possible value (`objective: sft`): the config checks them, and they have nothing to change yet."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            found.add(key)
        for block in _blocks(field.annotation):
            found |= _settled(block, f"{key}.")
    return found


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _blocks(part)


def _reads(*packages: str) -> Iterator[tuple[str, str]]:
    """(owner, attribute) of every attribute that is read: `config.optim.lr` gives (optim, lr) and (config, optim)."""
    for file in (file for package in packages for file in sorted((ROOT / package).rglob("*.py"))):
        if file == ROOT / "service" / "config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                named = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                yield named, node.attr


@pytest.mark.parametrize(
    ("model", "packages"), [(RunConfig, ("service", "jobs")), (ServeConfig, ("service", "serve"))], ids=["run", "serve"]
)
def test_no_key_is_read_by_nothing(model: type[BaseModel], packages: tuple[str, ...]) -> None:
    read = set(_reads(*packages))
    keys = [name for name in dotted_names(model) if name not in _settled(model)]
    assert [key for key in keys if tuple(["config", *key.split(".")][-2:]) not in read] == []


def test_a_frozen_config_cannot_be_changed(tmp_path: Path) -> None:
    config: Any = _load(tmp_path, SMALL).config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
