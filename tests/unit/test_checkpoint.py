"""Checkpoints: whole or not there, and the newest whole one is found whatever happened to the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service import storage
from service.errors import ConfigError
from service.training.checkpoint import Checkpoint, newest_checkpoint, prune, save_checkpoint

pytest_plugins = ("tests.s3_endpoint",)

CONFIG = "c" * 64


def _checkpoint(step: int) -> Checkpoint:
    draw = torch.Generator().manual_seed(step)
    weights = {"a.lora_A": torch.randn(4, 8, generator=draw), "a.lora_B": torch.randn(8, 4, generator=draw)}
    state = {"a.lora_A/exp_avg": torch.randn(4, 8, generator=draw) * 1e-30, "a.lora_A/step": torch.tensor(float(step))}
    return Checkpoint(step, weights, state)


def _save(run: str, *steps: int) -> list[str]:
    return [save_checkpoint(run, _checkpoint(step), CONFIG) for step in steps]


def _equal(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    assert found is not None
    pairs = [(found.weights, wanted.weights), (found.moments, wanted.moments)]
    same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)
    return found.step == wanted.step and same


def test_a_checkpoint_comes_back_bit_for_bit(home: str) -> None:
    _save(home, 9, 10)
    found, passed_over = newest_checkpoint(home, CONFIG)
    assert _equal(found, _checkpoint(10)) and passed_over == []


def test_a_run_without_checkpoints_has_none(home: str) -> None:
    assert newest_checkpoint(home, CONFIG) == (None, [])


def test_ten_is_newer_than_nine_and_a_million_than_both(tmp_path: Path) -> None:
    _save(str(tmp_path), 9, 10, 1_000_000)
    found, _ = newest_checkpoint(str(tmp_path), CONFIG)
    assert found is not None and found.step == 1_000_000


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.json", None),
        ("weights.safetensors", None),
        ("optimizer.safetensors", None),
        ("weights.safetensors", b"\x00" * 64),
        ("optimizer.safetensors", "cut"),
        ("checkpoint.json", "cut"),
        ("checkpoint.json", b"{}"),
    ],
)
def test_one_that_is_not_whole_is_passed_over_with_a_line(
    tmp_path: Path, name: str, damage: bytes | str | None
) -> None:
    run = str(tmp_path)
    file = Path(_save(run, 5, 10)[1]) / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage if isinstance(damage, bytes) else file.read_bytes()[:-7])
    found, passed_over = newest_checkpoint(run, CONFIG)
    assert _equal(found, _checkpoint(5))
    (line,) = passed_over
    assert "00000010" in line and name in line and "passed over" in line


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    for uri in _save(str(tmp_path), 5, 10):
        (Path(uri) / "weights.safetensors").unlink()
    found, passed_over = newest_checkpoint(str(tmp_path), CONFIG)
    assert found is None and ["00000010" in passed_over[0], "00000005" in passed_over[1]] == [True, True]


def test_another_configs_checkpoint_is_refused(tmp_path: Path) -> None:
    _save(str(tmp_path), 5)
    with pytest.raises(ConfigError, match="belongs to another config"):
        newest_checkpoint(str(tmp_path), "d" * 64)


def test_writing_a_step_again_replaces_it(home: str) -> None:
    save_checkpoint(home, Checkpoint(7, {"w": torch.zeros(3)}, {}), CONFIG)
    _save(home, 7)
    found, passed_over = newest_checkpoint(home, CONFIG)
    assert _equal(found, _checkpoint(7)) and passed_over == []


def test_the_index_is_plain_json_that_names_the_step_and_the_checksums(tmp_path: Path) -> None:
    (uri,) = _save(str(tmp_path), 3)
    index = json.loads((Path(uri) / "checkpoint.json").read_text())
    assert index["step"] == 3 and set(index["files"]) == {"weights.safetensors", "optimizer.safetensors"}


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_pruning_keeps_the_newest(home: str, keep: int) -> None:
    _save(home, 5, 10, 15, 100)
    prune(home, keep)
    left = [int(name) for name in storage.list_names(storage.join(home, "checkpoints"))]
    assert left == [5, 10, 15, 100][-keep:]


def test_pruning_never_deletes_the_newest_whole_one_for_a_torn_one(tmp_path: Path) -> None:
    """An attempt died while it wrote step 20; the next one was asked to stop at 15 and keeps one checkpoint."""
    run = str(tmp_path)
    torn = _save(run, 10, 20)[1]
    (Path(torn) / "checkpoint.json").unlink()
    _save(run, 15)
    prune(run, 1)
    found, _ = newest_checkpoint(run, CONFIG)
    assert _equal(found, _checkpoint(15))
