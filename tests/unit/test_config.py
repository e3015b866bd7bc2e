"""What a run file and a serve file may say, and what their author hears when they say something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from service.config import RunConfig, ServeConfig, dotted_names, load_run, load_serve
from service.errors import ConfigError
from tests.unit.run_files import SMALL, load, problems


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
        (
            "scale: {zzzz: 1}",
            "scale.zzzz: unknown key. Known here: max_failures, offload, stall_s, strategy, wait_s, workers.",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one_here_or_elsewhere(tmp_path: Path, line: str, said: str) -> None:
    assert said in problems(tmp_path, f"{SMALL}{line}\n")


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "data: {seq_len: 4}\noptim: {lr: -1, schedule: cosin}\nscale: {workers: 0}\npublish: A B\n"
    message = problems(tmp_path, text)
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
    message = problems(tmp_path, f"{text}\n{line}\n")
    assert "1 problem." in message and f"  {key}" in message and ", not " in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "method: {type: full, r: 8}",
            "method.r: is no key of method.type full; it belongs to lora, qlora. Drop it, or set method.type: lora.",
        ),
        (
            "method: {double_quant: true}",
            "method.double_quant: is no key of method.type lora; it belongs to qlora. Drop it, or set method.type: qlora.",
        ),
        ("method: {type: full, zz: 1}", "method.zz: unknown key. Known here: type."),
        ("method: {type: lora, lora: {r: 3}}", "method.lora: unknown key. Did you mean method.rslora?"),
        ("method: {type: lroa}", "method.type: must be 'full', 'lora' or 'qlora', not 'lroa'."),
        ("method: 3", "method: must be a mapping, not 3."),
        ("method: {base_bits: 4}", "method.base_bits: must be 16 or 8, not 4."),
        ("method: {type: qlora, base_bits: 8}", "method.base_bits: must be 4, not 8."),
        ("method: {targets: all}", "method.targets: must be 'all-linear' or a list, not 'all'."),
        ("method: {targets: []}", "method.targets: must have at least 1 item, not []."),
        ("method: {targets: [q_proj, 2]}", "method.targets.1: must be a valid string, not 2."),
        (
            "method: {rank_pattern: {q_proj: 0}}",
            "method.rank_pattern.q_proj: must be greater than or equal to 1, not 0.",
        ),
        ("scale: {workers: 0}", "scale.workers: must be greater than or equal to 1, not 0."),
        (
            "scale: {workers: two}",
            "scale.workers: must be a valid integer or a mapping of min and max, not 'two'.",
        ),
        ("scale: {workers: {min: 2}}", "scale.workers.max: missing. It has no default."),
        ("scale: {workers: {min: x, max: 2}}", "scale.workers.min: must be a valid integer, not 'x'."),
        ("scale: {workers: {min: 3, max: 2}}", "scale.workers: min 3 is more than max 2; set them in order."),
        ("scale: {workers: {min: 1, max: 2, mix: 3}}", "scale.workers.mix: unknown key. Did you mean"),
        ("memory: {micro: 0}", "memory.micro: must be greater than or equal to 1, not 0."),
        ("memory: {micro: all}", "memory.micro: must be 'auto' or a valid integer, not 'all'."),
        ("optim: {warmup: true}", "optim.warmup: must be a valid integer or a valid string, not True."),
        ("optim: {batch: {rows: 0}}", "optim.batch.rows: must be greater than or equal to 1, not 0."),
        (
            "optim: {batch: {rows: 4, tokens: 99}}",
            "optim.batch: rows 4 and tokens 99 are both given; keep one of the two.",
        ),
        ("checkpoint: {every: 5}", "checkpoint.every: must be a mapping of steps and minutes, not 5."),
    ],
)
def test_a_mistake_inside_a_choice_is_one_problem_under_the_name_the_user_wrote(
    tmp_path: Path, line: str, said: str
) -> None:
    message = problems(tmp_path, f"{SMALL}{line}\n")
    assert "1 problem." in message and f"  {said}" in message


def test_what_goes_by_evaluations_is_refused_without_them_beside_all_otherproblems(tmp_path: Path) -> None:
    message = problems(tmp_path, f"{SMALL}stop: {{patience: 2}}\ncheckpoint: {{keep_best: 1}}\nseed: -1\n")
    assert "3 problems." in message and "  seed: " in message
    for key in ("stop.patience: 2", "checkpoint.keep_best: 1"):
        assert f"  {key} goes by evaluations during the run. Set data.eval and evaluate.every.steps too" in message
    text = SMALL.replace("}", ", eval: held.jsonl}") + "stop: {patience: 2}\ncheckpoint: {keep_best: 1}\n"
    assert "Set evaluate.every.steps too" in problems(tmp_path, text)
    assert load(tmp_path, f"{text}evaluate: {{every: {{steps: 5}}}}\n").config.stop.patience == 2


@pytest.mark.parametrize(("method", "lr"), [("lora", 2e-4), ("qlora", 2e-4), ("full", 2e-5)])
def test_a_rate_that_is_not_written_follows_from_the_method_and_says_so(tmp_path: Path, method: str, lr: float) -> None:
    for text in (f"{SMALL}method: {method}\n", f"{SMALL}method: {{type: {method}}}\noptim: {{epochs: 2}}\n"):
        resolved = load(tmp_path, text)
        assert resolved.config.optim.lr == lr and resolved.sources["optim.lr"] == "auto"
    resolved = load(tmp_path, f"{SMALL}method: {method}\noptim: {{lr: 1e-3}}\n")
    assert resolved.config.optim.lr == 1e-3 and resolved.sources["optim.lr"] == "file"


def test_a_batch_is_in_rows_or_in_tokens_and_sixteen_rows_unless_given(tmp_path: Path) -> None:
    seen = {
        line: load(tmp_path, f"{SMALL}optim: {{batch: {line}}}\n").config.optim.batch
        for line in ("{}", "{rows: null}", "{rows: 3}", "{tokens: 65536}")
    }
    assert [(batch.rows, batch.tokens) for batch in seen.values()] == [(16, None), (16, None), (3, None), (None, 65536)]


def test_a_period_in_minutes_alone_leaves_the_steps_off(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).config.checkpoint.every.steps == 50
    every = load(tmp_path, f"{SMALL}checkpoint: {{every: {{minutes: 10}}}}\n").config.checkpoint.every
    assert (every.steps, every.minutes) == (0, 10)


@pytest.mark.parametrize(("written", "fewest", "most"), [("3", 3, 3), ("{min: 1, max: 4}", 1, 4)])
def test_workers_are_a_number_or_a_range(tmp_path: Path, written: str, fewest: int, most: int) -> None:
    scale = load(tmp_path, f"{SMALL}scale: {{workers: {written}}}\n").config.scale
    assert (scale.min_workers, scale.max_workers) == (fewest, most)


def test_every_block_of_a_choice_has_its_dotted_names_once() -> None:
    names = list(dotted_names(RunConfig))
    assert len(names) == len(set(names))
    for key in ("method.type", "method.r", "method.double_quant", "scale.workers", "scale.workers.min", "publish.name"):
        assert key in names
    assert "publish" not in names and "method" not in names


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "1E-4", "+1e-4", ".1e-3", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, number: str) -> None:
    assert load(tmp_path, f"{SMALL}optim: {{lr: {number}}}").config.optim.lr == pytest.approx(1e-4)
    assert load(tmp_path, SMALL, f"optim.lr={number}").config.optim.lr == pytest.approx(1e-4)


@pytest.mark.parametrize("text", [f"{SMALL}seed: 1\nseed: 2\n", f"{SMALL}optim: {{lr: 1.0, lr: 2.0}}\n"])
def test_a_key_that_stands_twice_is_refused_by_name(tmp_path: Path, text: str) -> None:
    assert "stands twice" in problems(tmp_path, text)


def test_a_bare_word_stands_for_a_blocks_main_key(tmp_path: Path) -> None:
    short = load(tmp_path, f"{SMALL}method: lora\npublish: team/tickets\n")
    long = load(
        tmp_path,
        "model: {id: base}\ndata: {train: rows.jsonl}\nmethod: {type: lora}\npublish: {name: team/tickets}\n",
    )
    assert short.config == long.config and short.sources == long.sources


@pytest.mark.parametrize("name", ["tickets@3", "Tickets", "a/b/c", "''", "../x"])
def test_publish_takes_a_bare_name_only(tmp_path: Path, name: str) -> None:
    assert "publish.name" in problems(tmp_path, f"{SMALL}publish: {name}\n")


@pytest.mark.parametrize(
    ("written", "read"), [("0", 0), ("7", 7), ("10%", "10%"), ("2.5%", "2.5%"), ("100 %", "100 %")]
)
def test_warmup_is_steps_or_a_share(tmp_path: Path, written: str, read: int | str) -> None:
    assert load(tmp_path, f"{SMALL}optim: {{warmup: {written}}}\n").config.optim.warmup == read


@pytest.mark.parametrize("written", ["-1", "101%", "'10'", "ten", "0.1", "-5%", "true"])
def test_any_other_warmup_is_refused(tmp_path: Path, written: str) -> None:
    assert "optim.warmup" in problems(tmp_path, f"{SMALL}optim: {{warmup: {written}}}\n")


@pytest.mark.parametrize("text", ["", "- a\n", "3\n", "a: [\n", "\x00", "x: !!python/object:os.system 3\n", "\ttab: 1"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    assert "run.yaml" in problems(tmp_path, text)


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
            load(tmp_path, head + "".join(pieces))
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
    assert "run.yaml" in problems(tmp_path, f"{SMALL}{line}\n")


def test_a_serve_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: base\nadapters: [tickets@1, tickets@2]\nengine: {slots: 4}\n")
    config = load_serve(str(file))
    assert (config.endpoint, config.port, config.adapters) == ("default", 8000, ("tickets@1", "tickets@2"))
    assert (config.engine.slots, config.engine.max_context) == (4, 2048)
    assert ServeConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_all_problems_of_a_serve_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    wrong = "endpoint: ../x\nport: 70000\nengine: {slot: 4}\nadapters: tickets@1\n"
    file.write_text(f"{wrong}adapter_roots: /mnt/adapters\nadapter_max_bytes: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_serve(str(file))
    for key in (
        "model: missing",
        "endpoint",
        "port",
        "engine.slot: unknown key. Did you mean engine.slots?",
        "adapters",
        "adapter_roots",
        "adapter_max_bytes",
    ):
        assert f"  {key}" in str(caught.value)


def test_a_frozen_config_cannot_be_changed(tmp_path: Path) -> None:
    config: Any = load(tmp_path, SMALL).config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
