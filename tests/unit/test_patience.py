"""Which storage is waited for, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from service.errors import ConfigError, StorageError
from service.training.loop import TrainJob, train
from service.training.patience import Patience
from service.training.strategy import World

S3, DIRECTORY = "s3://bucket/prefix", "/somewhere"


class Store:
    """Fails so many times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.asked <= self.failures:
            raise StorageError(f"failure {self.asked}")
        return "answer"


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def patience(events: list[str]) -> Callable[..., Patience]:
    return lambda *places, retry_s=60.0: Patience(places, retry_s, "looking", lambda kind, text: events.append(kind))


def never(seconds: float) -> NoReturn:
    raise AssertionError(f"waited {seconds} s for a directory")


@pytest.mark.parametrize("places", [(S3,), (DIRECTORY, S3), (S3, "org/base")])
def test_s3_is_asked_again_until_it_answers(
    places: tuple[str, ...], patience: Callable[..., Patience], events: list[str]
) -> None:
    store = Store(2)
    assert patience(*places).insist(store) == "answer" and store.asked == 3
    assert events == ["storage_away", "storage_back"]


@pytest.mark.parametrize("places", [(DIRECTORY,), ("file:///somewhere",), (DIRECTORY, "org/base")])
def test_a_directory_is_asked_once(
    places: tuple[str, ...],
    patience: Callable[..., Patience],
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", never)
    store = Store(2)
    with pytest.raises(StorageError, match=r"^failure 1$"):
        patience(*places).insist(store)
    assert store.asked == 1 and events == []


def test_patience_that_is_over_says_what_was_allowed(patience: Callable[..., Patience], events: list[str]) -> None:
    with pytest.raises(StorageError, match=r"looking: storage was away .*checkpoint.retry_s allows 0.01: failure \d"):
        patience(S3, retry_s=0.01).insist(Store(10**9))
    assert events == ["storage_away"]


def test_a_mistake_is_not_waited_out(patience: Callable[..., Patience]) -> None:
    def mistake() -> NoReturn:
        raise ConfigError("of the caller")

    with pytest.raises(ConfigError):
        patience(S3).insist(mistake)


def test_a_run_whose_directory_cannot_be_read_fails_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", never)
    (tmp_path / "runs").symlink_to("runs")
    config = {"model": {"id": "tiny"}, "data": {"train": "rows.jsonl"}}
    job = TrainJob(str(tmp_path), str(tmp_path), "20260101-000000-lora-0a1b", 1, config, "tiny", "b", "d", None)
    with pytest.raises(StorageError):
        train(job, World())
