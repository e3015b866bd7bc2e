"""Bytes under a URI: a directory or S3, with the same promises on both.

A URI is an absolute path, `file://...` or `s3://bucket/key`. A reader never sees half a file: every write goes aside,
is synced and renamed (S3: one PUT). `create_exclusive` lets one of many win; `compare_and_swap` replaces only what was
read. Names beginning with a dot are temporary or locks and are never listed. A directory must be on a file system with
hard links and flock (ext4, xfs, NFS v4). What is stored where is up to `logs.py`, `registry.py` and `runs.py`;
the S3 half is `s3.py`. Every failure is a LorayError that names the URI.

    body, tag = read_tagged(uri)
    compare_and_swap(uri, changed(body), tag)     # ConflictError: read again
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote

from service import s3
from service.domain import FileEntry
from service.errors import ConfigError, ConflictError, LorayError, NotFoundError, StorageError

_COPY_BYTES = 2**20
_PARALLEL_READS = 16
NameT = TypeVar("NameT")
ValueT = TypeVar("ValueT")


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/home", "runs", "x")` is `s3://b/home/runs/x`. A part that climbs out (`..`) is refused."""
    for part in parts:
        if ".." in part.split("/"):
            raise ConfigError(f"{part!r} leaves {uri}. Use names without '..'.")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """True for paths and file://, False for s3://; ConfigError for anything else."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return True
    if scheme != "s3":
        raise ConfigError(f"{scheme}:// is not supported. Use a directory or s3://bucket/prefix.")
    s3.bucket_and_key(uri)
    return False


def local_path(uri: str) -> Path:
    """The absolute path of a local URI."""
    if not is_local(uri):
        raise ConfigError(f"{uri} is not on this machine, and a directory is needed here. Name a local one.")
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    return Path(os.path.abspath(path))  # noqa: PTH100  resolve() would follow links: names stay as the user wrote them


def exists(uri: str) -> bool:
    """Whether a file, or a directory with something in it (locally: any directory), is there."""
    if not is_local(uri):
        return s3.exists(uri)
    with _reported(uri, "looked up"):
        return local_path(uri).exists()


def size(uri: str) -> int:
    """Bytes of a file; NotFoundError when absent."""
    if not is_local(uri):
        return s3.size(uri)
    with _reported(uri, "looked up"):
        return local_path(uri).stat().st_size


def stamp(uri: str) -> str:
    """Another one for every time that a file was written: the ETag on S3, else when it was changed. Nothing is read."""
    if not is_local(uri):
        return s3.tag(uri)
    with _reported(uri, "looked up"):
        return str(local_path(uri).stat().st_mtime_ns)


def tag(uri: str) -> str:
    """The tag that `read_tagged` would give: equal tags mean equal content. On S3 nothing is read for it."""
    return s3.tag(uri) if not is_local(uri) else read_tagged(uri)[1]


def read_bytes(uri: str) -> bytes:
    """The whole file; NotFoundError when absent."""
    return read_tagged(uri)[0]


def read_tagged(uri: str) -> tuple[bytes, str]:
    """Content, and the tag that `compare_and_swap` wants: the ETag on S3, the content's sha256 locally."""
    if not is_local(uri):
        return s3.read_tagged(uri)
    with _reported(uri, "read"):
        data = local_path(uri).read_bytes()
    return data, hashlib.sha256(data).hexdigest()


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The files' contents in this order."""
    return read_together(read_bytes, uris, uris[0]) if uris else []


