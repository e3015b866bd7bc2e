"""The watch of one worker, with real threads and files: it sees, writes and tells while the training thread hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service import storage
from service.errors import ConflictError, NotFoundError, StorageError
from service.logs import LogWriter, read_rows
from service.runs import Run
from service.training import stacks, watch
from service.training.ranklog import RankLog, log_names
from service.training.watch import Watch, look_pause
from tests.integration.waiting import wait_until

pytest_plugins = ("tests.s3_endpoint",)

DEADLINE_S = 30.0
NEVER_S = 3600.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch, in a tenth of the time."""
    for name in ("FLUSH_EVERY_S", "QUIET_S", "RETRY_EVERY_S"):
        monkeypatch.setattr(watch, name, getattr(watch, name) / 10)


@pytest.fixture
def run(home: str) -> Run:
    return Run.create(home, "tickets", "model: x\n", {})


@pytest.fixture
def local(tmp_path: Path) -> Run:
    """A run on a directory, for what does not depend on the storage."""
    return Run.create(str(tmp_path / "home"), "tickets", "model: x\n", {})


def _writers(run: Run, rank: int = 0) -> list[LogWriter]:
    return [LogWriter(run.path(kind), f"a1-r{rank}", NEVER_S) for kind in ("metrics", "ledger", "events")]


@contextmanager
def _watch(
    run: Run, writers: Sequence[LogWriter] = (), *, rank: int = 0, stall_s: float = NEVER_S, retry_s: float = NEVER_S
) -> Iterator[Watch]:
    log = RankLog(run, rank, 1)
    watching = Watch(run, rank, 1, log, writers, stall_s, retry_s)
    try:
        yield watching
    finally:
        watching.close()
        log.close()


@dataclass
class _Hanging:
    """A worker whose training thread hangs in a socket until it is let go: in C, without the GIL, as in a collective."""

    run: Run
    rank: int = 0
    stall_s: float = NEVER_S
    writers: list[LogWriter] = field(default_factory=list)
    hangs: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> _Hanging:
        self._here, self._there = socket.socketpair()
        self._thread = threading.Thread(target=self._train, name=f"training-{self.rank}")
        self._thread.start()
        assert self.hangs.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._thread.join()
        self._there.close()

    def _train(self) -> None:
        with _watch(self.run, self.writers, rank=self.rank, stall_s=self.stall_s) as self.watch:
            self.watch.moved("step 3, micro-batch 1 of 2")
            self.hangs.set()
            self._receive_from_a_peer()

    def _receive_from_a_peer(self) -> None:
        assert self._there.recv(1) == b""


def _log_text(run: Run) -> str:
    return "".join(storage.read_bytes(run.path("logs", name)).decode() for name in log_names(run))


def _until(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, what, DEADLINE_S, every_s=0.02)


def test_a_stop_that_was_asked_for_before_is_seen_at_once(run: Run) -> None:
    run.request_stop("too late")
    with _watch(run) as watching:
        assert watching.stop_reason == "too late"


def test_a_stop_is_seen_while_the_training_thread_hangs_and_stays_seen(run: Run) -> None:
    with _Hanging(run) as worker:
        assert worker.watch.stop_reason is None
        run.request_stop("lunch")
        _until(lambda: worker.watch.stop_reason == "lunch", "the stop is seen")
        run.clear_stop()
    assert worker.watch.stop_reason == "lunch"


def test_looking_takes_a_hundredth_of_the_time_between_a_twentieth_of_a_second_and_five() -> None:
    assert [look_pause(cost) for cost in (0.0, 20e-6, 0.002, 0.03, 1.0)] == [0.05, 0.05, 0.2, 3.0, 5.0]


def test_rows_are_readable_while_the_training_thread_hangs(run: Run) -> None:
    writers = _writers(run)
    for writer in writers:
        writer.append({"step": 1})  # the first row of a writer may be written at once
    with _Hanging(run, writers=writers):
        writers[0].append({"step": 2, "train/loss": 3.0})
        writers[1].append({"step": 2, "ids": [4]})
        _until(lambda: len(run.metrics()) == 2 and len(read_rows(run.path("ledger"))) == 2, "both rows are readable")


