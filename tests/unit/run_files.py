"""The smallest run file, and what comes of one: the config, or the message of its refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config import ResolvedRun, load_run
from service.errors import ConfigError

SMALL = "model: base\ndata: {train: rows.jsonl}\n"


def load(directory: Path, text: str, *overrides: str) -> ResolvedRun:
    """Write it, and read it as a run does."""
    file = directory / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_run(str(file), overrides)


def problems(directory: Path, text: str, *overrides: str) -> str:
    """The message of the ConfigError that it must raise."""
    with pytest.raises(ConfigError) as caught:
        load(directory, text, *overrides)
    return str(caught.value)
