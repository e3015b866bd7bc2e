"""Checkpoints: whole or not there, and the newest whole one is found whatever happened to the others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from service import storage
from service.config import CheckpointBlock, RunConfig
from service.errors import ConfigError, StorageError
from service.runs import Run
from service.training import checkpoint_index, checkpoint_saver
from service.training.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    Identity,
    checkpoint_at,
    newest_checkpoint,
    newest_step,
)
from service.training.strategy import World

pytest_plugins = ("tests.s3_endpoint",)

Tensors = dict[str, torch.Tensor]
ALONE = World()
PATIENT_S = 30.0


def _config(**changes: Any) -> dict[str, Any]:
    config = {"model": {"id": "tiny"}, "data": {"train": "rows.jsonl"}, **changes}
    return RunConfig.model_validate(config).model_dump(mode="json", by_alias=True)


IDENTITY = Identity(_config(), "b" * 64, "d" * 64)


def _tensors(step: int) -> dict[str, Tensors]:
    draw = torch.Generator().manual_seed(step)
    return {
        "layer.lora_A": {
            "weight": torch.randn(4, 8, generator=draw),
            "exp_avg": torch.randn(4, 8, generator=draw) * 1e-30,
            "step": torch.tensor(float(step)),
        },
        "layer.lora_B": {
            "weight": torch.randn(8, 4, generator=draw),
            "state1": torch.randint(0, 256, (32,), dtype=torch.uint8, generator=draw),
        },
    }


def _state(step: int) -> Iterator[tuple[str, Tensors]]:
    yield from _tensors(step).items()


def _run(home: str) -> Run:
    return Run(home, "20260101-000000-lora-0a1b")


def _saver(run: Run, events: list[tuple[str, str]] | None = None, **block: Any) -> CheckpointSaver:
    said = events if events is not None else []
    block = {"keep_last": 99, "retry_s": 0.0, **block}
    return CheckpointSaver(run, ALONE, IDENTITY, CheckpointBlock(**block), lambda *event: said.append(event))


def _save(run: Run, *steps: int, metrics: tuple[float | None, ...] = (), **block: Any) -> list[Path]:
    saver = _saver(run, **block)
    for number, step in enumerate(steps):
        extra = {"metric": metrics[number] if metrics else None}
        saver.save(step, _state(step), extra, lambda: None)
    saver.wait()
    saver.close()
    return [Path(checkpoint_index.directory_of(run.uri, step)) for step in steps]


def _find(run: Run, cache: Path) -> tuple[Checkpoint | None, list[str]]:
    return newest_checkpoint(run.uri, IDENTITY, ALONE, cache)


def _holds(found: Checkpoint | None, step: int) -> bool:
    assert found is not None
    with found:
        wanted = _tensors(step)
        read = {name: found.read(name) for name in found.names}
        same = read.keys() == wanted.keys() and all(
            read[name].keys() == wanted[name].keys()
            and all(torch.equal(read[name][key], wanted[name][key]) for key in wanted[name])
            for name in wanted
        )
        return found.step == step and same


def _steps_left(run: Run) -> list[int]:
    return checkpoint_index.steps_of(run.uri)


def test_a_checkpoint_comes_back_bit_for_bit_with_its_scalars(home: str, tmp_path: Path) -> None:
    run, tensors = _run(home), _tensors(10)
    saver = _saver(run)
    extra = {"best": 0.1 + 0.2, "best_step": 7, "metric": None, "loss_scale": float("inf")}
    saver.save(10, iter(tensors.items()), extra, lambda: None)
    saver.close()
    found, passed_over = _find(run, tmp_path / "cache")
    assert found is not None and passed_over == []
    with found:
        assert (found.step, found.extra, found.names) == (10, extra, ("layer.lora_A", "layer.lora_B"))
        for name, parts in tensors.items():
            read = found.read(name)
            assert read.keys() == parts.keys()
            for key, tensor in parts.items():
                assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor)


def test_the_cache_holds_nothing_when_a_checkpoint_is_closed(home: str, tmp_path: Path) -> None:
    run, cache = _run(home), tmp_path / "cache"
    _save(run, 3)
    found, _ = _find(run, cache)
    assert _holds(found, 3)
    assert [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


def test_what_was_read_is_memory_of_its_own(home: str, tmp_path: Path) -> None:
    run = _run(home)
    _save(run, 3)
    found, _ = _find(run, tmp_path)
    assert found is not None
    found.read("layer.lora_A")["weight"].zero_()
    kept = found.read("layer.lora_A")["weight"]
    found.close()
    assert torch.equal(kept, _tensors(3)["layer.lora_A"]["weight"])


def test_the_snapshot_is_of_the_moment_of_saving_whatever_training_does_next(tmp_path: Path) -> None:
    run, tensors, moved = _run(str(tmp_path)), _tensors(5), threading.Event()
    saver = _saver(run)
    saver.save(5, iter(tensors.items()), {}, lambda: _demand(moved.wait(PATIENT_S)))
    for parts in tensors.values():
        for tensor in parts.values():
            tensor.zero_()
    moved.set()
    saver.close()
    assert _holds(_find(run, tmp_path)[0], 5)


def test_logs_are_flushed_before_anything_of_the_checkpoint_is_there(home: str) -> None:
    run, seen = _run(home), []
    saver = _saver(run)
    saver.save(5, _state(5), {}, lambda: seen.append(storage.list_names(run.path("checkpoints", "00000005"))))
    saver.close()
    assert seen == [[]] and newest_step(run.uri) == 5


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    run, go_on, second_began = _run(str(tmp_path)), threading.Event(), threading.Event()
    saver = _saver(run)

    def state() -> Iterator[tuple[str, Tensors]]:
        second_began.set()
        assert newest_step(run.uri) == 5, "the first one is whole before the second looks at the weights"
        yield from _state(6)

    saver.save(5, _state(5), {}, lambda: _demand(go_on.wait(PATIENT_S)))
    second = threading.Thread(target=lambda: saver.save(6, state(), {}, lambda: None))
    second.start()
    assert not second_began.wait(0.05)
    go_on.set()
    second.join()
    saver.close()
    assert _steps_left(run) == [5, 6]


def test_a_run_without_checkpoints_has_none(home: str, tmp_path: Path) -> None:
    assert _find(_run(home), tmp_path) == (None, [])
    assert newest_step(_run(home).uri) is None


def test_ten_is_newer_than_nine_and_a_hundred_million_than_both(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    _save(run, 9, 10, 100_000_000)
    assert _holds(_find(run, tmp_path)[0], 100_000_000)
    assert newest_step(run.uri) == 100_000_000


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def _flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = min(len(data) - 1, int(len(data) * share))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "deleted": None,
    **{f"cut at {share:.0%}": _cut(share) for share in (0, 0.01, 0.3, 0.6, 0.99)},
    **{f"flipped at {share:.0%}": _flipped(share) for share in (0, 0.02, 0.4, 0.8, 1)},
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b" x",
    "empty object": lambda data: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_newest_one_that_is_damaged_is_passed_over_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes] | None
) -> None:
    monkeypatch.setattr(checkpoint_index, "SHARD_BYTES", 64)  # several files
    run = _run(str(tmp_path))
    files = sorted(_save(run, 5, 10)[1].iterdir())
    assert len(files) > 3
    for file in files:
        before = file.read_bytes()
        file.unlink()
        if damage:
            file.write_bytes(damage(before))
        found, passed_over = _find(run, tmp_path)
        assert _holds(found, 5), file
        (line,) = passed_over
        assert "00000010" in line and file.name in line and "passed over" in line
        assert isinstance(why := checkpoint_at(run.uri, 10, IDENTITY, ALONE, tmp_path), str) and file.name in why
        file.write_bytes(before)
    assert _holds(_find(run, tmp_path)[0], 10)


def test_damage_on_s3_is_told_from_an_outage(s3_home: str, tmp_path: Path) -> None:
    run = _run(s3_home)
    _save(run, 5, 10)
    (shard,) = (name for name in storage.list_names(run.path("checkpoints", "00000010")) if "safetensors" in name)
    uri = run.path("checkpoints", "00000010", shard)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-1])
    found, passed_over = _find(run, tmp_path)
    assert _holds(found, 5) and shard in passed_over[0]
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    for directory in _save(run, 5, 10):
        next(directory.glob("*.safetensors")).unlink()
    found, passed_over = _find(run, tmp_path)
    assert found is None and ["00000010" in passed_over[0], "00000005" in passed_over[1]] == [True, True]


def test_a_store_that_stays_away_is_an_error_and_never_a_start_from_nothing(
    s3_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(s3_home)
    _save(run, 5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="could not be listed"):
        newest_checkpoint(run.uri, IDENTITY, ALONE, tmp_path, retry_s=0)


def test_another_trainings_checkpoint_is_refused_with_every_difference(home: str, tmp_path: Path) -> None:
    run = _run(home)
    _save(run, 5)
    other = Identity(_config(optim={"lr": 0.001}, seed=7), "b" * 64, "e" * 64)
    with pytest.raises(ConfigError) as caught:
        newest_checkpoint(run.uri, other, ALONE, tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:4] == [
        "optim.lr: 0.0002 there, 0.001 here",
        "seed: 0 there, 7 here",
        "digest of the training data: dddddddddddd there, eeeeeeeeeeee here",
    ]
    assert "loray train --resume" in lines[4]


def test_what_does_not_change_what_is_learnt_is_no_difference() -> None:
    other = _config(
        scale={"workers": 4, "strategy": "zero3"},
        memory={"micro": 1, "checkpoint_activations": True},
        checkpoint={"every": {"steps": 1}, "retry_s": 1.0},
        evaluate={"at_start": True},
        stop={"patience": 3},
        publish="tickets",
        model={"id": "/elsewhere/tiny"},
        data={"train": "/elsewhere/rows.jsonl", "eval": "more.jsonl", "pack": "never"},
    )
    assert IDENTITY.differences(Identity(other, "b" * 64, "d" * 64)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"precision": "fp32"}, "precision: fp32 there, bf16 here"),
        ({"optim": {"max_steps": 9}}, "optim.max_steps: 9 there, nothing here"),
        ({"method": {"targets": ["q_proj"]}}, 'method.targets: ["q_proj"] there, all-linear here'),
        ({"data": {"train": "rows.jsonl", "seq_len": 64}}, "data.seq_len: 64 there, 1024 here"),
        ({"method": {"rank_pattern": {"q_proj": 4}}}, "method.rank_pattern.q_proj: 4 there, nothing here"),
    ],
)
def test_what_changes_what_is_learnt_is_named_field_by_field(change: dict[str, Any], line: str) -> None:
    assert line in IDENTITY.differences(Identity(_config(**change), "b" * 64, "d" * 64))


def test_a_step_that_is_saved_again_replaces_the_old_one_and_leaves_nothing_of_it(home: str, tmp_path: Path) -> None:
    run = _run(home)
    saver = _saver(run)
    saver.save(7, iter([("w", {"weight": torch.zeros(3)})]), {}, lambda: None)
    saver.close()
    _save(run, 7)
    found, passed_over = _find(run, tmp_path)
    assert _holds(found, 7) and passed_over == []
    assert len(storage.list_names(run.path("checkpoints", "00000007"))) == 2


def test_what_a_killed_attempt_left_of_the_same_step_is_not_taken_for_a_part(home: str, tmp_path: Path) -> None:
    run = _run(home)
    directory = run.path("checkpoints", "00000007")
    shard = "0123456789abcdef-00000-00000.safetensors"
    for name in ("part-00000-0123456789abcdef.json", shard, f".{shard}.0123456789ab.part"):
        storage.write_bytes(storage.join(directory, name), b"torn")
    _save(run, 7)
    assert _holds(_find(run, tmp_path)[0], 7)
    assert len(storage.list_names(directory)) == 2 and not list(Path(directory).glob(".*"))


def test_the_index_is_plain_json_that_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    (directory,) = _save(_run(str(tmp_path)), 3)
    index = json.loads((directory / "checkpoint.json").read_text())
    assert index["step"] == 3 and set(index["files"]) == {path.name for path in directory.glob("*.safetensors")}
    assert index["tensors"]["layer.lora_B"].keys() == {"weight", "state1"}
    assert index["identity"]["config"]["optim"]["lr"] == 0.0002
    assert {"workers", "torch threads", "processor", "torch"} <= index["made_on"].keys()


def test_a_checkpoint_says_why_going_on_is_not_bit_for_bit(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    _save(run, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found, _ = _find(run, tmp_path)
    finally:
        torch.set_num_threads(before)
    assert found is not None and found.changes == [f"torch threads: {before} there, {before + 1} here"]


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_pruning_keeps_the_newest(home: str, keep: int) -> None:
    run = _run(home)
    _save(run, 5, 10, 15, 100, keep_last=keep)
    assert _steps_left(run) == [5, 10, 15, 100][-keep:]


def test_pruning_keeps_the_best_beside_the_newest(home: str) -> None:
    run = _run(home)
    _save(run, 1, 2, 3, 4, 5, metrics=(0.9, 0.4, None, 0.5, 0.7), keep_last=1, keep_best=2)
    assert _steps_left(run) == [2, 4, 5]


@pytest.mark.parametrize(
    ("whole", "newest", "keep_last", "keep_best", "kept"),
    [
        ({1: None, 2: None, 3: None}, 3, 1, 0, {3}),
        ({1: 0.1, 2: 0.2, 3: None}, 3, 1, 1, {1, 3}),
        ({1: 0.1, 2: 0.1, 3: 0.1}, 3, 1, 1, {1, 3}),  # of equals the earlier one, as early stopping counts it
        ({1: float("nan"), 2: 0.5, 3: float("inf")}, 3, 1, 1, {2, 3}),
        ({1: None, 9: 0.0}, 1, 1, 1, {1}),  # 9: of an attempt that was not gone on from
        ({}, 4, 2, 2, {4}),
    ],
)
def test_what_is_kept_follows_from_steps_and_metrics(
    whole: dict[int, float | None], newest: int, keep_last: int, keep_best: int, kept: set[int]
) -> None:
    assert checkpoint_index.kept(whole, newest, keep_last, keep_best) == kept


def test_pruning_never_deletes_the_newest_whole_one_for_a_damaged_or_torn_one(tmp_path: Path) -> None:
    """An attempt left step 20 damaged and was killed in step 30; the next went on from 10 and keeps one checkpoint."""
    run = _run(str(tmp_path))
    _, damaged, torn = _save(run, 10, 20, 30)
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    (torn / "checkpoint.json").unlink()
    _save(run, 15, keep_last=1)
    found, passed_over = _find(run, tmp_path)
    assert _holds(found, 15)
    assert _steps_left(run) == [15, 30] and "00000030" in passed_over[0]  # 30 might have been being written
    _save(run, 35, keep_last=1)
    assert _steps_left(run) == [35]


def test_a_failed_upload_is_raised_in_the_training_thread_and_once_at_closing(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    events: list[tuple[str, str]] = []
    saver = _saver(run, events)
    saver.save(5, _state(5), {}, lambda: None)
    saver.wait()
    in_the_way = Path(run.path("checkpoints", "00000006"))
    in_the_way.write_text("a file where the directory should be")
    saver.save(6, _state(6), {}, lambda: None)
    with pytest.raises(StorageError, match="file is in the way"):
        saver.wait()
    with pytest.raises(StorageError, match="file is in the way"):
        saver.raise_if_failed()
    saver.close()  # it has been raised
    assert _holds(_find(run, tmp_path)[0], 5)

    unheard = _saver(run)
    unheard.save(6, _state(6), {}, lambda: None)
    with pytest.raises(StorageError, match="file is in the way"):
        unheard.close()


def test_an_error_that_is_not_of_storage_is_not_retried(tmp_path: Path) -> None:
    saver = _saver(_run(str(tmp_path)), retry_s=3600.0)

    def flush() -> None:
        raise ConfigError("a mistake of the caller")

    saver.save(5, _state(5), {}, flush)
    with pytest.raises(ConfigError, match="a mistake"):
        saver.wait()


def test_a_directory_that_cannot_be_written_is_no_outage_to_be_waited_out(tmp_path: Path) -> None:
    run, events = _run(str(tmp_path)), list[tuple[str, str]]()
    (tmp_path / "runs").write_text("a file where the directory should be")
    saver = _saver(run, events, retry_s=3600.0)
    saver.save(5, _state(5), {}, lambda: None)
    with pytest.raises(StorageError, match="in the way"):
        saver.wait()
    assert events == []


def test_parameters_are_dealt_evenly_in_bytes_and_each_exactly_once() -> None:
    def state() -> Iterator[tuple[str, Tensors]]:
        for number in range(40):
            yield f"p{number}", {"weight": torch.zeros(1 + number % 7, 10), "exp_avg": torch.zeros(1 + number % 7, 10)}

    dealt = [checkpoint_index.deal(state(), rank, 3) for rank in range(3)]
    names = [name for share, _ in dealt for name, _ in share]
    assert sorted(names) == sorted(f"p{number}" for number in range(40)) and dealt[0][1] == set(names)
    sizes = [sum(tensor.nbytes for _, parts in share for tensor in parts.values()) for share, _ in dealt]
    assert max(sizes) - min(sizes) <= 2 * 7 * 10 * 4  # the largest parameter


def test_shards_keep_to_their_size_and_give_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_index, "SHARD_BYTES", 100)
    share = [(f"p{n}", {"weight": torch.zeros(n), "exp_avg": torch.zeros(n)}) for n in (3, 50, 2, 10, 1)]
    total, seen = sum(2 * 4 * n for n in (3, 50, 2, 10, 1)), 0
    for shard in checkpoint_index.shards(share):
        size = sum(tensor.nbytes for tensor in shard.values())
        assert size <= 100 or len(shard) == 1
        seen += size
    assert seen == total and share == []


def test_our_writing_of_safetensors_is_what_the_library_reads() -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "long": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "double": torch.randn(2, 1, dtype=torch.float64),
        'a "name" ü/weight': torch.randn(4, 4),
    }
    read = safetensors.torch.load(b"".join(checkpoint_index.as_safetensors(tensors)))
    assert read.keys() == tensors.keys()
    assert all(read[key].dtype == t.dtype and torch.equal(read[key], t) for key, t in tensors.items())


def test_a_deletion_cut_short_is_not_taken_for_a_whole_checkpoint(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    first, _ = _save(run, 5, 10)
    (first / "checkpoint.json").unlink()  # which goes first
    assert newest_step(run.uri) == 10
    checkpoint_saver.prune(run.uri, 10, keep_last=2, keep_best=0)
    assert _steps_left(run) == [10]


def _demand(happened: bool) -> None:
    assert happened, f"not within {PATIENT_S:g} s"
