"""Adapters at URIs: nothing outside the roots is read by any spelling, nothing too large, nothing but what was pinned."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from serve.adapter_uris import MAX_URI, AdapterUris, checked_root
from serve.desired import Base
from serve.registration import from_uri
from serve.routing import Source
from service import storage
from service.domain import FileEntry
from service.errors import ConfigError, ConflictError, LorayError, ModelError, NotFoundError
from service.registry import ManifestDraft, Registry, model_digest

pytest_plugins = ("tests.s3_endpoint",)
BASE = Base("org/Base", "org/Base", None, None, "b" * 64, "c" * 64)
DRAFT = ManifestDraft(base_model="Base", base_digest=BASE.digest, renderer_digest=BASE.renderer_digest, rank=4, alpha=8)
SECRET = b'{"secret": "outside"}'


def write_adapter(directory: Path, weights: bytes = b"weights", base: str | None = "elsewhere/base") -> Path:
    directory.mkdir(parents=True)
    config = {"r": 4, "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def upload(directory: Path, uri: str) -> str:
    for file in directory.iterdir():
        storage.put_file(file, storage.join(uri, file.name))
    return uri


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter, `good`; beside it, outside, `secret` with another."""
    write_adapter(tmp_path / "root" / "good")
    write_adapter(tmp_path / "secret", SECRET)
    return tmp_path / "root"


@pytest.fixture
def uris(root: Path) -> AdapterUris:
    return AdapterUris((str(root),))


