"""The console script as a user calls it, in this process: what it printed, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from service.cli.app import main


class Done(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Loray = Callable[..., Done]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty LORAY_HOME, and a working directory with nothing in it."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(tmp_path / "home")


@pytest.fixture
def loray(home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Loray:
    """Runs the console script's function with these arguments."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["loray", *arguments])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        printed = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, printed.out, printed.err)

    return call
