"""A run publishes one version, however often the driver has to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.domain import Manifest, RunState
from service.errors import StorageError
from service.registry import ManifestDraft, Registry
from service.runs import Run
from service.training.driver import published_once
from service.training.patience import Patience

pytest_plugins = ("tests.s3_endpoint",)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


class Publisher:
    """Publishes for real; the answers of its first calls are lost on the way."""

    def __init__(self, home: str, adapter: Path, lost: int = 0) -> None:
        self.registry, self.adapter, self.lost = Registry(home), adapter, lost

    def publish(self, run: Run) -> Manifest:
        def publish() -> Manifest:
            draft = ManifestDraft(
                base_model="b", base_digest="00", renderer_digest="11", rank=4, alpha=8, run=run.id
            )  # fmt: skip
            manifest = self.registry.publish("tickets", self.adapter, draft)
            if self.lost:
                self.lost -= 1
                raise StorageError("the answer was lost")
            return manifest

        return published_once("tickets", run, self.registry, publish)


def _run(home: str, attempt: int = 1) -> Run:
    run = Run.create(home, "tickets", "model: b\n", {})
    run.set_state(RunState.RUNNING, attempt=attempt)
    return run


def test_a_version_whose_answer_was_lost_is_not_published_again(s3_home: str, adapter: Path) -> None:
    run, publisher = _run(s3_home), Publisher(s3_home, adapter, lost=1)
    patience = Patience([s3_home], 60.0, "finishing the run", lambda kind, text: None)
    assert patience.insist(lambda: publisher.publish(run)).ref == "tickets@1"
    assert publisher.registry.versions("tickets") == [1]


def test_a_later_attempt_finds_what_the_first_has_published_and_another_run_publishes_its_own(
    home: str, adapter: Path
) -> None:
    publisher, first = Publisher(home, adapter), _run(home)
    assert publisher.publish(first).ref == "tickets@1"
    assert publisher.publish(_run(home)).ref == "tickets@2"
    first.heartbeat(attempt=2)
    assert publisher.publish(first).ref == "tickets@1"
    assert publisher.registry.versions("tickets") == [1, 2]