def pinned(uris: AdapterUris, uri: str) -> Source:
    return uris.pin(uris.look(uri), BASE.digest)


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_an_adapter_is_pinned_by_content_and_fetched_as_it_was(
    place: str, root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(root / "good")
    if place == "s3":
        uri = upload(root / "good", f"{request.getfixturevalue('s3_home')}/adapters/good")
    uris = AdapterUris((uri.removesuffix("/good"),))
    source = pinned(uris, uri)
    expected = {name: storage.sha256_file(root / "good" / name) for name in source.files}
    assert source == Source(uri=uri, base_digest=BASE.digest, files=expected) and len(expected) == 2
    fetched = uris.fetch(source, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "adapters" / model_digest(source.files)
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"weights"

    storage.write_bytes(f"{uri}/adapter_model.safetensors", b"changed")
    assert uris.fetch(source, tmp_path / "cache") == fetched, "what was pinned is on this node"
    with pytest.raises(ModelError, match="changed since it was registered"):
        uris.fetch(source, tmp_path / "other")
    assert not [p for p in (tmp_path / "other" / "adapters").iterdir() if not p.name.endswith(".lock")]
    assert pinned(uris, uri).files != source.files, "PUT again, it is another adapter"
    storage.delete_tree(f"{uri}/adapter_model.safetensors")
    with pytest.raises(NotFoundError, match="does not exist"):
        uris.fetch(source, tmp_path / "other")


def test_the_same_adapter_has_the_same_digest_from_the_registry_and_from_a_uri(root: Path, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "home"))
    plain = registry.publish("tickets", root / "good", DRAFT)
    entry = from_uri("mine", str(root / "good"), None, BASE, AdapterUris((str(root),)))
    assert entry.digest == plain.digest
    assert entry.model == f"mine@sha256-{plain.digest[:12]}"

    (root / "good" / "README.md").write_text("# more")  # a third file, which the registry keeps and counts
    more = registry.publish("tickets", root / "good", DRAFT)
    version = str(tmp_path / "home" / "models" / "default" / "tickets" / "2")
    assert more.digest != plain.digest
    assert from_uri("mine", version, None, BASE, AdapterUris((str(tmp_path / "home"),))).digest == more.digest
    assert from_uri("mine", str(root / "good"), None, BASE, AdapterUris((str(root),))).digest == plain.digest


@pytest.mark.parametrize(
    "uri",
    [
        "{root}/../secret",
        "{root}/good/../../secret",
        "{root}/./../secret/.",
        "file://{root}/../secret",
        "file://{root}/%2e%2e/secret",
        "file://{root}%2F..%2fsecret",
        "{root}-evil",
        "{root}/link",
        "{root}/nested/link",
        "{root}/link-to-parent/secret",
        "/",
        "/etc",
        "/proc/self/cwd",
        "{tmp}/nowhere",
    ],
)
def test_no_spelling_leads_out_of_the_roots(uri: str, root: Path, uris: AdapterUris) -> None:
    write_adapter(Path(f"{root}-evil"))
    (root / "link").symlink_to(root.parent / "secret")
    (root / "nested").mkdir()
    (root / "nested" / "link").symlink_to("../../secret")
    (root / "link-to-parent").symlink_to("..")
    with pytest.raises(ConfigError, match="outside the directories"):
        uris.look(uri.format(root=root, tmp=root.parent))


@pytest.mark.parametrize(
    "uri",
    [
        "good",
        "./good",
        "~/good",
        "file:good",
        "file://good",
        "file://localhost{root}/good",
        "http://127.0.0.1/good",
        "FILE://{root}/good",
        "gs://bucket/good",
        "{root}/good\0",
        "{root}/go\nod",
        "file://{root}/good%00",
        "{root}/\ud800",
        "",
        "/" + "x" * MAX_URI,
    ],
)
def test_what_is_no_absolute_uri_of_ours_is_refused(uri: str, root: Path, uris: AdapterUris) -> None:
    with pytest.raises(ConfigError):
        uris.look(uri.format(root=root))


@pytest.mark.parametrize("name", ["%2e%2e", "%252e%252e", "x" * 300])
def test_a_path_is_not_decoded_twice(name: str, root: Path, uris: AdapterUris) -> None:
    for uri in (f"{root}/{name}/secret", f"file://{root}/{name.replace('%', '%25')}/secret"):
        with pytest.raises((NotFoundError, ConfigError)) as caught:
            uris.look(uri)
        assert "outside" not in str(caught.value), "it is a name below the root, and nothing has it"


def test_links_inside_the_roots_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "now").symlink_to("good")
    (tmp_path / "mounted").symlink_to(root)  # the root's own path may go through one
    blob = root / "blobs" / "weights"
    blob.parent.mkdir()
    shutil.move(root / "good" / "adapter_model.safetensors", blob)
    (root / "good" / "adapter_model.safetensors").symlink_to("../blobs/weights")
    uris = AdapterUris((str(tmp_path / "mounted"),))
    one, two = (pinned(uris, f"{tmp_path / prefix}/now") for prefix in ("root", "mounted"))
    assert one.files == two.files
    assert uris.fetch(two, tmp_path / "cache").joinpath("adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
def test_a_file_that_is_a_link_to_outside_is_refused(name: str, root: Path, uris: AdapterUris) -> None:
    (root / "good" / name).unlink(missing_ok=True)
    (root / "good" / name).symlink_to(root.parent / "secret" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="link to outside"):
        uris.look(str(root / "good"))


def test_a_link_put_there_after_the_look_is_not_followed(root: Path, uris: AdapterUris, tmp_path: Path) -> None:
    found = uris.look(str(root / "good"))
    source = uris.pin(found, BASE.digest)
    place = uris._place(str(root / "good"))  # resolved: from here on only the opening can notice
    shutil.rmtree(root / "good")
    (root / "good").symlink_to(root.parent / "secret")
    with pytest.raises(ConfigError, match="link"):
        place.size("adapter_model.safetensors")
    with pytest.raises(ConfigError, match="link"):
        place.names()
    for read in (lambda: uris.pin(found, BASE.digest), lambda: uris.fetch(source, tmp_path / "cache")):
        with pytest.raises(ConfigError, match="outside"):
            read()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(root: Path, uris: AdapterUris) -> None:
    weights = root / "good" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ModelError, match="no regular file"):
        uris.look(str(root / "good"))
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ModelError, match="no regular file"):
        uris.look(str(root / "good"))