def read_together(read: Callable[[NameT], ValueT], names: Sequence[NameT], home: str) -> list[ValueT]:
    """`read` of each name, in this order; where `home` is on S3 sixteen at a time, because each costs a round trip."""
    if is_local(home):
        return [read(name) for name in names]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(read, names))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Of each (uri, start, length) just these bytes, in this order; on S3 sixteen requests at a time."""
    if not ranges or is_local(ranges[0][0]):
        return [_read_range(*one) for one in ranges]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(lambda one: s3.read_range(*one), ranges))


def _read_range(uri: str, start: int, length: int) -> bytes:
    with _reported(uri, "read"), local_path(uri).open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def read_chunks(uri: str, num_bytes: int) -> Iterator[bytes]:
    """The first so many bytes, a few MiB at a time; fewer where the file is shorter. All are of one content on S3."""
    if not is_local(uri):
        yield from s3.read_chunks(uri, num_bytes)
        return
    with _reported(uri, "read"), local_path(uri).open("rb") as stream:
        while num_bytes and (chunk := stream.read(min(num_bytes, _COPY_BYTES))):
            num_bytes -= len(chunk)
            yield chunk


def open_read(uri: str) -> BinaryIO:
    """The file as a stream that can seek; NotFoundError when absent. On S3 it reads ranges, all of one content."""
    if not is_local(uri):
        return s3.open_read(uri)
    with _reported(uri, "read"):
        return local_path(uri).open("rb")


def write_bytes(uri: str, data: bytes) -> None:
    """Creates or replaces the file at once. Missing directories are made."""
    if not is_local(uri):
        s3.put(uri, data)
        return
    path = local_path(uri)
    with _reported(uri, "written"), _written_aside(path, data) as temporary:
        temporary.replace(path)


def write_chunks(uri: str, chunks: Sequence[bytes | memoryview]) -> FileEntry:
    """`write_bytes` for what is not in one piece, without putting it together. Chunks are of bytes: a memoryview casts "B"."""
    digest, count = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        count += len(chunk)
    if not is_local(uri):
        s3.put_chunks(uri, chunks)
    else:
        path = local_path(uri)
        with _reported(uri, "written"), _aside(path, lambda out: out.writelines(chunks)) as temporary:
            temporary.replace(path)
    return FileEntry(bytes=count, sha256=digest.hexdigest())


def write_stream(local: Path, chunks: Iterable[bytes]) -> FileEntry:
    """Creates or replaces a file of this machine from pieces as they come: aside, synced, then renamed."""
    digest, count = hashlib.sha256(), 0

    def fill(out: BinaryIO) -> None:
        nonlocal count
        for chunk in chunks:
            digest.update(chunk)
            count += out.write(chunk)

    with _reported(str(local), "written"), _aside(local, fill) as temporary:
        temporary.replace(local)
    return FileEntry(bytes=count, sha256=digest.hexdigest())


def create_exclusive(uri: str, data: bytes) -> None:
    """Creates the file, whole, or raises ConflictError because it exists: of many callers one returns."""
    if not is_local(uri):
        s3.put(uri, data, IfNoneMatch="*")
        return
    path = local_path(uri)
    with _reported(uri, "written"), _written_aside(path, data) as temporary:
        os.link(temporary, path)


def compare_and_swap(uri: str, data: bytes, tag: str | None) -> None:
    """Replaces the content that `read_tagged` gave with `tag`; None: must not exist yet. ConflictError if changed."""
    if tag is None:
        create_exclusive(uri, data)
    elif is_local(uri):
        path = local_path(uri)
        with _reported(uri, "written"), locked(path):
            _check_unchanged(uri, tag)
            write_bytes(uri, data)
    else:
        try:
            s3.put(uri, data, IfMatch=tag)
        except NotFoundError as error:
            raise _changed(uri) from error


def list_names(uri: str) -> list[str]:
    """Names of the direct children, sorted; [] when absent. Always fresh."""
    if not is_local(uri):
        return [name for name in s3.list_names(uri) if not name.startswith(".")]
    with _reported(uri, "listed"):
        try:
            return sorted(path.name for path in local_path(uri).iterdir() if not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []


def list_torn(uri: str) -> list[str]:
    """Names of the temporary files directly below a directory, of writers that live or were killed; [] on S3."""
    if not is_local(uri):
        return []
    with _reported(uri, "listed"):
        return sorted(path.name for path in local_path(uri).glob(".*.part"))


def put_file(local: Path, uri: str) -> FileEntry:
    """Copies a local file to `uri`, makes sure that what arrived is what was read, and returns its size and sha256."""
    entry = sha256_file(local)
    if not is_local(uri):
        with _reported(str(local), "read"):
            s3.put_file(local, uri, entry)
        return entry
    path = local_path(uri)
    with _reported(uri, "written"), _aside(path, lambda out: _copy(local, out)) as temporary:
        _verify(temporary, entry, str(local))
        temporary.replace(path)
    return entry


def fetch_file(uri: str, local: Path, entry: FileEntry | None) -> None:
    """Copies `uri` to `local`: aside, verified against `entry` if given, then renamed. Nothing remains of a failure."""
    with _reported(str(local), "written"):
        if is_local(uri):
            filled = _aside(local, lambda out: _copy(local_path(uri), out))
        else:
            filled = _aside(local, lambda out: s3.get_file(uri, Path(out.name)))
        with filled as temporary:
            _verify(temporary, entry or FileEntry(bytes=size(uri), sha256=""), uri)
            temporary.replace(local)


def delete_tree(uri: str) -> None:
    """Deletes a file, or a directory and all below. Absent is fine."""
    if not is_local(uri):
        s3.delete_tree(uri)
        return
    path = local_path(uri)
    with _reported(uri, "deleted"):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            return  # somebody else deleted it: that is what was wanted


def free_bytes(uri: str) -> int | None:
    """What may still be written below a directory that exists or will; None on S3, which has no end."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    with _reported(uri, "looked up"):
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def sha256_file(path: Path) -> FileEntry:
    """Size and sha256 of a local file."""
    digest, count = hashlib.sha256(), 0
    with _reported(str(path), "read"), path.open("rb") as stream:
        while chunk := stream.read(_COPY_BYTES):
            digest.update(chunk)
            count += len(chunk)
    return FileEntry(bytes=count, sha256=digest.hexdigest())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `.<name>.lock` beside a local path, among threads and processes; its owner's death frees it."""
    # The lock file is never unlinked: whoever waits on an unlinked one would hold a lock that nobody else can see.
    with _reported(str(path), "locked"):
        _make_directory(path.parent)
        lock = (path.parent / f".{path.name}.lock").open("ab")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_unchanged(uri: str, tag: str) -> None:
    try:
        current = read_tagged(uri)[1]
    except NotFoundError as error:
        raise _changed(uri) from error
    if current != tag:
        raise _changed(uri)


