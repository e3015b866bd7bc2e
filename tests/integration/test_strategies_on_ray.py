"""Strategies and numbers of workers through the door that users use, on a real Ray cluster, against plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.domain import RunState
from service.runs import Run
from service.training.loop import train
from service.training.strategy import World
from tests.integration import small_runs
from tests.integration.drivers import checkpoints, training, trains
from tests.integration.oracle import oracle_losses
from tests.integration.place import Place, base, losses, place, wait_until

__all__ = ["base", "place"]  # fixtures
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]
TOLERANCE = 1e-5  # float32 sums in another order, relative to losses near 4, after ten steps


def test_a_run_under_zero1_has_the_losses_of_a_plain_loop(place: Place, base: Path) -> None:
    place.train(str(place.run_file), "--set", "scale.strategy=zero1", "--set", "publish=null")
    run = place.newest()
    rows = [json.loads(line) for line in (place.run_file.parent / "train.jsonl").read_text().splitlines()]
    expected = oracle_losses(base, rows, [row["ids"] for row in run.ledger()], lr=1e-2)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)
    assert expected[-1] < 0.8 * expected[0]  # it learns, so equality is no coincidence of standing still


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.longer), "zero3"])
def test_full_fine_tuning_on_two_workers_has_the_losses_of_one_and_passes_the_gate(place: Place, strategy: str) -> None:
    overrides = ["method=full", "optim.lr=1e-3", "publish=null"]
    alone, job = small_runs.make_job(place.run_file, place.settings, [*overrides, "scale.workers=1"])
    train(job, World.current())
    place.train(
        str(place.run_file), *(part for o in [*overrides, f"scale.strategy={strategy}"] for part in ("--set", o))
    )
    run = place.newest()
    assert run.status().state is RunState.SUCCEEDED  # so the gate has let it pass
    assert losses(run) == pytest.approx(losses(alone), rel=TOLERANCE)


def stopped_in(run: Run, attempt: int) -> None:
    """Ask the run to stop once this attempt trains."""
    wait_until(lambda: trains(run, attempt), f"attempt {attempt} trains")
    run.request_stop("enough for now")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.longer)])
def test_a_run_of_one_then_two_then_one_worker_draws_everything_once_to_the_same_losses(
    place: Place, strategy: str
) -> None:
    # At ten times the rate rounding alone grows to 1 % in some hundred steps.
    fields = (
        "optim.epochs=60",
        "optim.lr=1e-3",
        "publish=null",
        f"scale.strategy={strategy}",
        "checkpoint.every.steps=20",
    )
    overrides = [part for field in fields for part in ("--set", field)]
    place.train(str(place.run_file), *overrides)
    whole = place.newest()
    with training(place, *overrides, "--set", "scale.workers=1") as (run, driver):
        stopped_in(run, 1)
        assert driver.wait(timeout=120) == 0
    with training(place, "--resume", run.id, "--set", "scale.workers=2") as (_, driver):
        stopped_in(run, 2)
        assert driver.wait(timeout=120) == 0
    assert checkpoints(run) and run.status().state is RunState.STOPPED
    place.train("--resume", run.id, "--set", "scale.workers=1")
    assert run.status().state is RunState.SUCCEEDED
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)
    assert [sorted(row["ids"]) for row in run.ledger()] == [sorted(row["ids"]) for row in whole.ledger()]
    check = json.loads(place.loray("runs", "ledger", run.id, "--check", "--json"))
    assert check["steps"] == len(losses(whole))