def test_every_worker_of_a_hanging_run_answers_a_request_for_stacks(run: Run) -> None:
    with _Hanging(run, rank=0), _Hanging(run, rank=1):
        id = stacks.request(run)
        answers = stacks.await_answers(run, id, workers=2, timeout_s=DEADLINE_S)
        stacks.withdraw(run, id)
    assert [(answer.attempt, answer.rank, answer.id) for answer in answers] == [(1, 0, id), (1, 1, id)]
    for answer in answers:
        head, threads = answer.text.split("\n\n", 1)
        assert f"pid {os.getpid()} on {socket.gethostname()}" in head
        assert "doing: step 3, micro-batch 1 of 2, since " in head
        first = threads.split("\n\n")[0]
        assert first.startswith(f"training-{answer.rank} (trains):") and "_receive_from_a_peer" in first
        assert "MainThread:" in threads and "watch:" in threads
    assert stacks.requested(run) is None


def test_a_request_is_answered_once_and_the_next_one_again(local: Run) -> None:
    with _Hanging(local):
        first = stacks.request(local)
        _until(lambda: len(stacks.read(local, first)) == 1, "the first answer")
        file = storage.local_path(stacks.uri(local, 1, 0, first))
        file.unlink()
        second = stacks.request(local)
        _until(lambda: len(stacks.read(local, second)) == 1, "the second answer")
        assert not file.exists()


def test_an_older_request_is_not_withdrawn_in_place_of_a_newer(local: Run) -> None:
    first, second = stacks.request(local), stacks.request(local)
    stacks.withdraw(local, first)
    assert stacks.requested(local) == second
    stacks.withdraw(local, second)
    assert stacks.requested(local) is None


def test_a_request_that_is_no_id_is_not_made_a_path(local: Run) -> None:
    storage.write_bytes(local.path("stacks", "request"), b"../../escape")
    assert stacks.requested(local) is None


def test_answers_are_awaited_until_none_follows_when_the_number_of_workers_is_unknown(local: Run) -> None:
    with _Hanging(local):
        id = stacks.request(local)
        answers = stacks.await_answers(local, id, workers=None, timeout_s=DEADLINE_S, quiet_s=0.5)
    assert [answer.rank for answer in answers] == [0]
    assert stacks.await_answers(local, "none", workers=1, timeout_s=0.2) == []


def test_a_stall_is_told_once_with_all_stacks_in_the_log_the_events_and_a_file(run: Run) -> None:
    with _Hanging(run, writers=_writers(run), stall_s=0.2):
        _until(lambda: len(run.events()) == 1, "the event")
        _until(lambda: "stalled: worker 0" in _log_text(run), "the line in the log")
        _until(lambda: len(stacks.read(run, "stall")) == 1, "the stacks")
    (event,) = run.events()
    assert event["kind"] == "stalled" and event["text"].startswith("worker 0 has not moved for ")
    assert "step 3, micro-batch 1 of 2" in event["text"]
    (written,) = stacks.read(run)
    assert "_receive_from_a_peer" in written.text


def test_a_second_stall_is_told_again_and_the_end_of_the_first_too(local: Run) -> None:
    with _watch(local, _writers(local), stall_s=0.2) as watching:
        for number, what in enumerate(("step 1", "step 2"), start=1):
            watching.moved(what)
            _until(lambda number=number: len(local.events()) == number, f"stall {number}")  # type: ignore[misc]
    assert [written.id for written in stacks.read(local)] == ["stall", "stall-2"]
    assert "moving again, after " in _log_text(local)


def test_moving_is_no_stall(local: Run) -> None:
    with _watch(local, _writers(local), stall_s=1.0) as watching:
        pause = threading.Event()
        for step in range(60):
            watching.moved(f"step {step}")
            pause.wait(0.025)
    assert local.events() == [] and stacks.read(local) == []


