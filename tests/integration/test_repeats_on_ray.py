"""Several trainings as one run, through the doors that users have: trained, stopped, gone on with, summed up, published."""

from __future__ import annotations

import json
import signal
import statistics
from typing import Any

import pytest

from service import storage
from service.data import shards
from service.domain import ModelRef, RunState
from service.registry import Registry
from service.runs import Run, list_runs
from tests.integration.drivers import training
from tests.integration.place import DEADLINE_S, Place, base, losses, place, wait_until

__all__ = ["base", "place"]  # fixtures

pytestmark = pytest.mark.long  # each starts several trainings, one after the other


def _summary(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(storage.read_bytes(run.path("summary.json")))
    return found


def _children(run: Run) -> list[Run]:
    return [Run(run.home, id) for id in run.status().details.get("children", [])]


def test_folds_are_trained_one_after_the_other_and_summed_up(place: Place) -> None:
    overrides = ("run.folds=2", "data.eval=null", "publish=null", "scale.workers=1", "optim.max_steps=2")
    output = place.train(str(place.run_file), *(part for override in overrides for part in ("--set", override)))
    run, *children = list_runs(place.settings.home)
    assert children == _children(run)
    assert [child.status().state for child in (run, *children)] == [RunState.SUCCEEDED] * 3
    held_out, trained = (
        [
            shards.load(child.status().details[f"{side}_digest"], home=run.home, cache=place.settings.cache)
            for child in children
        ]
        for side in ("eval", "train")
    )
    numbers = [set(side.row_numbers.tolist()) for side in held_out]
    assert [set(side.row_numbers.tolist()) for side in trained] == numbers[::-1]
    assert set().union(*numbers) == set(range(1, 21)) and sum(map(len, numbers)) == 20
    measured = [child.metrics()[-1]["eval/loss"] for child in children]
    found = _summary(run)
    assert found["mean"]["eval/loss"] == pytest.approx(statistics.fmean(measured))
    assert found["std"]["eval/loss"] == pytest.approx(statistics.stdev(measured))
    report = storage.read_bytes(run.path("report.md")).decode()
    assert f"| fold 2 of 2 | {children[1].id} | 2 | {measured[1]:.6g} |" in report
    assert f"eval/loss: {statistics.fmean(measured):.4f} +- {statistics.stdev(measured):.4f} over 2 trainings" in output
    shown = place.loray("runs", "show", run.id)
    assert all(f"{child.id}  succeeded  train/loss" in shown for child in children)


@pytest.mark.longer
def test_seeds_that_were_stopped_twice_go_on_where_they_were_and_the_best_is_published(place: Place) -> None:
    overrides = ("run.seeds=2", "scale.workers=1", "optim.epochs=40")
    with training(place, *(part for override in overrides for part in ("--set", override))) as (run, process):
        wait_until(lambda: bool(_children(run)) and len(losses(_children(run)[0])) > 3, "the first trains")
        place.loray("runs", "stop", run.id, "--reason", "enough")
        output = process.communicate(timeout=DEADLINE_S)[0]
        assert process.returncode == 0, output
    assert (run.status().state, run.status().message) == (RunState.STOPPED, "enough")
    assert [child.status().state for child in _children(run)] == [RunState.STOPPED]
    first_part = losses(_children(run)[0])
    with training(place, "--resume", run.id) as (_, process):
        wait_until(lambda: len(_children(run)) == 2 and len(losses(_children(run)[1])) > 3, "the second trains")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=DEADLINE_S)[0]
        assert process.returncode == 0 and f"loray train --resume {run.id}" in output, output
    assert "SIGTERM" in run.status().message
    assert [child.status().state for child in _children(run)] == [RunState.SUCCEEDED, RunState.STOPPED]
    assert losses(_children(run)[0])[: len(first_part)] == first_part
    output = place.loray(
        "train", "--resume", str(place.run_file)
    )  # the run of that file is the whole, not one of its children
    assert run.status().state is RunState.SUCCEEDED and "Published small@1, the one of lowest eval/loss" in output
    assert [len(losses(child)) for child in _children(run)] == [160, 160]
    best = min(_children(run), key=lambda child: float(child.metrics()[-1]["eval/loss"]))
    manifest = Registry(place.settings.home).manifest(ModelRef.parse("small@1"))
    assert manifest.run == best.id
    assert manifest.metrics["eval/loss"] == best.metrics()[-1]["eval/loss"]
    assert Registry(place.settings.home).versions("small") == [1]
    assert [child["name"] for child in _summary(run)["children"]] == ["seed 7", "seed 8"]
