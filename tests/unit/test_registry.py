"""Publishing, pointing, fetching and deleting Models, on a directory and on S3, with real concurrent processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service import storage
from service.domain import FileEntry, ModelRef
from service.errors import ConfigError, ConflictError, ModelError, NotFoundError, StorageError
from service.registry import ManifestDraft, Registry, model_digest

pytest_plugins = ("tests.s3_endpoint",)

DRAFT = ManifestDraft(base_model="b", base_digest="00", renderer_digest="11", rank=4, alpha=8, metrics={"eval/loss": 1})

FULL = ManifestDraft(kind="full", method="full", base_model="b", base_digest="00", renderer_digest="11")

# Publishes, says so after each file, and then stands still until its standard input closes: a place to kill it.
_PUBLISHER = """
import sys
from pathlib import Path
from service.registry import ManifestDraft, Registry
stop_after = sys.argv[3]
def progress(name, entry):
    print(name, flush=True)
    if name == stop_after:
        sys.stdin.read()
draft = ManifestDraft(base_model="b", base_digest="00", renderer_digest="11", rank=4, alpha=8)
print(Registry(sys.argv[1]).publish("tickets", Path(sys.argv[2]), draft, progress).ref)
"""


@pytest.fixture
def registry(home: str) -> Registry:
    """An empty registry."""
    return Registry(home)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory of the shape that PEFT saves."""
    return _adapter(tmp_path / "adapter", b"weights")


