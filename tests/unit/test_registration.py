"""What a PUT may say, and labels that follow an alias: to what it points at, if that can be served, unless somebody was first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from serve.desired import AdapterReport, Base, Desired, EndpointFiles, ReplicaReport
from serve.registration import follow, parse_wanted, register, registrable
from serve.routing import Registered
from service.domain import ModelRef
from service.errors import ConfigError, RequestError, StorageError
from service.registry import ManifestDraft, Registry

BASE = Base("base", "base", None, None, "b" * 64, "c" * 64)
DRAFT = ManifestDraft(base_model="base", base_digest=BASE.digest, renderer_digest=BASE.renderer_digest, rank=4, alpha=8)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["model"]),
        ({"model": 3}, ["model"]),
        ({"model": None}, ["model"]),
        ({"uri": 3}, ["uri"]),
        ({"uri": ["/a"]}, ["uri"]),
        ({"uri": "/a", "model": "red@1"}, ["uri"]),
        ({"model": "red@1", "base_model": "base"}, ["base_model"]),
        ({"uri": "/a", "base_model": 1, "pin": "yes"}, ["base_model", "pin"]),
    ],
)
def test_what_is_wrong_with_a_put_is_told_by_field_and_all_at_once(body: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_wanted(body)
    assert caught.value.param == fields[0]
    assert all(f"{field}: " in str(caught.value) for field in fields)


def test_a_put_of_a_model_or_of_a_uri_is_read() -> None:
    model, uri = parse_wanted({"model": "red@1", "hue": 1}), parse_wanted({"uri": "/a", "pin": True, "base_model": "b"})
    assert (model.model, model.uri, model.pin, model.ignored) == ("red@1", None, False, ("hue",))
    assert (uri.model, uri.uri, uri.pin, uri.base_model, uri.ignored) == (None, "/a", True, "b", ())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """red@1 and red@2 fit, red@3 is of another base; production is 1."""
    registry, source = Registry(str(tmp_path / "home")), tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    for number, base in enumerate((BASE.digest, BASE.digest, "f" * 64)):
        (source / "adapter_model.safetensors").write_bytes(bytes([number]))
        registry.publish("red", source, DRAFT.model_copy(update={"base_digest": base}))
    registry.set_alias("red", "production", 1)
    return registry


def followed(files: EndpointFiles, registry: Registry) -> tuple[Desired, dict[str, str]]:
    return follow(files, files.read(), {"red": registry.aliases("red")}, BASE, registry)


def test_a_label_follows_the_alias_it_was_asked_for_and_a_version_stays(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    wanted = {
        "red": registrable("red", "red", BASE, registry),
        "red@production": registrable("red@production", "red@production", BASE, registry),
        "mine": registrable("mine", "red@production", BASE, registry).model_copy(update={"pin": True}),
        "red@1": registrable("red@1", "red@production", BASE, registry),
        "fixed": registrable("fixed", "red@1", BASE, registry),
    }
    register(files, wanted)
    assert followed(files, registry)[0].epoch == 1, "nothing has moved: nothing is written"
    registry.set_alias("red", "production", 2)
    desired, behind = followed(files, registry)
    assert {label: entry.model for label, entry in desired.adapters.items()} == {
        "red": "red@2", "red@production": "red@2", "mine": "red@2", "red@1": "red@1", "fixed": "red@1",
    }  # fmt: skip
    assert behind == {} and desired == files.read() and desired.epoch == 2
    mine = desired.adapters["mine"]
    assert (mine.pin, mine.since) == (True, 2)
    assert mine.digest == registry.manifest(ModelRef.parse("red@2")).digest
    registry.delete_alias("red", "production")
    assert followed(files, registry) == (desired, {}), "an alias that is gone moves nobody"


def test_a_label_stays_with_what_it_has_where_the_alias_points_at_what_cannot_be_served(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    register(files, {"red": registrable("red", "red", BASE, registry)})
    registry.set_alias("red", "production", 3)
    desired, behind = followed(files, registry)
    assert desired.adapters["red"].model == "red@1" and desired.epoch == 1
    assert "stays with red@1" in behind["red"] and "f" * 12 in behind["red"]


def _report(files: EndpointFiles, digest: str, state: str, detail: str = "") -> None:
    report = AdapterReport(model="red@2", state=state, detail=detail)
    seen = ReplicaReport(
        replica="one", heartbeat_at=time.time(), epoch=files.read().epoch, base_digest=BASE.digest,
        adapters={digest: report},
    )  # fmt: skip
    files.write_report(seen)


def test_a_version_that_replicas_refuse_is_left_again_and_not_tried_twice(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    register(files, {"red": registrable("red", "red", BASE, registry)})
    first = files.read().adapters["red"]
    registry.set_alias("red", "production", 2)
    second = followed(files, registry)[0].adapters["red"]
    assert second.before == ("red@1", first.digest)
    _report(files, second.digest, "refused", "it needs 64 columns, the endpoint has 24.")
    desired, behind = followed(files, registry)
    assert (desired.adapters["red"].model, desired.adapters["red"].digest) == ("red@1", first.digest)
    assert "stays with red@1" in behind["red"] and "64 columns" in behind["red"]
    assert followed(files, registry) == (desired, behind), "and it stays so"
    registry.set_alias("red", "production", 1)
    assert followed(files, registry)[1] == {}


def test_a_version_that_a_replica_has_resident_stays(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    register(files, {"red": registrable("red", "red", BASE, registry)})
    registry.set_alias("red", "production", 2)
    second = followed(files, registry)[0].adapters["red"]
    _report(files, second.digest, "resident")
    assert followed(files, registry)[0].adapters["red"] == second.model_copy(update={"before": None})
    _report(files, second.digest, "refused", "later")
    assert followed(files, registry)[0].adapters["red"].model == "red@2"


def test_a_label_with_a_broken_manifest_keeps_no_other_back(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    wanted = {"red": registrable("red", "red", BASE, registry), "too": registrable("too", "red", BASE, registry)}
    register(files, {**wanted, "fixed": registrable("fixed", "red@2", BASE, registry)})
    registry.set_alias("red", "production", 3)
    (Path(registry.home) / "models" / "default" / "red" / "3" / "manifest.json").write_text("{")
    desired, behind = followed(files, registry)
    assert set(behind) == {"red", "too"} and desired.adapters["fixed"].model == "red@2"


def test_who_registers_a_label_meanwhile_is_not_overwritten(registry: Registry) -> None:
    files = EndpointFiles(registry.home, "e")
    register(files, {"red": registrable("red", "red", BASE, registry)})
    seen = files.read()
    registry.set_alias("red", "production", 2)
    register(files, {"red": registrable("red", "red@1", BASE, registry)})
    desired, _ = follow(files, seen, {"red": registry.aliases("red")}, BASE, registry)
    assert desired.adapters["red"].model == "red@1" and desired.adapters["red"].follows is None


def test_a_label_that_reads_as_another_alias_is_refused(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="reads as a model"):
        registrable("red@canary", "red@production", BASE, registry)


def test_a_desired_state_that_goes_back_is_storage_that_is_away_and_not_overwritten(tmp_path: Path) -> None:
    files, other = EndpointFiles(str(tmp_path), "e"), EndpointFiles(str(tmp_path), "e")
    one = Registered(model="red@1", digest="d1")
    register(files, {"red": one})
    register(files, {"blue": one})
    desired = tmp_path / "endpoints" / "e" / "desired.json"
    newest = desired.read_bytes()
    desired.unlink()
    for access in (files.read, lambda: register(files, {"green": one})):
        with pytest.raises(StorageError, match="was at epoch 2 and is not there"):
            access()
    assert not desired.exists()
    register(other, {"stale": one})  # by a process that has seen nothing yet
    with pytest.raises(StorageError, match="was at epoch 2 and is at 1"):
        files.read()
    desired.write_bytes(newest)
    assert set(files.read().adapters) == {"red", "blue"}
