"""Checkpoints and logs while storage goes away, comes back, fills up, or the process is killed: with real ones of each.

The S3 endpoint is moto's, on a port of its own, where it is really shut down and started again.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from service import s3, storage
from service.config import CheckpointBlock
from service.errors import StorageError
from service.logs import LogWriter, read_rows
from service.training.checkpoint import CheckpointSaver, newest_checkpoint, newest_step
from service.training.strategy import World
from tests.integration.checkpoint_worker import IDENTITY, run_at, tensors_at
from tests.integration.stoppable_endpoint import Endpoint, endpoint

__all__ = ["endpoint"]  # a fixture

pytest_plugins = ("tests.s3_endpoint",)

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0


@dataclass
class Events:
    """What the saver said; `away` and `back` are up once it has said so."""

    said: list[tuple[str, str]] = field(default_factory=list)
    away: threading.Event = field(default_factory=threading.Event)

    def __call__(self, kind: str, text: str) -> None:
        self.said.append((kind, text))
        if kind == "storage_away":
            self.away.set()

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.said]


def _saver(home: str, events: Events, retry_s: float) -> CheckpointSaver:
    return CheckpointSaver(run_at(home), World(), IDENTITY, CheckpointBlock(retry_s=retry_s, keep_last=9), events)


def _save(saver: CheckpointSaver, step: int, before_visible: Callable[[], None] = lambda: None) -> None:
    saver.save(step, iter(tensors_at(step).items()), {}, before_visible)


def _resumed_step(home: str, cache: Path) -> int | None:
    """The step of the newest whole checkpoint, all of whose tensors are as they should be."""
    found, _ = newest_checkpoint(run_at(home).uri, IDENTITY, World(), cache, retry_s=0)
    if found is None:
        return None
    with found:
        for name, tensors in tensors_at(found.step).items():
            read = found.read(name)
            assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
        return found.step


def test_an_endpoint_that_is_down_for_a_while_delays_a_checkpoint_and_not_training(
    endpoint: Endpoint, s3_home: str, tmp_path: Path
) -> None:
    events = Events()
    saver = _saver(s3_home, events, retry_s=DEADLINE_S)
    log = LogWriter(run_at(s3_home).path("metrics"), "a1-r0", flush_every_s=math.inf)
    _save(saver, 5)
    saver.wait()
    endpoint.stop()

    weights = {name: tensors["weight"].requires_grad_() for name, tensors in tensors_at(10).items()}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    state = ((name, {"weight": w, "step": torch.tensor(10.0)}) for name, w in weights.items())
    log.append({"step": 10})
    saver.save(10, state, {}, log.flush)
    assert events.away.wait(DEADLINE_S)
    for step in (11, 12, 13):  # training goes on, and changes what was just saved
        loss = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        log.append({"step": step})
        saver.raise_if_failed()
    assert events.kinds == ["checkpoint", "storage_away"]

    endpoint.start()
    saver.close()
    assert events.kinds == ["checkpoint", "storage_away", "storage_back", "checkpoint"]
    assert "step 10" in events.said[1][1] and "AWS_ENDPOINT_URL" in events.said[1][1]
    assert _resumed_step(s3_home, tmp_path) == 10
    assert {"step": 10} in [row for _, row in read_rows(log.uri)]


def test_an_endpoint_that_stays_down_fails_the_run_and_leaves_the_checkpoint_before(
    endpoint: Endpoint, s3_home: str, tmp_path: Path
) -> None:
    events = Events()
    saver = _saver(s3_home, events, retry_s=1.0)
    _save(saver, 5)
    saver.wait()
    endpoint.stop()
    _save(saver, 10)
    with pytest.raises(StorageError, match=r"checkpoint of step 10: storage was away .*retry_s allows 1"):
        saver.wait()
    with pytest.raises(StorageError, match="step 10"):
        saver.raise_if_failed()
    saver.close()
    assert events.kinds == ["checkpoint", "storage_away"]
    endpoint.start()
    assert newest_step(run_at(s3_home).uri) == 5 and _resumed_step(s3_home, tmp_path) == 5


def test_an_endpoint_that_goes_down_between_the_parts_of_a_large_file_gets_it_again_from_its_first_byte(
    endpoint: Endpoint, s3_home: str, tmp_path: Path
) -> None:
    sent: list[str] = []
    stopped = threading.Event()

    def stop() -> None:
        endpoint.stop()
        stopped.set()

    def stop_at_the_third_part(method: str, path: str) -> None:
        if method == "PUT" and "partNumber" in path:
            sent.append(path)
            if len(sent) == 3:
                threading.Thread(target=stop).start()

    endpoint.before = stop_at_the_third_part
    large = torch.randn(s3.SINGLE_PUT_BYTES // 4 + 3_000_000)
    events = Events()
    saver = _saver(s3_home, events, retry_s=DEADLINE_S)
    saver.save(5, iter([("large", {"weight": large})]), {}, lambda: None)
    assert events.away.wait(DEADLINE_S) and stopped.wait(DEADLINE_S)
    endpoint.start()
    assert newest_step(run_at(s3_home).uri) is None
    saver.close()
    found, _ = newest_checkpoint(run_at(s3_home).uri, IDENTITY, World(), tmp_path)
    assert found is not None
    with found:
        assert torch.equal(found.read("large")["weight"], large)
    assert len({path.partition("?")[2] for path in sent}) > 5  # parts of two uploads


def test_resuming_waits_for_an_endpoint_that_is_down_for_a_while(
    endpoint: Endpoint, s3_home: str, tmp_path: Path
) -> None:
    saver = _saver(s3_home, Events(), retry_s=0)
    _save(saver, 5)
    saver.close()
    endpoint.stop()
    events = Events()
    with ThreadPoolExecutor(1) as pool:
        resuming = pool.submit(newest_checkpoint, run_at(s3_home).uri, IDENTITY, World(), tmp_path, event=events)
        assert events.away.wait(DEADLINE_S)
        endpoint.start()
        found, passed_over = resuming.result()
    assert found is not None and found.step == 5 and passed_over == []
    assert events.kinds == ["storage_away", "storage_back"]
    found.close()


def test_a_row_is_appended_at_once_while_a_flush_waits_for_storage(endpoint: Endpoint, s3_home: str) -> None:
    log = LogWriter(storage.join(s3_home, "metrics"), "w", flush_every_s=math.inf)
    arrived, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and not go_on.is_set():
            arrived.set()
            go_on.wait(DEADLINE_S)

    endpoint.before = hold
    log.append({"n": 0})
    flushing = threading.Thread(target=log.flush)
    flushing.start()
    assert arrived.wait(DEADLINE_S)
    for n in range(1, 100):
        log.append({"n": n})
    assert flushing.is_alive()
    go_on.set()
    flushing.join()
    log.close()
    assert [row["n"] for _, row in read_rows(log.uri)] == list(range(100))


def test_an_endpoint_that_accepts_and_never_answers_is_noticed(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for ask in (storage.read_bytes, storage.list_names, lambda uri: storage.write_bytes(uri, b"")):
            with pytest.raises(StorageError, match="no answer within"):
                ask(storage.join(s3_home, "x"))


class Worker:
    """A real process that answers commands."""

    def __init__(self, prefix: Iterable[str] = (), **environment: str) -> None:
        command = [*prefix, sys.executable, "-m", "tests.integration.checkpoint_worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdin=pipe, stdout=pipe, text=True
        )

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended with code {self.process.wait()}"
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        self.tell(**command)
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.end()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Worker]]:
    """Two gloo processes that live for the module."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [Worker(RANK=str(rank), **where) for rank in range(2)]
    yield started
    for each in started:
        each.end()


