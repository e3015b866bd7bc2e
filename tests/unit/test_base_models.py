"""Base models: the same content is the same digest by every road, and what cannot be used is refused with every reason."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors.torch import load_file, save_file

from service import storage
from service.base_models import BUNDLED, resolve_base_model
from service.errors import ModelError, NotFoundError, StorageError
from service.registry import ManifestDraft, Registry
from tests.integration.tiny import save_base

pytest_plugins = ("tests.s3_endpoint",)

# The kernel ends the process in the middle of writing a file larger than 32 KiB: nothing of Python's cleans up.
_KILLED_WHILE_FETCHING = """
import resource, signal, sys
from pathlib import Path
from service.base_models import resolve_base_model
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
resolve_base_model(sys.argv[1], Path(sys.argv[2]))
"""

# One of two processes that train together, each on a node of its own.
_IN_A_GROUP = """
import sys
from pathlib import Path
import torch.distributed as dist
from service.base_models import BUNDLED, resolve_base_model
rank, store, cache = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
print(resolve_base_model(next(iter(BUNDLED)), cache).digest)
dist.barrier()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers saves it. Copied, never changed."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty LORAY_CACHE."""
    return tmp_path / "cache"


def _change_one_weight(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def _upload(directory: Path, uri: str) -> None:
    for file in sorted(directory.iterdir()):
        storage.put_file(file, storage.join(uri, file.name))


def _refused(name: str, cache: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_base_model(name, cache)
    return str(caught.value)


def test_a_directory_that_transformers_saved_resolves_to_itself(base: Path, cache: Path) -> None:
    found = resolve_base_model(str(base), cache)
    assert (found.path, found.name, len(found.digest)) == (base, str(base), 64)


def test_a_relative_and_a_home_path_resolve(
    base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {resolve_base_model(name, cache).path for name in ("base", "./base", "~/base", str(base))}
    assert paths == {base}


def test_a_copy_elsewhere_has_the_same_digest_and_one_changed_weight_another(base: Path, cache: Path) -> None:
    first = resolve_base_model(str(base), cache).digest
    copy = Path(shutil.copytree(base, base.parent / "copy"))
    assert resolve_base_model(str(copy), cache).digest == first
    _change_one_weight(copy)
    assert resolve_base_model(str(copy), cache).digest != first
    assert resolve_base_model(str(base), cache).digest == first


def test_the_architecture_counts_and_how_it_was_written_does_not(base: Path, cache: Path) -> None:
    first = resolve_base_model(str(base), cache).digest
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"}, indent=7)
    )
    assert resolve_base_model(str(base), cache).digest == first
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0, "rms_norm_eps": 0.1}))
    assert resolve_base_model(str(base), cache).digest != first


def test_the_digest_needs_no_cache(base: Path, cache: Path) -> None:
    first = resolve_base_model(str(base), cache).digest
    shutil.rmtree(cache)
    assert resolve_base_model(str(base), cache).digest == first


