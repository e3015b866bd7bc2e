"""The threads of one replica's adapters: the heart beats while a load takes its time, and no error repeats for ever."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.adapter_sync import AdapterSync
from serve.adapter_uris import AdapterUris
from serve.desired import EndpointFiles, ReplicaReport
from serve.registration import register
from serve.routing import Registered, Target
from service.domain import Manifest, ModelRef
from service.errors import NotFoundError
from service.inference.engine import AdapterInfo, EngineStats, GenerationRequest, OnChunk
from service.registry import ManifestDraft, Registry, model_digest
from tests.integration.waiting import wait_until

BASE = "b" * 64
DEADLINE_S = 20.0


class SlowEngine:
    """An engine of 16 columns that takes as long over a load as the test wants."""

    max_context, num_slots, max_columns, max_rank = 64, 2, 16, 16

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.loading = threading.Event()
        self.resident: dict[str, AdapterInfo] = {}

    @property
    def free_columns(self) -> int:
        return self.max_columns - sum(info.num_columns for info in self.resident.values())

    def read_adapter(self, digest: str, directory: Path) -> None: ...

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        self.loading.set()
        assert self.may_load.wait(DEADLINE_S)
        self.resident[digest] = AdapterInfo(rank=4, num_columns=4, bytes=1)
        return self.resident[digest]

    def unload_adapter(self, digest: str) -> None:
        if self.resident.pop(digest, None) is None:
            raise NotFoundError(f"adapter {digest} is not resident.")

    def adapters(self) -> dict[str, AdapterInfo]:
        return dict(self.resident)

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    def check(self) -> None: ...

    def start(self) -> None: ...

    def close(self) -> None: ...


def published(home: Path, weights: bytes = b"weights") -> Manifest:
    source = home / "source"
    source.mkdir(exist_ok=True)
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(weights)
    draft = ManifestDraft(base_model="b", base_digest=BASE, renderer_digest="11", rank=4, alpha=8)
    return Registry(str(home)).publish("red", source, draft)


def entry(manifest: Manifest) -> Registered:
    return Registered(model=manifest.ref, digest=manifest.digest)


@contextmanager
def running(
    engine: SlowEngine, files: EndpointFiles, cache: Path, uris: AdapterUris | None = None
) -> Iterator[AdapterSync]:
    sync = AdapterSync(engine, files, BASE, "r1", cache, uris or AdapterUris(), heartbeat_every_s=0.02)
    sync.start()
    try:
        yield sync
    finally:
        engine.may_load.set()
        sync.close()


def report_when(files: EndpointFiles, condition: Callable[[ReplicaReport], bool]) -> ReplicaReport:
    """The first report that satisfies; the pause is an Event nobody sets."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.02)):
        found = next((report for report in files.reports() if condition(report)), None)
        if found:
            return found
        pause.wait(0.02)
    raise AssertionError(f"not within {DEADLINE_S:g} s; the reports are {files.reports()}")


def test_the_heart_beats_while_an_adapter_is_being_loaded(tmp_path: Path) -> None:
    files, engine, manifest = EndpointFiles(str(tmp_path), "e"), SlowEngine(), published(tmp_path)
    with running(engine, files, tmp_path / "cache"):
        register(files, {"red": entry(manifest)})
        assert engine.loading.wait(DEADLINE_S)
        first = report_when(files, lambda r: manifest.digest in r.adapters)
        assert first.adapters[manifest.digest].state == "cached", "told after each action, before the load has ended"
        report_when(files, lambda r: r.heartbeat_at > first.heartbeat_at)
        assert not engine.resident
        engine.may_load.set()
        report_when(files, lambda r: r.adapters[manifest.digest].state == "resident")
    assert files.reports() == [], "a replica that ends takes its report away"


def test_an_adapter_that_is_known_is_loaded_and_answers_although_there_is_newer_news(tmp_path: Path) -> None:
    files, engine, manifest = EndpointFiles(str(tmp_path), "e"), SlowEngine(), published(tmp_path)
    with running(engine, files, tmp_path / "cache") as sync:
        register(files, {"red": entry(manifest)})
        report = report_when(files, lambda r: manifest.digest in r.adapters)
        target = Target(manifest.ref, manifest.digest, label="red")

        async def admitted() -> Target:
            asking = asyncio.create_task(sync.admit(target, report.epoch + 1000))
            await asyncio.sleep(0)
            engine.may_load.set()
            return await asyncio.wait_for(asking, DEADLINE_S)

        answering = asyncio.run(admitted())
        assert answering == target
        sync.release(answering)