def _changed(uri: str) -> ConflictError:
    return ConflictError(f"{uri} was changed by somebody else meanwhile. Read it again, then repeat.")


@contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    with _aside(path, lambda out: out.write(data)) as temporary:
        yield temporary


@contextmanager
def _aside(path: Path, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A synced temporary file beside `path`, gone at the end whatever happens; the caller renames or links it."""
    _make_directory(path.parent)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as out:
            fill(out)
        _sync(temporary)
        yield temporary
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path} cannot be made a directory: a file is in the way. Move that file away.") from error


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name[:200]}.{secrets.token_hex(6)}.part"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, out: BinaryIO) -> None:
    with _reported(str(source), "read"):
        stream = source.open("rb")
    with stream:
        shutil.copyfileobj(stream, out, _COPY_BYTES)


def _verify(path: Path, want: FileEntry, source: str) -> None:
    got = sha256_file(path) if want.sha256 else FileEntry(bytes=path.stat().st_size, sha256="")
    if got.bytes != want.bytes or (want.sha256 and got.sha256 != want.sha256):
        raise StorageError(
            f"{source} is corrupt: it has {got.bytes} bytes, sha256 {got.sha256}, and should have {want.bytes} bytes, "
            f"sha256 {want.sha256 or 'any'}. Restore it from where it came from, or publish it again."
        )


@contextmanager
def _reported(uri: str, verb: str) -> Iterator[None]:
    try:
        yield
    except LorayError:
        raise
    except FileNotFoundError as error:
        if verb == "written":
            raise StorageError(f"{uri} could not be written: its directory went away. Mount it again.") from error
        raise NotFoundError(f"{uri} does not exist.") from error
    except FileExistsError as error:
        raise ConflictError(f"{uri} exists already. Take another name, or read it again and repeat.") from error
    except OSError as error:
        where = error.filename or uri
        raise StorageError(
            f"{uri} could not be {verb}: {error.strerror or error} ({where}). {_advice(error)}"
        ) from error


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space there, or point LORAY_HOME or LORAY_CACHE to a larger disk; nothing half-written remains."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give this user the right to it, or point LORAY_HOME or LORAY_CACHE elsewhere."
    return "Check the disk and the path, then repeat."