def test_all_that_is_wrong_with_a_directory_is_told_at_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "bad" / "config.json").write_text('{"auto_map": {"AutoModel": "evil.py"}}')
    message = _refused(str(tmp_path / "bad"), cache)
    for reason in ("auto_map", "no *.safetensors file", "pytorch_model.bin", "tokenizer.json is missing"):
        assert reason in message
    (tmp_path / "bad" / "config.json").unlink()
    assert "config.json is missing" in _refused(str(tmp_path / "bad"), cache)


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", b"\xff".decode("latin-1")])
def test_a_config_that_is_no_json_object_is_refused(base: Path, cache: Path, text: str) -> None:
    (base / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in _refused(str(base), cache)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~nobody-of-this-name/model"])
def test_a_path_that_is_no_directory_is_refused(name: str, cache: Path) -> None:
    assert "directory" in _refused(name, cache)


def test_an_unknown_name_names_the_bundled_one(cache: Path) -> None:
    assert "Did you mean smollm2-135m-instruct?" in _refused("smollm-135m-instruct", cache)
    assert f"Bundled: {', '.join(BUNDLED)}" in _refused("xyzzy", cache)


def test_a_hub_id_that_cannot_be_fetched_says_so(cache: Path) -> None:
    command = [sys.executable, "-c", _RESOLVE, "HuggingFaceTB/SmolLM2-135M-Instruct", str(cache)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert "could not be fetched from the hub" in done.stdout
    assert (
        "Check the id and the network, or give a local path. Or use the bundled smollm2-135m-instruct." in done.stdout
    )


_RESOLVE = """
import sys
from pathlib import Path
from service.base_models import resolve_base_model
from service.errors import ModelError
try:
    resolve_base_model(sys.argv[1], Path(sys.argv[2]))
except ModelError as error:
    print(error)
"""


def test_s3_gives_the_digest_of_the_local_copy_and_follows_a_change(base: Path, cache: Path, s3_home: str) -> None:
    uri = storage.join(s3_home, "base")
    _upload(base, uri)
    storage.write_bytes(storage.join(uri, "pytorch_model.bin"), b"pickle")
    local, remote = resolve_base_model(str(base), cache), resolve_base_model(uri, cache)
    assert remote.digest == local.digest and remote.name == uri
    assert not (remote.path / "pytorch_model.bin").exists()
    _change_one_weight(base)
    _upload(base, uri)
    changed = resolve_base_model(uri, cache)
    assert changed.digest != remote.digest
    assert changed.digest == resolve_base_model(str(base), cache).digest


def test_what_was_fetched_once_is_not_fetched_again(base: Path, cache: Path, s3_home: str) -> None:
    uri = storage.join(s3_home, "base")
    _upload(base, uri)
    first = resolve_base_model(uri, cache).path
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert resolve_base_model(uri, cache).path == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before


def test_an_empty_prefix_is_refused(s3_home: str, cache: Path) -> None:
    assert "Check bucket and prefix" in _refused(storage.join(s3_home, "nothing"), cache)


def test_a_published_full_model_is_a_base_model(base: Path, cache: Path, home: str) -> None:
    published = Registry(home).publish("tickets-merged", base, _draft("full"))
    found = resolve_base_model("tickets-merged@1", cache, home=home)
    assert found.path == cache / "base_models" / published.digest and found.name == "tickets-merged@1"
    assert found.digest == resolve_base_model(str(base), cache).digest
    _change_one_weight(found.path)
    with pytest.raises(ModelError, match=r"model\.safetensors in .* is not what was published"):
        resolve_base_model("tickets-merged@1", cache, home=home)


def test_the_environment_says_where_published_models_are(
    base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry(str(tmp_path / "home")).publish("search/merged", base, _draft("full"))
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    assert resolve_base_model("search/merged@1", cache).digest == resolve_base_model(str(base), cache).digest


def test_a_published_model_that_cannot_be_a_base_is_refused_with_what_to_write(
    base: Path, cache: Path, tmp_path: Path
) -> None:
    home, adapter = str(tmp_path / "home"), tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    registry = Registry(home)
    registry.publish("tickets", adapter, _draft("adapter"))
    registry.publish("merged", base, _draft("full"))
    registry.set_alias("merged", "production", 1)
    with pytest.raises(
        ModelError, match=r"is an adapter on b\. .*loray models merge tickets@1 --publish tickets-merged"
    ):
        resolve_base_model("tickets@1", cache, home=home)
    with pytest.raises(ModelError, match=r"is an alias, which may move .* Write merged@1\."):
        resolve_base_model("merged@production", cache, home=home)
    with pytest.raises(NotFoundError, match="Versions of merged: 1"):
        resolve_base_model("merged@2", cache, home=home)


def _draft(kind: Literal["adapter", "full"]) -> ManifestDraft:
    facts: dict[str, Any] = {"rank": 4, "alpha": 8.0} if kind == "adapter" else {}
    return ManifestDraft(kind=kind, base_model="b", base_digest="00", renderer_digest="11", **facts)


def test_a_process_killed_while_fetching_leaves_no_model_and_the_next_one_succeeds(
    base: Path, cache: Path, s3_home: str
) -> None:
    uri = storage.join(s3_home, "base")
    _upload(base, uri)
    killed = subprocess.run([sys.executable, "-c", _KILLED_WHILE_FETCHING, uri, str(cache)], check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert [p.name for p in (cache / "base_models").iterdir() if not p.name.startswith(".making-")] == []
    assert resolve_base_model(uri, cache).digest == resolve_base_model(str(base), cache).digest


def test_a_fetch_that_fails_leaves_nothing(base: Path, cache: Path, s3_home: str) -> None:
    uri = storage.join(s3_home, "base")
    _upload(base, uri)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))
    try:
        with pytest.raises((StorageError, ModelError)):
            resolve_base_model(uri, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((cache / "base_models").iterdir()) == []


def test_every_node_of_a_run_converts_the_bundled_model_for_itself(tmp_path: Path) -> None:
    """transformers saves on the first worker only, where workers have a process group."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _IN_A_GROUP, str(rank), str(tmp_path / "store"), str(tmp_path / f"node-{rank}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    digests = [worker.communicate(timeout=300)[0].split()[-1] for worker in workers]  # libraries print, too
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(digests[0]) == 64 and digests[0] == digests[1]
