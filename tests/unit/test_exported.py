"""What Prometheus is told of a run: the figures, from rows and events, at times that are handed in, and storage that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from service import status
from service.errors import StorageError
from service.runs import Run
from service.training import exported
from service.training.driver import driven
from service.training.exported import AWAY, Exported, Seen, StorageAway
from service.training.loop import TrainJob, _Session, train
from service.training.patience import Patience
from service.training.strategy import World
from tests.integration.waiting import wait_until

pytest_plugins = ("tests.s3_endpoint",)

ShownAs = Callable[..., list[float]]


@pytest.fixture
def shown_as(monkeypatch: pytest.MonkeyPatch) -> ShownAs:
    """All values that a gauge has had under these labels: Ray's is replaced, which keeps them to itself."""
    import ray
    import ray.util.metrics

    values: list[tuple[str, dict[str, str], float]] = []

    class Gauge(ray.util.metrics.Gauge):  # type: ignore[misc]  # untyped to mypy
        def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
            values.append((self.info["name"], self.info["default_tags"] | (tags or {}), value or 0.0))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    monkeypatch.setattr(exported, "SHOW_EVERY_S", 0.005)
    return lambda name, **labels: [v for n, tags, v in values if n == name and labels.items() <= tags.items()]


def test_the_newest_step_is_told_with_the_time_it_was_seen() -> None:
    seen = Seen()
    seen.steps([{"step": 4, "train/tokens_per_s": 300.0}, {"step": 5, "train/tokens_per_s": 310.0}], now=100.0)
    seen.steps([], now=160.0)
    assert seen.gauges["loray_train_step"] == 5
    assert seen.gauges["loray_train_tokens_per_s"] == 310.0
    assert seen.gauges["loray_train_last_step_timestamp_seconds"] == 100.0


def test_gpu_seconds_are_what_the_run_holds_times_the_time_that_passes() -> None:
    seen = Seen()
    seen.passed(10.0)
    seen.status({"attempt": 1, "workers": 16, "gpus": 16.0})
    seen.passed(10.0)
    seen.status({"attempt": 2, "workers": 8, "gpus": 8.0})
    seen.passed(5.0)
    assert seen.added["loray_train_gpu_seconds"] == 16 * 10 + 8 * 5


def test_restarts_are_shown_from_0_on_and_go_on_where_an_earlier_driver_ended(
    tmp_path: Path, shown_as: ShownAs
) -> None:
    run = Run.create(str(tmp_path), "small", "", {})
    first = Exported(run, "support", 40, 1)
    with first.showing():
        assert shown_as("loray_train_restarts", run=run.id, project="support")[0] == 0.0
        run.heartbeat(attempt=2)
        first.take([])
        wait_until(lambda: shown_as("loray_train_restarts")[-1] == 1.0, "the second attempt is shown", 20.0)
    second = Exported(run, "support", 40, 3)
    num_shown = len(shown_as("loray_train_restarts"))
    with second.showing():
        assert shown_as("loray_train_restarts")[num_shown] == 2.0


def test_figures_are_shown_again_while_nothing_is_taken_in(tmp_path: Path, shown_as: ShownAs) -> None:
    """Ray forgets what is not: a run that waits for its first workers would never be stuck."""
    with Exported(Run.create(str(tmp_path), "small", "", {}), "support", 40, 1).showing():
        last_step = "loray_train_last_step_timestamp_seconds"
        wait_until(lambda: len(shown_as(last_step)) > 2, "it is shown a third time", 20.0)


def test_checkpoints_come_from_the_events() -> None:
    seen = Seen()
    seen.events([{"kind": "checkpoint", "time": 50.0}, {"kind": "storage_away", "time": 60.0}])
    seen.events([{"kind": "checkpoint", "time": 40.0}, {"kind": "ready", "time": 70.0}])
    assert seen.gauges["loray_train_last_checkpoint_timestamp_seconds"] == 50.0


def test_storage_that_does_not_answer_is_shown_from_the_first_failure_until_it_answers(shown_as: ShownAs) -> None:
    away = StorageAway("r", "support", "3")

    def fails_until_it_is_shown() -> None:
        if 1.0 not in shown_as(AWAY, run="r", project="support", process="3"):
            raise StorageError("away")

    with away.showing():
        assert set(shown_as(AWAY)) == {0.0}
        Patience(["s3://bucket/prefix"], 60.0, "looking", away.heard).insist(fails_until_it_is_shown)
        wait_until(lambda: shown_as(AWAY)[-1] == 0.0, "it answers again", 20.0)


def test_a_heartbeat_that_cannot_be_written_is_shown_until_it_can(shown_as: ShownAs) -> None:
    away, errors = StorageAway("r", "support", "driver"), [StorageError("no room"), StorageError("no room")]

    def write() -> None:
        if errors:
            raise errors.pop()

    beat = away.seen(write)
    with away.showing():
        for _ in range(2):
            with pytest.raises(StorageError):
                beat()
            wait_until(lambda: shown_as(AWAY, process="driver")[-1] == 1.0, "it fails", 20.0)
        beat()
        wait_until(lambda: shown_as(AWAY)[-1] == 0.0, "it works again", 20.0)


def test_a_driver_beats_with_the_heartbeat_that_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "HEARTBEAT_EVERY_S", 0.005)
    beats: list[int] = []
    with driven(Run.create(str(tmp_path), "small", "", {}), lambda: beats.append(1)):
        wait_until(lambda: bool(beats), "it beats", 20.0)


def test_a_worker_other_than_the_first_tells_that_it_cannot_reach_the_run(
    s3_home: str, tmp_path: Path, shown_as: ShownAs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    config: dict[str, Any] = {
        "model": {"id": "tiny"}, "data": {"train": "rows.jsonl"}, "checkpoint": {"retry_s": 0.5}
    }  # fmt: skip
    id = "20260101-000000-lora-0a1b"
    with pytest.raises(StorageError):
        train(TrainJob(s3_home, str(tmp_path), id, 1, config, "tiny", "b", "d", None), World(rank=1, size=2))
    values = shown_as(AWAY, run=id, project="default", process="1")
    assert values[0] == 0.0 and 1.0 in values


def test_a_worker_other_than_the_first_tells_of_what_fails_later(shown_as: ShownAs) -> None:
    session: Any = _Session.__new__(_Session)
    session.world, session.log, session.away = World(rank=1, size=2), Mock(), StorageAway("r", "support", "1")
    with session.away.showing():
        session._event("storage_away", "checkpoint of step 5")
        wait_until(lambda: shown_as(AWAY, process="1")[-1] == 1.0, "it is away", 20.0)


def test_where_ray_does_not_run_nobody_is_told() -> None:
    with StorageAway("r", "support", "0").showing() as away:
        away.heard("storage_away", "")
