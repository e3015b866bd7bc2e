"""What a worker says: kept whole however long it is, written only when there is something new, read in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from service import storage
from service.errors import StorageError
from service.runs import Run
from service.training.ranklog import RankLog, log_names

pytest_plugins = ("tests.s3_endpoint",)


def _run(home: str) -> Run:
    return Run.create(home, "tickets", "model: x\n", {})


@contextmanager
def _log(run: Run, rank: int = 0, attempt: int = 1, segment_bytes: int = 300) -> Iterator[RankLog]:
    log = RankLog(run, rank, attempt, segment_bytes)
    try:
        yield log
    finally:
        log.close()


def _text(run: Run) -> str:
    return "".join(storage.read_bytes(run.path("logs", name)).decode() for name in log_names(run))


def test_a_long_log_is_cut_into_parts_and_loses_nothing(home: str) -> None:
    run = _run(home)
    with _log(run) as log:
        for number in range(40):
            log.say(f"line {number}.")
            if number % 7 == 0:
                log.keep(f"now: at {number}\n")
    names = log_names(run)
    assert names[:3] == ["a1-rank-00000.log", "a1-rank-00000.part-0001.log", "a1-rank-00000.part-0002.log"]
    assert names == storage.list_names(run.path("logs")) and len(names) > 5
    assert [line.rsplit(" ", 2)[-1] for line in _text(run).splitlines()] == [f"{number}." for number in range(40)]


def test_what_is_final_is_not_held_any_more(tmp_path: Path) -> None:
    with _log(_run(str(tmp_path))) as log:
        for number in range(40):
            log.say(f"line {number}.")
        log.keep()
        full, last = log._text.segments()
        assert full == [] and len(last) < 300


def test_nothing_is_written_where_nothing_has_changed(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    file = tmp_path / "runs" / run.id / "logs" / "a1-rank-00000.log"
    with _log(run) as log:
        log.keep()
        assert not file.exists()
        log.say("something")
        log.keep("now: step 1\n")
        first = file.stat()
        log.keep("now: step 1\n")
        assert file.stat().st_ino == first.st_ino  # every write is a new file renamed over the old one
        log.keep("now: step 2\n")
        assert file.stat().st_ino != first.st_ino
        assert file.read_text().endswith("now: step 2\n")
    assert file.read_text().endswith("something\n")


def test_logs_are_in_order_of_attempt_rank_and_part(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    wanted = ["a2-rank-00000.log", "a2-rank-00000.part-0001.log", "a2-rank-00001.log", "a10-rank-00000.log"]
    for name in (*reversed(wanted), "stacks-a2-rank-00000-stall.txt"):
        storage.write_bytes(run.path("logs", name), b"")
    assert log_names(run) == wanted


def test_lines_of_many_threads_and_warnings_of_libraries_are_whole(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    with _log(run, segment_bytes=2000) as log, ThreadPoolExecutor(8) as pool:

        def say(number: int) -> None:
            log.say(f"<{number}>")
            logging.getLogger("somelibrary").warning("careful with %d", number)
            log.keep()

        list(pool.map(say, range(200)))
    lines = _text(run).splitlines()
    assert sorted(line.rsplit(" ", 1)[-1] for line in lines if "loray.train" in line) == sorted(
        f"<{number}>" for number in range(200)
    )
    assert len([line for line in lines if "WARNING somelibrary: careful with" in line]) == 200


def test_nothing_is_lost_while_storage_is_away(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    way = tmp_path / "runs" / run.id / "logs"
    with _log(run) as log:
        way.write_text("a file in the way")
        for number in range(40):
            log.say(f"line {number}.")
        with pytest.raises(StorageError, match="in the way"):
            log.keep()
        way.unlink()
        log.keep()
    assert [line.rsplit(" ", 2)[-1] for line in _text(run).splitlines()] == [f"{number}." for number in range(40)]


def test_a_failure_is_kept_with_its_traceback(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    with _log(run, segment_bytes=2**18) as log:
        try:
            raise ValueError("the cause")
        except ValueError:
            log.failed()
    text = storage.read_bytes(run.path("logs", "a1-rank-00000.log")).decode()
    assert "failed" in text and "ValueError: the cause" in text and "Traceback" in text