def _adapter(directory: Path, weights: bytes) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def _full(directory: Path) -> Path:
    """A directory of the shape that transformers saves: two shards, their index, configuration and tokenizer."""
    directory.mkdir()
    shards = {f"t{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    for name in shards.values():
        (directory / name).write_bytes(name.encode())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    return directory


def _ref(text: str) -> ModelRef:
    return ModelRef.parse(text)


def _start_publisher(home: str, source: Path, stop_after: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PUBLISHER, home, str(source), stop_after]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_published_model_is_found_fetched_and_identical(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    (adapter / "README.md").write_text("# tickets")
    published = registry.publish("tickets", adapter, DRAFT)
    assert published.ref == "tickets@1"
    assert published.digest == model_digest(published.files)
    assert registry.manifest(_ref("tickets@1")) == published
    assert registry.models() == ["tickets"] and registry.versions("tickets") == [1]
    fetched = registry.fetch(_ref("tickets@1"), tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "adapters" / published.digest
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in adapter.iterdir()}
    assert registry.unfinished() == []


def test_a_full_model_is_published_and_fetched_among_the_base_models(registry: Registry, tmp_path: Path) -> None:
    source = _full(tmp_path / "full")
    published = registry.publish("tickets", source, FULL)
    assert (published.kind, published.method, published.rank, published.base_bits) == ("full", "full", 0, 16)
    assert registry.manifest(_ref("tickets@1")) == published
    fetched = registry.fetch(_ref("tickets@1"), tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "base_models" / published.digest
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}


def test_everything_wrong_with_a_full_model_is_said_at_once(registry: Registry, tmp_path: Path) -> None:
    source = _full(tmp_path / "bad")
    (source / "model-00002-of-00002.safetensors").unlink()
    (source / "tokenizer.json").unlink()
    (source / "config.json").write_text('{"auto_map": {"AutoModel": "evil.py"}}')
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        registry.publish("tickets", source, FULL)
    for reason in ("shards that are missing: model-00002-of-00002.safetensors", "tokenizer.json is missing", "auto_map",
                   "pytorch_model.bin may hold a pickle", "adapter_config.json makes", "as a full model"):  # fmt: skip
        assert reason in str(caught.value)
    assert registry.models() == [] and registry.unfinished() == []


def test_an_adapter_is_not_published_as_a_full_model_nor_the_other_way(
    registry: Registry, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"config\.json is missing; tokenizer\.json is missing .* load an adapter on top"
    ):
        registry.publish("tickets", adapter, FULL)
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing; adapter_model\.safetensors is missing"):
        registry.publish("tickets", _full(tmp_path / "full"), DRAFT)


@pytest.mark.parametrize(
    "facts",
    [{"kind": "full", "rank": 4}, {"kind": "full", "alpha": 8.0}, {"kind": "adapter"}, {"rank": 4, "alpha": 0.0}],
)
def test_rank_and_alpha_are_of_adapters_and_of_nothing_else(facts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="rank"):
        ManifestDraft(base_model="b", base_digest="00", renderer_digest="11", **facts)


def test_the_bits_of_the_base_and_the_method_are_recorded(registry: Registry, adapter: Path) -> None:
    registry.publish("tickets", adapter, DRAFT.model_copy(update={"method": "qlora", "base_bits": 4}))
    manifest = registry.manifest(_ref("tickets@1"))
    assert (manifest.method, manifest.base_bits) == ("qlora", 4)


def test_a_manifest_that_says_nothing_of_the_method_is_a_lora_on_an_unquantised_base(
    registry: Registry, adapter: Path
) -> None:
    published = registry.publish("tickets", adapter, DRAFT)
    written = published.model_dump_json(exclude={"method", "base_bits", "merged_from"}).encode()
    storage.write_bytes(storage.join(registry.home, "models/default/tickets/1/manifest.json"), written)
    assert registry.manifest(_ref("tickets@1")) == published


def test_a_model_that_others_are_built_on_is_not_deleted(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    registry.publish("merged", _full(tmp_path / "full"), FULL)
    registry.publish("search/tickets", adapter, DRAFT.model_copy(update={"base_model": "default/merged@1"}))
    with pytest.raises(ConflictError, match=r"search/tickets@1 \(it is its base model\) points at it"):
        registry.delete(_ref("merged@1"))
    assert registry.versions("merged") == [1]
    registry.delete(_ref("search/tickets@1"))
    registry.delete(_ref("merged@1"))
    assert registry.versions("merged") == []


def test_the_digest_is_of_content_not_of_version(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    other = _adapter(tmp_path / "other", b"Weights")
    first, second, third = (registry.publish("tickets", source, DRAFT) for source in (adapter, adapter, other))
    assert first.digest == second.digest != third.digest
    assert [first.ref, second.ref, third.ref] == ["tickets@1", "tickets@2", "tickets@3"]


def test_projects_do_not_collide(registry: Registry, adapter: Path) -> None:
    assert registry.publish("tickets", adapter, DRAFT).ref == "tickets@1"
    assert registry.publish("search/tickets", adapter, DRAFT).ref == "search/tickets@1"
    assert registry.models() == ["search/tickets", "tickets"]


def test_everything_wrong_with_a_directory_is_said_at_once(registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    (source / "sub").mkdir(parents=True)
    for name in ("model.bin", "x.PT", ".hidden", "claim.json", "manifest.json", "a b.txt"):
        (source / name).write_text("")
    (source / "adapter_model.safetensors").symlink_to("model.bin")
    with pytest.raises(ModelError) as caught:
        registry.publish("tickets", source, DRAFT)
    for name in ("adapter_config.json is missing", "model.bin", "x.PT", ".hidden", "claim", "manifest", "a b", "sub",
                 "adapter_model.safetensors is no regular file"):  # fmt: skip
        assert name in str(caught.value)
    assert registry.models() == [] and registry.unfinished() == []


@pytest.mark.parametrize("stop_after", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_killed_publisher_leaves_no_visible_version(
    registry: Registry, adapter: Path, tmp_path: Path, stop_after: str
) -> None:
    publisher = _start_publisher(registry.home, adapter, stop_after)
    assert publisher.stdout is not None
    with publisher:
        assert any(line.strip() == stop_after for line in publisher.stdout)
        publisher.kill()
    assert registry.models() == [] and registry.versions("tickets") == []
    for reader in (registry.resolve, registry.manifest, registry.delete):
        with pytest.raises(NotFoundError):
            reader(_ref("tickets@1"))
    with pytest.raises(NotFoundError):
        registry.fetch(_ref("tickets@1"), tmp_path / "cache")
    (left,) = registry.unfinished()
    assert left.endswith("/models/default/tickets/1")
    assert registry.publish("tickets", adapter, DRAFT).ref == "tickets@2"
    registry.discard(left)
    assert storage.list_names(left) == ["claim.json", "manifest.json"]
    assert registry.unfinished() == [] and registry.versions("tickets") == [2]
    assert registry.publish("tickets", adapter, DRAFT).ref == "tickets@3"


def test_two_publishers_at_once_get_two_versions(registry: Registry, adapter: Path) -> None:
    publishers = [_start_publisher(registry.home, adapter, "none") for _ in range(2)]
    refs = {publisher.communicate()[0].splitlines()[-1] for publisher in publishers}
    assert refs == {"tickets@1", "tickets@2"}
    assert registry.versions("tickets") == [1, 2]


def test_eight_threads_publishing_get_eight_versions(registry: Registry, adapter: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(lambda _: registry.publish("tickets", adapter, DRAFT).ref, range(8)))
    assert sorted(refs) == [f"tickets@{n}" for n in range(1, 9)]


def test_a_publisher_overtaken_by_a_clean_up_publishes_nothing(registry: Registry, adapter: Path) -> None:
    def clean_up(name: str, entry: FileEntry) -> None:
        for uri in registry.unfinished():
            registry.discard(uri)

    with pytest.raises(ConflictError, match="Publish again"):
        registry.publish("tickets", adapter, DRAFT, clean_up)
    assert registry.versions("tickets") == [] and registry.unfinished() == []


def test_a_published_version_is_never_discarded(registry: Registry, adapter: Path) -> None:
    registry.publish("tickets", adapter, DRAFT)
    with pytest.raises(ConflictError, match="published"):
        registry.discard(storage.join(registry.home, "models/default/tickets/1"))
    assert registry.versions("tickets") == [1]


def test_a_bare_name_means_production_and_never_the_latest(registry: Registry, adapter: Path) -> None:
    for _ in range(3):
        registry.publish("tickets", adapter, DRAFT)
    with pytest.raises(NotFoundError, match=r"bare name.*Versions of tickets: 1, 2, 3; aliases: none"):
        registry.resolve(_ref("tickets"))
    registry.set_alias("tickets", "production", 2)
    assert str(registry.resolve(_ref("tickets"))) == "tickets@2"
    assert str(registry.resolve(_ref("tickets@production"))) == "tickets@2"
    assert str(registry.resolve(_ref("tickets@3"))) == "tickets@3"


def test_an_unknown_name_is_answered_with_the_known_ones(registry: Registry, adapter: Path) -> None:
    registry.publish("tickets", adapter, DRAFT)
    registry.set_alias("tickets", "canary", 1)
    with pytest.raises(NotFoundError, match=r"Did you mean tickets\?.*Known models: tickets"):
        registry.resolve(_ref("ticket@1"))
    with pytest.raises(NotFoundError, match=r"tickets@stable. Versions of tickets: 1; aliases: canary -> 1"):
        registry.resolve(_ref("tickets@stable"))
    with pytest.raises(NotFoundError, match="tickets@7"):
        registry.set_alias("tickets", "canary", 7)
    with pytest.raises(NotFoundError, match="stable"):
        registry.delete_alias("tickets", "stable")
    with pytest.raises(ConfigError, match="would read as a version"):
        registry.set_alias("tickets", "3", 1)


def test_concurrent_alias_changes_all_take_effect(registry: Registry, adapter: Path) -> None:
    for _ in range(2):
        registry.publish("tickets", adapter, DRAFT)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: registry.set_alias("tickets", f"alias-{n}", 1 + n % 2), range(8)))
    assert registry.aliases("tickets") == {f"alias-{n}": 1 + n % 2 for n in range(8)}
    registry.delete_alias("tickets", "alias-0")
    assert "alias-0" not in registry.aliases("tickets")


def test_a_corrupted_file_is_refused_by_name_and_not_cached(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    registry.publish("tickets", adapter, DRAFT)
    storage.write_bytes(storage.join(registry.home, "models/default/tickets/1/adapter_model.safetensors"), b"weightS")
    with pytest.raises(StorageError, match=r"tickets/1/adapter_model\.safetensors is corrupt"):
        registry.fetch(_ref("tickets@1"), tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "adapters").iterdir() if not p.name.endswith(".lock")] == []


def test_concurrent_fetches_download_once(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    registry.publish("tickets", adapter, DRAFT)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: registry.fetch(_ref("tickets@1"), tmp_path / "cache"), range(8)))
    assert len(set(paths)) == 1
    inode = (paths[0] / "adapter_model.safetensors").stat().st_ino
    assert (registry.fetch(_ref("tickets@1"), tmp_path / "cache") / "adapter_model.safetensors").stat().st_ino == inode
    (paths[0] / "adapter_config.json").unlink()
    assert sorted(p.name for p in registry.fetch(_ref("tickets@1"), tmp_path / "cache").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_manifest_cannot_write_outside_the_cache(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    published = registry.publish("tickets", adapter, DRAFT)
    files = {"../../evil": published.files["adapter_config.json"]}
    hostile = published.model_copy(update={"files": files, "digest": model_digest(files)})
    uri = storage.join(registry.home, "models/default/tickets/1/manifest.json")
    storage.write_bytes(uri, hostile.model_dump_json().encode())
    with pytest.raises(StorageError, match="contradicts itself"):
        registry.fetch(_ref("tickets@1"), tmp_path / "cache")


def test_a_model_that_something_points_at_is_not_deleted(registry: Registry, adapter: Path) -> None:
    published = registry.publish("tickets", adapter, DRAFT)
    registry.set_alias("tickets", "production", 1)
    desired = {"epoch": 1, "adapters": {"default": {"model": "tickets@1", "digest": published.digest}}}
    storage.write_bytes(storage.join(registry.home, "endpoints/chat/desired.json"), json.dumps(desired).encode())
    with pytest.raises(ConflictError, match="alias 'production', endpoint 'chat'"):
        registry.delete(_ref("tickets@1"))
    assert registry.manifest(_ref("tickets@1")) == published
    registry.delete_alias("tickets", "production")
    storage.delete_tree(storage.join(registry.home, "endpoints/chat"))
    registry.delete(_ref("tickets@1"))
    assert registry.versions("tickets") == [] and registry.unfinished() == []
    assert registry.publish("tickets", adapter, DRAFT).ref == "tickets@2"


def test_an_unreadable_desired_state_stops_a_deletion(registry: Registry, adapter: Path) -> None:
    registry.publish("tickets", adapter, DRAFT)
    storage.write_bytes(storage.join(registry.home, "endpoints/chat/desired.json"), b"{")
    with pytest.raises(StorageError, match="nobody knows what it serves"):
        registry.delete(_ref("tickets@1"))
    assert registry.versions("tickets") == [1]


def test_an_alias_and_a_deletion_at_once_leave_no_dangling_alias(registry: Registry, adapter: Path) -> None:
    for version in range(1, 6):
        registry.publish("tickets", adapter, DRAFT)

        def point(number: int = version) -> None:
            registry.set_alias("tickets", f"to-{number}", number)

        def delete(number: int = version) -> None:
            registry.delete(_ref(f"tickets@{number}"))

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(point), pool.submit(delete)]:
                assert isinstance(future.exception(), (type(None), ConflictError, NotFoundError))
    assert set(registry.aliases("tickets").values()) <= set(registry.versions("tickets"))


def test_a_family_takes_no_version(registry: Registry, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="Write 'tickets'"):
        registry.publish("tickets@1", adapter, DRAFT)


def test_a_source_that_cannot_be_read_is_a_storage_error(tmp_path: Path, adapter: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything: run as another user")
    (adapter / "adapter_config.json").chmod(0)
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        Registry(str(tmp_path / "home")).publish("tickets", adapter, DRAFT)


def test_a_claim_that_is_young_is_not_taken_for_abandoned(home: str, tmp_path: Path) -> None:
    registry = Registry(home)
    created = datetime.now(UTC).isoformat()
    for version, claim in ((1, {"created_at": created}), (2, {"created_at": "2020-01-01T00:00:00+00:00"})):
        uri = storage.join(home, "models", "default", "tickets", str(version), "claim.json")
        storage.create_exclusive(uri, json.dumps(claim).encode())
    assert [uri.rsplit("/", 1)[1] for uri in registry.unfinished()] == ["1", "2"]
    assert [uri.rsplit("/", 1)[1] for uri in registry.unfinished(older_than_s=3600)] == ["2"]