def test_an_adapter_whose_home_goes_away_while_it_is_fetched_is_not_refused_but_fetched_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home, aside = tmp_path / "home", tmp_path / "unmounted"
    home.mkdir()
    files, engine, manifest = EndpointFiles(str(home), "e"), SlowEngine(), published(home)
    engine.may_load.set()
    real = Registry.manifest

    def unmounted_first(registry: Registry, ref: ModelRef) -> Manifest:
        if not aside.exists():
            home.rename(aside)
        return real(registry, ref)

    with running(engine, files, tmp_path / "cache"):
        with monkeypatch.context() as patch:
            patch.setattr(Registry, "manifest", unmounted_first)
            register(files, {"red": entry(manifest)})
            wait_until(lambda: "cannot be fetched yet" in caplog.text, "the adapter is missed", DEADLINE_S)
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
        report_when(files, lambda r: manifest.digest in r.adapters and r.adapters[manifest.digest].state == "resident")
        assert list(engine.adapters()) == [manifest.digest]


def test_an_error_nobody_expected_while_fetching_is_a_refusal_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, engine, manifest = EndpointFiles(str(tmp_path), "e"), SlowEngine(), published(tmp_path)
    with running(engine, files, Path("no\0directory")):
        register(files, {"red": entry(manifest)})
        refused = report_when(
            files, lambda r: manifest.digest in r.adapters and r.adapters[manifest.digest].detail != ""
        )
    adapter = refused.adapters[manifest.digest]
    assert adapter.state == "refused"
    assert "null" in adapter.detail
    assert "Traceback" in caplog.text


def test_who_waits_for_a_version_waits_for_the_next_one_where_its_label_moves_on(tmp_path: Path) -> None:
    files, engine, first = EndpointFiles(str(tmp_path), "e"), SlowEngine(), published(tmp_path)
    second = published(tmp_path, b"other weights")
    with running(engine, files, tmp_path / "cache") as sync:
        register(files, {"red": entry(first)})
        report = report_when(files, lambda r: first.digest in r.adapters)

        async def admitted() -> Target:
            asking = asyncio.create_task(sync.admit(Target(first.ref, first.digest, label="red"), report.epoch))
            await asyncio.sleep(0)
            assert sync._table.adapters[first.digest].waiting == 1
            await asyncio.to_thread(register, files, {"red": entry(second)})
            engine.may_load.set()
            return await asyncio.wait_for(asking, DEADLINE_S)

        answering = asyncio.run(admitted())
        assert all(adapter.waiting == 0 for adapter in sync._table.adapters.values())
        assert answering.digest in (first.digest, second.digest)
        sync.release(answering)


def test_an_adapter_that_the_engine_has_lost_is_unloaded_and_others_go_on(tmp_path: Path) -> None:
    files, engine, first = EndpointFiles(str(tmp_path), "e"), SlowEngine(), published(tmp_path)
    second = published(tmp_path, b"other weights")
    engine.may_load.set()
    with running(engine, files, tmp_path / "cache"):
        register(files, {"red": entry(first)})
        report_when(files, lambda r: first.digest in r.adapters and r.adapters[first.digest].state == "resident")
        engine.resident.clear()
        register(files, {"red": entry(second)})
        after = report_when(files, lambda r: first.digest not in r.adapters and second.digest in r.adapters)
        assert after.adapters[second.digest].state in ("cached", "resident")


@pytest.mark.parametrize(
    ("base", "roots", "config", "state", "said"),
    [
        (BASE, "source", {}, "resident", ""),
        ("c" * 64, "source", {}, "refused", "made for base model cccccccccccc"),
        (BASE, "elsewhere", {}, "refused", "outside the directories"),
        (BASE, "source", {"r": 17}, "refused", "needs 17 columns"),
        (BASE, "source", {"rank_pattern": {"q_proj": 99}}, "refused", "needs 99 columns"),
        (BASE, "source", {"use_dora": True}, "refused", "DoRA"),
    ],
)
def test_a_replica_looks_at_an_adapter_from_a_uri_for_itself(
    base: str, roots: str, config: dict[str, object], state: str, said: str, tmp_path: Path
) -> None:
    """It may have been registered by a gateway of another configuration, or for another base under the same endpoint."""
    files, engine, source = EndpointFiles(str(tmp_path), "e"), SlowEngine(), tmp_path / "source"
    source.mkdir()
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (source / "adapter_config.json").write_text(json.dumps(whole))
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    uris = AdapterUris((str(source),))
    pinned = uris.pin(uris.look(str(source)), base)
    digest = model_digest(pinned.files)
    engine.may_load.set()
    with running(engine, files, tmp_path / "cache", AdapterUris((str(tmp_path / roots),))):
        register(files, {"mine": Registered(model="mine@sha256-1", digest=digest, source=pinned)})
        report = report_when(files, lambda r: digest in r.adapters and r.adapters[digest].state == state)
    assert said in report.adapters[digest].detail
