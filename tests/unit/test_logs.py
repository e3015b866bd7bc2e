"""A log of write-once segments, on a directory and on S3."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from service import storage
from service.errors import ConfigError, ConflictError, StorageError
from service.logs import LogReader, LogWriter, read_rows

pytest_plugins = ("tests.s3_endpoint",)


def test_rows_come_back_in_each_writers_order(home: str) -> None:
    with LogWriter(home, "a1-r0", flush_every_s=0) as first, LogWriter(home, "a1-r1") as second:
        for step in range(12):
            first.append({"step": step})
            second.append({"step": step})
    rows = read_rows(home)
    assert [row["step"] for writer, row in rows if writer == "a1-r0"] == list(range(12))
    assert [row["step"] for writer, row in rows if writer == "a1-r1"] == list(range(12))


def test_rows_within_the_period_share_a_segment(home: str) -> None:
    with LogWriter(home, "w", flush_every_s=3600) as log:
        for step in range(100):
            log.append({"step": step})
        assert len(read_rows(home)) == 1  # the first row is shown at once
        log.flush()
        assert len(read_rows(home)) == 100
        log.flush()
    assert storage.list_names(home) == ["w-000000.jsonl", "w-000001.jsonl"]


def test_a_new_writer_continues_the_numbering(home: str) -> None:
    for step in range(3):
        with LogWriter(home, "a1-r0") as log:
            log.append({"step": step})
    assert storage.list_names(home) == [f"a1-r0-00000{n}.jsonl" for n in range(3)]
    assert [row["step"] for _, row in read_rows(home)] == [0, 1, 2]


def test_a_reader_sees_each_row_once(home: str) -> None:
    reader = LogReader(home)
    assert reader.new_rows() == []
    with LogWriter(home, "w", flush_every_s=0) as log:
        log.append({"n": 1})
        assert reader.new_rows() == [("w", {"n": 1})]
        log.append({"n": 2})
    assert reader.new_rows() == [("w", {"n": 2})]
    assert reader.new_rows() == []


def test_two_live_writers_of_one_name_are_told_apart(home: str) -> None:
    first, second = LogWriter(home, "w"), LogWriter(home, "w")
    first.append({"n": 1})
    with pytest.raises(ConflictError, match="another live writer named 'w'"):
        second.append({"n": 2})
    assert read_rows(home) == [("w", {"n": 1})]


def test_a_damaged_row_is_named_and_hides_no_other_row(home: str) -> None:
    with LogWriter(home, "a") as log:
        log.append({"n": 1})
    storage.write_bytes(storage.join(home, "b-000000.jsonl"), b'{"n": 2}\n{"n": \n')
    reader = LogReader(home)
    with pytest.raises(StorageError, match=r"b-000000\.jsonl line 2 is no JSON object"):
        reader.new_rows()
    storage.delete_tree(storage.join(home, "b-000000.jsonl"))
    assert reader.new_rows() == [("a", {"n": 1})]


def test_a_non_finite_float_is_null_because_json_has_no_other(home: str) -> None:
    with LogWriter(home, "w") as log:
        log.append({"train/loss": math.nan, "parts": [math.inf, 1.5]})
    assert json.loads(storage.read_bytes(storage.join(home, "w-000000.jsonl"))) == {
        "train/loss": None,
        "parts": [None, 1.5],
    }


def test_no_row_is_lost_when_a_flush_fails(tmp_path: Path) -> None:
    way = tmp_path / "log"
    log = LogWriter(str(way), "w")
    way.write_text("a file in the way")
    with pytest.raises(StorageError, match="in the way"):
        log.append({"n": 1})
    way.unlink()
    log.append({"n": 2})
    log.close()
    assert [row["n"] for _, row in read_rows(str(way))] == [1, 2]


def test_appending_writes_nothing_where_somebody_else_flushes(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "log"), "w", flush_every_s=math.inf)
    log.append({"n": 1})
    assert not (tmp_path / "log").exists()
    log.flush()
    assert read_rows(log.uri) == [("w", {"n": 1})]


def test_threads_that_append_and_flush_at_once_lose_and_repeat_nothing(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "log"), "w", flush_every_s=math.inf)
    together = threading.Barrier(4)

    def append(thread: int) -> None:
        together.wait()
        for n in range(50):
            log.append({"thread": thread, "n": n})
            if n % 10 == thread:
                log.flush()
                assert {"thread": thread, "n": n} in [row for _, row in read_rows(log.uri)]

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    rows = [row for _, row in read_rows(log.uri)]
    for number in range(4):
        assert [row["n"] for row in rows if row["thread"] == number] == list(range(50))


def test_a_writer_needs_a_plain_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log writer"):
        LogWriter(str(tmp_path), "../escape")
