"""A cluster, a home of its own and a run file for two workers: where tests use the doors that users use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.runs import Run, list_runs
from service.settings import Settings
from tests.integration import small_runs, waiting

DEADLINE_S = 240.0
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


@dataclass
class Place:
    """A cluster, a home of its own, and a run file for two workers."""

    dashboard: str
    settings: Settings
    environment: dict[str, str]
    run_file: Path

    def run(self, *command: str, expect: int = 0, without: tuple[str, ...] = ()) -> str:
        environment = {name: value for name, value in self.environment.items() if name not in without}
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{output[-3000:]}"
        return output

    def train(self, *arguments: str, expect: int = 0) -> str:
        return self.run(sys.executable, "-m", "jobs.train", *arguments, expect=expect)

    def loray(self, *arguments: str, expect: int = 0) -> str:
        return self.run(str(SCRIPTS / "loray"), *arguments, expect=expect)

    def newest(self) -> Run:
        return list_runs(self.settings.home)[-1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(base: Path, ray_cluster: str, ray_dashboard: str, tmp_path: Path) -> Place:
    run_file = small_runs.write_run_file(
        tmp_path / "run", base, scale={"workers": 2}, publish="small", checkpoint={"every": {"steps": 2}}
    )
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    environment = {
        **os.environ,
        "LORAY_HOME": settings.home,
        "LORAY_CACHE": str(settings.cache),
        "RAY_ADDRESS": ray_cluster,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }
    return Place(ray_dashboard, settings, environment, run_file)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    waiting.wait_until(condition, what, DEADLINE_S, every_s=0.02)


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.metrics() if "train/loss" in row]
