"""What Prometheus is told of a run: the figures, from rows and events, at times that are handed in."""

from __future__ import annotations

from service.training.exported import Seen


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
    assert seen.added["loray_train_restarts"] == 1


def test_going_on_with_a_third_attempt_is_no_restart_of_this_driver() -> None:
    seen = Seen()
    seen.status({"attempt": 3, "workers": 2})
    assert seen.added["loray_train_restarts"] == 0


def test_checkpoints_and_storage_that_was_away_come_from_the_events() -> None:
    seen = Seen()
    seen.events([{"kind": "checkpoint", "time": 50.0}, {"kind": "storage_away", "time": 60.0}])
    seen.events([{"kind": "checkpoint", "time": 40.0}, {"kind": "ready", "time": 70.0}])
    assert seen.gauges["loray_train_last_checkpoint_timestamp_seconds"] == 50.0
    assert seen.added["loray_train_storage_failures"] == 1