def test_sizes_are_limited_before_anything_is_read(root: Path) -> None:
    weights = root / "good" / "adapter_model.safetensors"
    os.truncate(weights, 2**40)  # a hole: reading it would take minutes
    uris = AdapterUris((str(root),), max_bytes=2**31)
    with pytest.raises(ModelError, match=r"1099511\d+ bytes, this endpoint takes at most 2147483648"):
        uris.look(str(root / "good"))
    os.truncate(weights, 10)
    os.truncate(root / "good" / "adapter_config.json", 2**30)
    with pytest.raises(ModelError, match=r"1073741824 bytes, at most 1048576"):
        uris.look(str(root / "good"))


def test_a_file_that_grows_is_read_no_further_than_it_was_pinned(root: Path, uris: AdapterUris, tmp_path: Path) -> None:
    found = uris.look(str(root / "good"))
    source = uris.pin(found, BASE.digest)
    os.truncate(root / "good" / "adapter_model.safetensors", 2**20)
    one_byte_more = hashlib.sha256(b"weights\0").hexdigest()[:12]
    with pytest.raises(ModelError, match=f"changed since it was registered: it is sha256 {one_byte_more} now"):
        uris.fetch(source, tmp_path / "cache")
    os.truncate(root / "good" / "adapter_model.safetensors", 3)
    with pytest.raises(ConflictError, match="changed while"):
        uris.pin(found, BASE.digest)


@pytest.mark.parametrize("kept", [(), ("adapter_config.json",), ("adapter_model.safetensors",)])
def test_pickles_are_no_weights(kept: tuple[str, ...], root: Path, uris: AdapterUris) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if name not in kept:
            (root / "good" / name).unlink()
    (root / "good" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"missing \(found: .*adapter_model.bin\).*never pickles"):
        uris.look(str(root / "good"))


def test_files_that_are_not_needed_are_not_read(root: Path, uris: AdapterUris, tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "evil.py", "manifest.json", ".hidden"):
        (root / "good" / name).write_text("[]")
    source = pinned(uris, str(root / "good"))
    assert sorted(source.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in uris.fetch(source, tmp_path / "cache").iterdir()) == sorted(source.files)


def test_a_manifest_of_other_files_is_refused(root: Path, uris: AdapterUris, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "home"))
    manifest = registry.publish("tickets", root / "good", DRAFT)
    file = root / "good" / "manifest.json"
    file.write_text(manifest.model_dump_json())
    assert model_digest(pinned(uris, str(root / "good")).files) == manifest.digest
    (root / "good" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ModelError, match="other content"):
        pinned(uris, str(root / "good"))
    entry = FileEntry(bytes=1, sha256="0" * 64)
    for name in ("../../secret/adapter_model.safetensors", "training_args.bin", "/etc/passwd"):
        file.write_text(manifest.model_copy(update={"files": {**manifest.files, name: entry}}).model_dump_json())
        with pytest.raises(ModelError, match="of no adapter"):
            uris.look(str(root / "good"))


@pytest.mark.parametrize(
    ("config", "vouched", "said"),
    [
        ("meta/other", None, "made for base model 'meta/other', this endpoint serves 'org/Base'"),
        ("/home/me/BASE/", None, ""),
        ("base", None, ""),
        (None, None, ""),
        ("meta/other", "org/Base", ""),
        ("meta/other", "meta/other", "base_model is 'meta/other'"),
    ],
)
def test_the_base_is_judged_by_name_where_nothing_better_is_known(
    config: str | None, vouched: str | None, said: str, root: Path
) -> None:
    write_adapter(root / "one", base=config)
    uris = AdapterUris((str(root),))
    if said:
        with pytest.raises(ModelError, match=said):
            from_uri("one", str(root / "one"), vouched, BASE, uris)
    else:
        assert from_uri("one", str(root / "one"), vouched, BASE, uris).source


def test_a_manifest_decides_on_the_base_before_any_name(root: Path, tmp_path: Path) -> None:
    write_adapter(root / "one", base="org/Base")
    foreign = Registry(str(tmp_path / "home")).publish(
        "one", root / "one", DRAFT.model_copy(update={"base_digest": "f" * 64, "renderer_digest": "e" * 64})
    )
    (root / "one" / "manifest.json").write_text(foreign.model_dump_json())
    with pytest.raises(ModelError, match=r"f{12}.*e{12}"):
        from_uri("one", str(root / "one"), BASE.name, BASE, AdapterUris((str(root),)))


