"""What a report says and warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import storage
from service.config import load_run
from service.logs import LogWriter
from service.settings import Settings
from service.training.loop import TrainResult
from service.training.plan import make_run_plan
from service.training.report import got_worse, write_report
from tests.integration import small_runs


@pytest.mark.parametrize(
    "losses", [[2.8], [2.8, 2.9, 3.1], [0.02, 0.05], [3.0] * 10 + [1.0] * 10, [1.0, 9.0, 9.0, 1.1], []]
)
def test_losses_that_end_about_where_they_began_or_below_are_no_warning(losses: list[float]) -> None:
    assert got_worse(losses) is None


def test_a_loss_that_ends_clearly_above_its_beginning_is_one() -> None:
    said = got_worse([2.8, *[10.8] * 5])
    assert said is not None and "rose from 2.8 to 10.8 nats" in said and "optim.lr" in said
    assert got_worse([1.0] * 10 + [1.0] * 9 + [9.0] * 2) is not None


@pytest.mark.parametrize("step", [3, 1])
def test_the_page_says_what_was_set_and_warns_of_the_steps_that_the_model_has_seen(tmp_path: Path, step: int) -> None:
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    run_file = small_runs.write_run_file(tmp_path / "run", small_runs.small_base(tmp_path / "base"))
    overrides = ["optim.lr=3e-3"]
    resolved = load_run(str(run_file), overrides)
    run, _ = small_runs.make_job(run_file, settings, overrides)
    with LogWriter(run.path("metrics"), "a1-r0") as metrics:
        for number, loss in enumerate((2.0, 9.0, 9.5), start=1):
            row = {"train/loss": loss, "train/tokens_per_s": 10.0, "memory/peak_bytes": 2.0**30}
            metrics.append({"step": number, **row})
    uri, warning = write_report(run, resolved, make_run_plan(resolved, settings), TrainResult(step, {}), None)
    page = storage.read_bytes(uri).decode()
    assert "- `optim.lr`: 0.003\n" in page
    assert (warning is not None) == ("| warning | the training loss rose from 2 to 9.5 nats" in page) == (step == 3)