def _both(pair: list[Worker], **command: Any) -> list[Any]:
    for each in pair:
        each.tell(**command)
    return [each.answer() for each in pair]


def test_killed_at_any_rename_or_deletion_the_newest_checkpoint_is_whole(worker: Worker, tmp_path: Path) -> None:
    """And another attempt at the same step is not disturbed by what was left."""
    outcomes = worker.ask(do="killed_everywhere", home=str(tmp_path / "home"), cache=str(tmp_path))["outcomes"]
    assert [outcome["killed"] for outcome in outcomes] == [True] * (len(outcomes) - 1) + [False]
    steps = [outcome["step"] for outcome in outcomes]
    assert steps == sorted(steps) and steps.count(5) > 6 and steps.count(10) > 2
    for outcome in outcomes:
        assert outcome["same"] and outcome["half"] == []
        assert outcome["after"] == {"step": 10, "passed_over": [], "same": True} and outcome["left"] == 2
        torn = outcome["step"] == 5
        assert all("00000010" in line and "checkpoint.json" in line for line in outcome["passed_over"])
        assert torn or outcome["passed_over"] == []


def test_killed_while_a_shard_goes_up_nothing_of_the_checkpoint_is_visible(
    endpoint: Endpoint, s3_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def hold_the_third_shard(method: str, path: str) -> None:
        if method == "PUT" and re.search(r"00000010/.*-00002\.safetensors", path):
            arrived.set()
            go_on.wait(DEADLINE_S)

    killed = Worker()
    assert killed.ask(do="save", home=s3_home, step=5)["events"] == ["checkpoint"]
    endpoint.before = hold_the_third_shard
    killed.tell(do="save", home=s3_home, step=10, shard_bytes=5000)
    assert arrived.wait(DEADLINE_S)
    killed.process.kill()
    killed.process.wait()
    go_on.set()
    killed.end()
    endpoint.before = lambda method, path: None
    assert newest_step(run_at(s3_home).uri) == 5 and _resumed_step(s3_home, tmp_path) == 5
    saver = _saver(s3_home, Events(), retry_s=0)
    _save(saver, 10)
    saver.close()
    assert _resumed_step(s3_home, tmp_path) == 10
    assert len(storage.list_names(run_at(s3_home).path("checkpoints", "00000010"))) == 2


def test_two_workers_write_half_each_and_any_number_goes_on_from_it(
    pair: list[Worker], home: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    _both(pair, do="environment", values=environment)
    assert [answer["events"] for answer in _both(pair, do="save", home=home, step=10)] == [["checkpoint"], []]
    shards = [n for n in storage.list_names(run_at(home).path("checkpoints", "00000010")) if "safetensors" in n]
    sizes = [storage.size(run_at(home).path("checkpoints", "00000010", name)) for name in shards]
    assert len(shards) == 2 and abs(sizes[0] - sizes[1]) < 100
    same = {"step": 10, "passed_over": [], "same": True}
    assert _both(pair, do="resume", home=home, cache=str(tmp_path / "cache")) == [same, same]
    assert _resumed_step(home, tmp_path / "cache") == 10
    saver = _saver(home, Events(), retry_s=0)
    _save(saver, 20)
    saver.close()
    answers = _both(pair, do="resume", home=home, cache=str(tmp_path / "cache"))
    assert answers == [{**same, "step": 20}] * 2
    assert not list((tmp_path / "cache").rglob("*safetensors*"))


def test_workers_of_a_node_fetch_each_file_once(
    pair: list[Worker], endpoint: Endpoint, s3_home: str, tmp_path: Path
) -> None:
    _both(pair, do="environment", values={n: v for n, v in os.environ.items() if n.startswith("AWS_")})
    _both(pair, do="save", home=s3_home, step=10, shard_bytes=10_000)
    fetched: list[str] = []
    endpoint.before = lambda method, path: fetched.append(path) if method == "GET" and "safetensors?" in path else None
    assert [answer["same"] for answer in _both(pair, do="resume", home=s3_home, cache=str(tmp_path))] == [True, True]
    assert len(fetched) == len(set(fetched)) >= 4


def test_what_one_worker_finds_damaged_all_pass_over(pair: list[Worker], tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    _both(pair, do="save", home=home, step=5)
    _both(pair, do="save", home=home, step=10)
    shards = sorted(Path(run_at(home).path("checkpoints", "00000010")).glob("*.safetensors"))
    for damaged, finder in zip(shards, (0, 1), strict=True):  # each worker verifies one of the two
        before = damaged.read_bytes()
        damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        answers = _both(pair, do="resume", home=home, cache=str(tmp_path))
        damaged.write_bytes(before)
        assert [answer["step"] for answer in answers] == [5, 5]
        assert damaged.name in answers[finder]["passed_over"][0]
        assert "another worker" in answers[1 - finder]["passed_over"][0]


def test_another_trainings_checkpoint_is_refused_by_all_workers(pair: list[Worker], tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    _both(pair, do="save", home=home, step=5)
    answers = _both(pair, do="resume", home=home, cache=str(tmp_path), base_digest="e" * 64)
    assert all("ConfigError" in answer["error"] and "base model" in answer["error"] for answer in answers)


def test_a_share_that_never_arrives_is_named_and_the_checkpoint_before_stays(
    pair: list[Worker], tmp_path: Path
) -> None:
    home = str(tmp_path / "home")
    _both(pair, do="save", home=home, step=5)
    first, second = _both(pair, do="save", home=home, step=10, fail_on=1)
    assert "step 10 is not whole: worker 1 did not arrive" in first["error"] and "this worker fails" in second["error"]
    assert _resumed_step(home, tmp_path) == 5


def test_a_disk_without_room_is_refused_with_both_numbers_before_anything_is_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=16k none "$0" || exit 77; exec "$@"'
    full = Worker(["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(disk)])
    full.tell(do="save", home=str(disk), step=5, shard_bytes=10_000)
    full.tell(do="resume", home=str(disk), cache=str(tmp_path))
    assert full.process.stdout is not None
    lines = [full.process.stdout.readline() for _ in range(2)]
    full.end()
    if not lines[0]:
        pytest.skip("this system mounts nothing in a namespace of its own: run as root, or allow user namespaces")
    error = json.loads(lines[0])["error"]
    assert "StorageError" in error and "32,032 bytes of the checkpoint are still to come, 16,384 are free" in error
    assert json.loads(lines[1]) == {"step": None, "passed_over": []}