@pytest.mark.parametrize("label", ["../x", "a/b", "a@1", "UPPER", "", "..", "x" * 65, BASE.name])
def test_a_label_of_a_uri_is_a_plain_name(label: str, root: Path, uris: AdapterUris) -> None:
    with pytest.raises((ConfigError, ConflictError)):
        from_uri(label, str(root / "good"), None, BASE, uris)


@pytest.mark.parametrize("content", ["[", "[]", "nul", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_config_that_is_no_object_raises_our_error_or_says_nothing_of_its_base(
    content: str, root: Path, uris: AdapterUris
) -> None:
    (root / "good" / "adapter_config.json").write_text(content)
    try:
        assert uris.look(str(root / "good")).base_name is None
    except LorayError as error:
        assert "JSON" in str(error)


def test_without_roots_nothing_is_read_and_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_roots in the serve file"):
        AdapterUris().look(str(root / "good"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("{prefix}-evil/good", "outside"),
        ("{prefix}/../secret/good", "no plain key"),
        ("{prefix}/./good", "no plain key"),
        ("{prefix}//good", "no plain key"),
        ("{prefix}/%2e%2e/secret", "no plain key"),
        ("{prefix}/good?versionId=1", "no plain key"),
        ("{prefix}/good#x", "no plain key"),
        ("{prefix}/..\\secret", "no plain key"),
        ("s3://other-bucket/adapters/good", "outside"),
        ("s3://{bucket}.evil/adapters/good", "outside"),
        ("s3://{bucket}", "outside"),
        ("s3://", "no bucket"),
        ("s3://key:secret@{bucket}/adapters/good", "credentials"),
        ("S3://{bucket}/adapters/good", "not supported"),
        ("/{prefix}/good", "not supported"),
        ("{prefix}/nothing", "nothing lies"),
    ],
)
def test_an_s3_uri_is_below_a_prefix_part_by_part(uri: str, said: str, root: Path, s3_home: str) -> None:
    for name in ("adapters/good", "adapters-evil/good", "secret/good"):
        upload(root / "good", f"{s3_home}/{name}")
    prefix = f"{s3_home}/adapters"
    uris = AdapterUris((f"{prefix}/", str(root)))
    assert uris.look(f"{prefix}/good/").sizes == uris.look(str(root / "good")).sizes
    with pytest.raises((ConfigError, NotFoundError), match=said):
        uris.look(uri.format(prefix=prefix, bucket=s3_home.split("/")[2]))
    with pytest.raises(ModelError, match="at most 8"):
        AdapterUris((prefix,), max_bytes=8).look(f"{prefix}/good")


def test_a_root_is_an_existing_directory_or_a_plain_prefix(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert checked_root("good") == checked_root(f"file://{root}/good/") == str(root / "good")
    assert checked_root("s3://bucket/adapters/") == "s3://bucket/adapters"
    for bad in (f"{root}/nowhere", f"{root}/good/adapter_config.json", "s3://", "s3://b/../c", "gs://b/c"):
        with pytest.raises(ConfigError):
            checked_root(bad)


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_chunks_are_the_first_bytes_of_one_content(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.s3._PART_BYTES", 4)
    uri = f"{tmp_path if place == 'directory' else request.getfixturevalue('s3_home')}/file"
    storage.write_bytes(uri, b"0123456789")
    for count in (0, 3, 4, 10, 99):
        assert b"".join(storage.read_chunks(uri, count)) == b"0123456789"[:count]
    storage.write_bytes(uri, b"")
    assert b"".join(storage.read_chunks(uri, 5)) == b""
    storage.write_bytes(uri, b"0123456789")
    if place == "s3":
        chunks = storage.read_chunks(uri, 10)
        next(chunks)
        storage.write_bytes(uri, b"9876543210")
        with pytest.raises(ConflictError, match="somebody else"):
            next(chunks)
