"""`loray plan --probe`: two real steps in a process of their own, and what it says when they cannot be made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from service.config import load_run
from service.errors import TrainingError
from service.settings import Settings
from service.training.plan import detailed, make_run_plan
from service.training.probe import ProbeJob, run_probe
from tests.integration import tiny
from tests.integration.small_runs import write_run_file


def test_the_probe_measures_time_and_memory_of_two_real_steps(tmp_path: Path) -> None:
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    run_file = write_run_file(tmp_path / "run", tiny.save_base(tmp_path / "base"), evaluate={"every": {"steps": 3}})
    resolved = load_run(str(run_file))
    plan = detailed(make_run_plan(resolved, settings), resolved, settings, probe=True)
    assert plan.probe is not None and plan.time is not None and plan.memory is not None
    assert plan.probe.steps == 2
    assert plan.probe.peak_bytes > plan.memory.parts["activations"]
    steps_s = plan.total_tokens * plan.probe.seconds_per_token + plan.num_steps * plan.probe.update_s
    assert plan.time.training_s == pytest.approx(steps_s)
    assert plan.time.evaluation_s > 0 and "measured" in plan.time.source


def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    base = tiny.save_base(tmp_path / "base")
    resolved = load_run(str(write_run_file(tmp_path / "run", base)))
    plan = make_run_plan(resolved, settings)
    config = resolved.config.model_dump(mode="json", by_alias=True)
    job = ProbeJob(settings.home, str(settings.cache), config, str(base), plan.train.digest, threads=1)
    with pytest.raises(TrainingError, match="holds no causal language model"):
        run_probe(dataclasses.replace(job, base=str(tmp_path / "nowhere")))
