"""The same promises on a directory and on S3."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service import s3, storage
from service.domain import FileEntry
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError

pytest_plugins = ("tests.s3_endpoint",)

_PUBLISH_256_KIB = """
import sys
from pathlib import Path
from service import storage
from service.errors import StorageError
try:
    getattr(storage, sys.argv[1])(*([sys.argv[2], bytes(2**18)] if sys.argv[1] != "put_file"
                                    else [Path(sys.argv[3]), sys.argv[2]]))
except StorageError as error:
    print(error)
"""


def _everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_what_is_written_is_read_and_replaced(home: str) -> None:
    uri = storage.join(home, "a", "b.json")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"three")
    assert storage.read_bytes(uri) == b"three"
    assert storage.size(uri) == 5
    assert storage.exists(uri) and storage.exists(storage.join(home, "a"))


def test_absent_things_are_not_found_by_name(home: str) -> None:
    uri = storage.join(home, "absent")
    assert not storage.exists(uri)
    assert storage.list_names(uri) == []
    with pytest.raises(NotFoundError, match="absent"):
        storage.read_bytes(uri)
    with pytest.raises(NotFoundError, match="absent"):
        storage.size(uri)
    storage.delete_tree(uri)


def test_a_listing_is_exact_sorted_and_fresh(home: str) -> None:
    for name in ("10/x", "2/x", "1/x", "1/y/z", "plain", ".hidden"):
        storage.write_bytes(storage.join(home, name), b"")
    assert storage.list_names(home) == ["1", "10", "2", "plain"]
    assert storage.list_names(storage.join(home, "1")) == ["x", "y"]
    storage.write_bytes(storage.join(home, "1/later"), b"")
    assert storage.list_names(storage.join(home, "1")) == ["later", "x", "y"]
    assert not storage.exists(storage.join(home, "pla"))


def test_listing_and_deleting_more_than_one_page_is_whole(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BATCH_KEYS", 7)
    names = [f"{n:02d}" for n in range(30)]
    for name in names:
        storage.write_bytes(storage.join(s3_home, "many", name), b"")
    assert storage.list_names(storage.join(s3_home, "many")) == names
    storage.delete_tree(storage.join(s3_home, "many"))
    assert not storage.exists(s3_home)


def test_one_of_many_exclusive_creators_wins(home: str) -> None:
    uri = storage.join(home, "claim")

    def create(number: int) -> bool:
        try:
            storage.create_exclusive(uri, b"%d" % number)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_a_swap_needs_the_tag_that_was_read(home: str) -> None:
    uri = storage.join(home, "state")
    storage.compare_and_swap(uri, b"first", None)
    body, tag = storage.read_tagged(uri)
    assert body == b"first" and storage.tag(uri) == tag
    storage.compare_and_swap(uri, b"second", tag)
    for stale in (tag, None):
        with pytest.raises(ConflictError):
            storage.compare_and_swap(uri, b"third", stale)
    storage.delete_tree(uri)
    with pytest.raises(ConflictError):
        storage.compare_and_swap(uri, b"third", tag)
    assert not storage.exists(uri)


def test_concurrent_increments_by_swap_lose_none(home: str) -> None:
    uri = storage.join(home, "count")
    storage.write_bytes(uri, b"0")

    def increment(_: int) -> None:
        while True:
            body, tag = storage.read_tagged(uri)
            try:
                return storage.compare_and_swap(uri, b"%d" % (int(body) + 1), tag)
            except ConflictError:
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(24)))
    assert storage.read_bytes(uri) == b"24"


def test_a_deleted_tree_takes_no_neighbour_with_it(home: str) -> None:
    for name in ("1/a", "1/b/c", "10/a"):
        storage.write_bytes(storage.join(home, name), b"x")
    storage.delete_tree(storage.join(home, "1"))
    assert storage.list_names(home) == ["10"]


def test_a_file_goes_up_and_comes_back_verified(home: str, tmp_path: Path) -> None:
    source, uri = tmp_path / "source", storage.join(home, "file")
    source.write_bytes(os.urandom(300_000))
    entry = storage.put_file(source, uri)
    assert entry == FileEntry(bytes=300_000, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    storage.fetch_file(uri, tmp_path / "back" / "file", entry)
    assert (tmp_path / "back" / "file").read_bytes() == source.read_bytes()


def test_a_file_in_several_parts_goes_up_verified(s3_home: str, tmp_path: Path) -> None:
    source, uri = tmp_path / "large", storage.join(s3_home, "large")
    source.write_bytes(os.urandom(2**20) * (s3.SINGLE_PUT_BYTES // 2**20 + 1))
    entry = storage.put_file(source, uri)
    storage.fetch_file(uri, tmp_path / "back", entry)
    assert storage.size(uri) == entry.bytes == source.stat().st_size


@pytest.mark.parametrize("damage", [b"contenT", b"conten", b"content!", b""])
def test_a_corrupt_file_is_refused_by_name_and_leaves_nothing(home: str, tmp_path: Path, damage: bytes) -> None:
    uri, back = storage.join(home, "weights"), tmp_path / "back"
    storage.write_bytes(uri, damage)
    entry = FileEntry(bytes=7, sha256=hashlib.sha256(b"content").hexdigest())
    with pytest.raises(StorageError, match=r"weights is corrupt"):
        storage.fetch_file(uri, back / "weights", entry)
    with pytest.raises(NotFoundError):
        storage.fetch_file(storage.join(home, "absent"), back / "absent", None)
    assert _everything(back) == []


@pytest.mark.parametrize("verb", ["write_bytes", "create_exclusive", "put_file"])
def test_a_full_disk_names_the_path_and_leaves_no_file(tmp_path: Path, verb: str) -> None:
    disk, source = tmp_path / "disk", tmp_path / "source"
    disk.mkdir()
    source.write_bytes(bytes(2**18))
    script = (
        'mount -t tmpfs -o size=64k none "$1" || exit 77; shift; "$@"; code=$?; echo "left: $(ls -A "$0")"; exit $code'
    )
    command = [sys.executable, "-c", _PUBLISH_256_KIB, verb, str(disk / "file"), str(source)]
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(disk), str(disk), *command]
    done = subprocess.run(unshare, check=False, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system mounts nothing in a namespace of its own: run as root, or allow user namespaces")
    assert done.returncode == 0, done.stderr
    assert f"{disk}/file could not be written: No space left on device" in done.stdout
    assert done.stdout.endswith("left: \n")


def test_a_write_cut_short_keeps_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "home" / "file")
    storage.write_bytes(uri, b"old")
    command = [sys.executable, "-c", _PUBLISH_256_KIB, "write_bytes", uri]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )
    assert f"{uri} could not be written: File too large" in done.stdout
    assert storage.read_bytes(uri) == b"old"
    assert _everything(tmp_path) == ["home", "home/file"]


def test_a_file_in_the_way_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is in the way"):
        storage.create_exclusive(str(tmp_path / "file" / "claim"), b"")


def test_an_s3_failure_says_what_to_do_and_no_secret(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x could not be written.*Create the bucket") as caught:
        storage.write_bytes("s3://no-such-bucket/x", b"")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"could not be read.*Check AWS_ENDPOINT_URL") as caught:
        storage.read_bytes(storage.join(s3_home, "x"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_other_schemes_and_climbing_paths_are_refused() -> None:
    with pytest.raises(ConfigError, match="gs://"):
        storage.read_bytes("gs://bucket/x")
    with pytest.raises(ConfigError, match="leaves"):
        storage.join("/home", "a/../../etc")
    with pytest.raises(ConfigError, match="bucket"):
        storage.is_local("s3:///x")


def test_a_file_uri_is_its_path(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a%20b", b"x")
    assert storage.read_bytes(str(tmp_path / "a b")) == b"x"
