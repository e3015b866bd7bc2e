"""`loray data prepare` and `python -m jobs.prepare` from outside: the same dataset by either door, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import prepare
from tests.integration import small_runs
from tests.integration.tiny import save_base
from tests.unit.console import Loray, home, loray

__all__ = ["home", "loray"]  # fixtures


@pytest.fixture
def run_file(tmp_path: Path, home: str) -> Path:
    """A run of twenty rows, and six to evaluate on, whose home is empty."""
    return small_runs.write_run_file(tmp_path / "run", save_base(tmp_path / "base"))


def _written(home: Path) -> dict[str, int]:
    """Every file of the prepared datasets, and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in (home / "datasets").rglob("*.arrow")}


def test_the_command_and_the_job_prepare_one_dataset_once(
    run_file: Path, loray: Loray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = loray("data", "prepare", str(run_file), "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0 and (found["train"]["rows"], found["eval"]["rows"], found["test"]) == (20, 6, None)
    before = _written(tmp_path / "home")
    assert prepare.main([str(run_file)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [again[side]["digest"] for side in ("train", "eval")] == [
        found[side]["digest"] for side in ("train", "eval")
    ]
    code, table, _ = loray("data", "prepare", str(run_file))
    assert code == 0 and "train: " in table and "eval: " in table
    assert _written(tmp_path / "home") == before and len(before) == 4


def test_what_is_set_on_the_command_line_makes_another_dataset(run_file: Path, loray: Loray) -> None:
    tokens = [
        json.loads(loray("data", "prepare", str(run_file), "--json", *more)[1])["train"]
        for more in ((), ("--set", "data.train_on=all"))
    ]
    assert (
        tokens[0]["digest"] != tokens[1]["digest"] and tokens[0]["supervised_tokens"] < tokens[1]["supervised_tokens"]
    )


def test_wrong_rows_are_told_with_their_numbers_and_exit_with_2(run_file: Path, loray: Loray, tmp_path: Path) -> None:
    with (tmp_path / "run" / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "bot", "content": "Hi"}]}\n')
    code, out, err = loray("data", "prepare", str(run_file))
    assert code == 2 and "21" in out + err and "bot" in out + err
    assert prepare.main([str(run_file)]) == 2
    assert not list((tmp_path / "home").rglob("card.json"))
