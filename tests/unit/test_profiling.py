"""The profile of a run: a trace a browser opens, of the right steps, however short the run; and nothing when not asked."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from service import storage
from service.runs import Run
from service.training.profiling import profiler
from service.training.ranklog import RankLog

pytest_plugins = ("tests.s3_endpoint",)


def _run(home: str) -> Run:
    return Run.create(home, "tickets", "model: x\n", {})


def _train(run: Run, steps: int) -> None:
    """Each step has an operation of its own name."""
    weights = torch.ones(8, 8)
    with profiler(run, 0, 1, enabled=True) as profile:
        for step in range(1, steps + 1):
            with torch.profiler.record_function(f"own work of step {step}"):
                weights = (weights @ weights).tanh()
            profile.step()


def _traced(run: Run) -> list[dict[str, Any]]:
    data = gzip.decompress(storage.read_bytes(run.path("profile", "a1-rank-00000.json.gz")))
    events: list[dict[str, Any]] = json.loads(data)["traceEvents"]
    return events


def _steps(run: Run) -> list[int]:
    names = {str(event.get("name")) for event in _traced(run)}
    return sorted(int(name.rsplit(" ", 1)[1]) for name in names if name.startswith("own work of step "))


@pytest.mark.parametrize(
    ("steps", "recorded"), [(1, [1]), (2, [1]), (3, [3]), (4, [3, 4]), (5, [3, 4, 5]), (8, [3, 4, 5])]
)
def test_the_recorded_steps_are_the_warm_ones_or_what_there_was(
    tmp_path: Path, steps: int, recorded: list[int]
) -> None:
    run = _run(str(tmp_path))
    _train(run, steps)
    assert _steps(run) == recorded


def test_a_run_that_fails_in_its_first_step_leaves_what_there_was(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    with pytest.raises(ZeroDivisionError), profiler(run, 0, 1, enabled=True):
        torch.ones(8, 8) @ torch.ones(8, 8)
        raise ZeroDivisionError
    assert any(event.get("name") == "aten::mm" for event in _traced(run))


def test_the_table_names_the_costliest_operations(home: str) -> None:
    run = _run(home)
    _train(run, 5)
    table = storage.read_bytes(run.path("profile", "a1-rank-00000.txt")).decode()
    assert "aten::mm" in table and "Self CPU" in table
    assert storage.list_names(run.path("profile")) == ["a1-rank-00000.json.gz", "a1-rank-00000.txt"]


def test_a_profile_that_cannot_be_stored_is_said_and_ends_no_run(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    storage.local_path(run.path("profile")).write_text("a file in the way")
    log = RankLog(run, 0, 1)
    _train(run, 5)
    log.close()
    text = storage.read_bytes(run.path("logs", "a1-rank-00000.log")).decode()
    assert "the profile could not be kept" in text and "in the way" in text


def test_without_it_nothing_of_the_profiler_is_imported_or_written(tmp_path: Path) -> None:
    run = _run(str(tmp_path))
    script = (
        "import sys\n"
        "from service.runs import Run\n"
        "from service.training.profiling import profiler\n"
        "with profiler(Run(sys.argv[1], sys.argv[2]), 0, 1, enabled=False) as profile:\n"
        "    profile.step()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, run.home, run.id], check=True)
    assert storage.list_names(run.path("profile")) == []