def test_where_a_killed_worker_was_is_in_its_log(local: Run) -> None:
    script = (
        "import socket, sys\n"
        "from service.runs import Run\n"
        "from service.training.ranklog import RankLog\n"
        "from service.training.watch import Watch\n"
        "run = Run(sys.argv[1], sys.argv[2])\n"
        "log = RankLog(run, 3, 1)\n"
        "watch = Watch(run, 3, 1, log, (), 600.0, 300.0)\n"
        "def receive_from_a_dead_peer():\n"
        "    here, there = socket.socketpair()\n"
        "    there.recv(1)\n"
        "log.say('step 11/20')\n"
        "watch.moved('step 12, micro-batch 2 of 2')\n"
        "receive_from_a_dead_peer()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, local.home, local.id])
    try:
        _until(lambda: "receive_from_a_dead_peer" in _log_text(local), "the log is kept when the worker goes quiet")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = _log_text(local)
    assert "step 11/20" in text and "now: step 12, micro-batch 2 of 2, since " in text


def test_a_log_that_ended_well_ends_with_its_last_line(local: Run) -> None:
    with _Hanging(local):
        _until(lambda: "now: step 3" in _log_text(local), "the log is kept when the worker goes quiet")
    assert "now: " not in _log_text(local)


@contextmanager
def _file_in_the_way(run: Run, kind: str) -> Iterator[None]:
    way = storage.local_path(run.path(kind))
    way.write_text("a file in the way")
    yield
    way.unlink()


def test_storage_that_is_away_for_a_while_is_said_and_loses_no_row(local: Run) -> None:
    writers = _writers(local)
    with _Hanging(local, writers=writers) as worker:
        with _file_in_the_way(local, "ledger"):
            _append(writers[1], {"step": 1, "ids": [7]})
            _until(lambda: "storage fails while writing the metrics" in _log_text(local), "the beginning is said")
            worker.watch.raise_if_failed()
            _append(writers[1], {"step": 2, "ids": [8]})
        _until(lambda: "storage works again after " in _log_text(local), "the end is said")
        worker.watch.raise_if_failed()
    assert local.ledger() == [{"step": 1, "ids": [7]}, {"step": 2, "ids": [8]}]
    assert _log_text(local).count("storage fails") == 1


def _append(writer: LogWriter, row: dict[str, Any]) -> None:
    """What the loop does. A writer's first row may be written at once, and then meets the trouble here."""
    with suppress(StorageError):
        writer.append(row)


def test_storage_that_stays_away_is_an_error_of_the_run_after_retry_s(local: Run) -> None:
    writers = _writers(local)
    log = RankLog(local, 2, 1)
    watching = Watch(local, 2, 1, log, writers, NEVER_S, retry_s=0.6)
    with _file_in_the_way(local, "metrics"):
        _append(writers[0], {"step": 1, "train/loss": 1.0})
        _until(lambda: _raised(watching) is not None, "the failure is raised")
        error = _raised(watching)
        assert "worker 2: storage has failed for " in str(error) and "checkpoint.retry_s is 0.6" in str(error)
        assert "in the way" in str(error) and f"--resume {local.id}" in str(error)
        with pytest.raises(StorageError, match="writing the metrics"):
            watching.close()
    log.close()


def _raised(watching: Watch) -> StorageError | None:
    try:
        watching.raise_if_failed()
    except StorageError as error:
        return error
    return None


def test_closing_waits_for_storage_that_comes_back(local: Run) -> None:
    writers = _writers(local)
    log = RankLog(local, 0, 1)
    watching = Watch(local, 0, 1, log, writers, NEVER_S, NEVER_S)
    with _file_in_the_way(local, "metrics"):
        _append(writers[0], {"step": 1, "train/loss": 1.0})
        closing = threading.Thread(target=watching.close)
        closing.start()
        _until(lambda: "storage fails" in _log_text(local), "closing has met the trouble")
        assert closing.is_alive()
    closing.join(DEADLINE_S)
    assert not closing.is_alive() and local.metrics() == [{"step": 1, "train/loss": 1.0}]
    log.close()


def test_storage_that_cannot_be_reached_at_all_is_an_error_after_retry_s(
    s3_home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(s3_home, "tickets", "model: x\n", {})
    log = RankLog(run, 0, 1)
    watching = Watch(run, 0, 1, log, (), NEVER_S, retry_s=0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
            _until(lambda: _raised(watching) is not None, "the failure is raised")
    assert "looking for a" in str(_raised(watching)) or "writing" in str(_raised(watching))
    watching.close()
    log.close()
    assert "storage fails while " in _log_text(run)


def test_another_writer_of_the_same_name_ends_the_run_at_once(local: Run) -> None:
    writers, rivals = _writers(local), _writers(local)
    log = RankLog(local, 0, 1)
    rivals[0].append({"step": 1})
    rivals[0].flush()
    watching = Watch(local, 0, 1, log, writers, NEVER_S, NEVER_S)
    with suppress(ConflictError):  # a first row may be written at once
        writers[0].append({"step": 9})
    _until(lambda: _conflict(watching), "the conflict is raised in the training thread")
    with pytest.raises(ConflictError, match="another live writer"):
        watching.close()
    log.close()


def _conflict(watching: Watch) -> bool:
    try:
        watching.raise_if_failed()
    except ConflictError:
        return True
    return False


def test_closing_writes_everything_once_more(run: Run) -> None:
    writers = _writers(run)
    with _watch(run, writers) as watching:
        for writer in writers:
            writer.append({"time": 1.0, "step": 1, "ids": [1], "kind": "ready", "text": ""})
        watching._log.say("the last line")
    assert len(run.metrics()) == len(run.ledger()) == len(run.events()) == 1
    assert _log_text(run).endswith("the last line\n")
    with pytest.raises(NotFoundError):
        storage.read_bytes(run.path("stacks", "request"))
