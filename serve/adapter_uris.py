"""Adapters that lie at URIs: which may be read, what exactly they are, and how their bytes get to a node.

    uris = AdapterUris(("/mnt/adapters", "s3://models/adapters"), max_bytes=2**31)
    found = uris.look("s3://models/adapters/tickets")    # names, sizes and small files: no weight is read
    source = uris.pin(found, base_digest)                # what it is, by content: kept in the desired state
    directory = uris.fetch(source, cache)                # on every replica, verified against `source`

Who may write below a root is not trusted: `..`, links and other encodings of a way out are resolved first and refused
outside, and again whenever a file is opened, link by link (openat with O_NOFOLLOW), so that nothing can be exchanged in
between. Read are an adapter's two files, and those that loray's own manifest names where one stands beside them; sizes are
known before the first byte is read, and no more is read. Whether the endpoint wants it is asked in `registration.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from serve.routing import Source
from service import storage
from service.domain import FileEntry, Manifest
from service.errors import ConfigError, ConflictError, LorayError, ModelError, NotFoundError, StorageError
from service.publishable import ADAPTER_FILES, name_problem
from service.registry import cached_copy, model_digest

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
MAX_JSON_BYTES = 2**20  # of adapter_config.json and manifest.json, which are read into memory
MAX_URI = 2048
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Found:
    """What stands at a URI. `base_name` is adapter_config.json's own word; a loray manifest, where there is one, knows more."""

    uri: str
    sizes: Mapping[str, int]  # bytes of each file that is read
    base_name: str | None
    manifest: Manifest | None


@dataclass(frozen=True)
class AdapterUris:
    """The URIs that an endpoint reads adapters from: those below `roots`, of at most `max_bytes` together."""

    roots: tuple[str, ...] = ()
    max_bytes: int = 2**31

    def look(self, uri: str) -> Found:
        """Names, sizes, config and manifest. ConfigError outside the roots, ModelError for what is no adapter."""
        place = self._place(uri)
        manifest = _manifest(place)
        sizes = _sizes(place, tuple(manifest.files) if manifest else ADAPTER_FILES)
        total = sum(sizes.values())
        if total > self.max_bytes:
            raise ModelError(
                f"{uri} holds an adapter of {total} bytes, this endpoint takes at most {self.max_bytes}. "
                "Raise adapter_max_bytes in the serve file, or train with a smaller rank."
            )
        base_name = _json(place, CONFIG_FILE, sizes[CONFIG_FILE]).get("base_model_name_or_path")
        return Found(uri, sizes, base_name if isinstance(base_name, str) and base_name else None, manifest)

    def pin(self, found: Found, base_digest: str) -> Source:
        """Reads all of it once for its sha256. ModelError if a manifest beside it tells of other files."""
        place = self._place(found.uri)
        files = {name: _hashed(place, name, size) for name, size in found.sizes.items()}
        if found.manifest and (files != found.manifest.files or model_digest(files) != found.manifest.digest):
            other = [name for name in files if files[name] != found.manifest.files[name]]
            raise ModelError(
                f"{found.uri}/manifest.json tells of other content than lies there ({', '.join(other) or 'its digest'}). "
                "Copy the whole version again, or delete manifest.json from the copy."
            )
        return Source(uri=found.uri, base_digest=base_digest, files=files)

    def fetch(self, source: Source, cache: Path) -> Path:
        """`cache/adapters/<digest>/` with just what was pinned, copied once however many ask at once.

        ModelError when other content lies at the URI now; StorageError when it cannot be read at the moment.
        """

        def fetch(name: str, local: Path, entry: FileEntry) -> None:
            _copied(self._place(source.uri), name, local, entry)

        return cached_copy(cache / "adapters" / model_digest(source.files), source.files, fetch)

    def _place(self, uri: str) -> _Place:
        """Where to read, or ConfigError. Says the same of what is not there and of what is, outside the roots."""
        if not self.roots:
            raise ConfigError(
                "this endpoint takes adapters from its registry only. Publish it and name its version (model: NAME@1), "
                "or list the directories and s3:// prefixes that may be read as adapter_roots in the serve file."
            )
        if not 0 < len(uri) <= MAX_URI or not uri.isprintable():
            raise ConfigError(f"uri {uri[:100]!r} must be 1 to {MAX_URI} printable characters.")
        place = _directory_below(self.roots, uri) if storage.is_local(uri) else _prefix_below(self.roots, uri)
        if place is None:
            raise ConfigError(
                f"uri {uri!r} lies outside the directories that this endpoint may read: {', '.join(self.roots)}. "
                "Copy the adapter there, or add its directory to adapter_roots in the serve file."
            )
        return place


def checked_root(root: str) -> str:
    """A root of the serve file: an absolute directory of this node, or an s3:// prefix. ConfigError otherwise."""
    if not storage.is_local(root):
        _segments(root)
        return root.rstrip("/")
    path = storage.local_path(root)
    if not path.is_dir():
        raise ConfigError(f"{root!r} is no directory on this machine. Make it, or correct the path.")
    return str(path)


@dataclass(frozen=True)
class _Directory:
    """`root` and `path`, resolved. Links of files are followed as long as they stay below the root."""

    uri: str
    root: Path
    path: Path

    def size(self, name: str) -> int:
        with self._open(name) as stream:
            return os.fstat(stream.fileno()).st_size

    def chunks(self, name: str, num_bytes: int) -> Iterator[bytes]:
        with self._open(name) as stream:
            while num_bytes and (chunk := stream.read(min(num_bytes, _CHUNK_BYTES))):
                num_bytes -= len(chunk)
                yield chunk

    def names(self) -> list[str]:
        with _reported(self.uri):
            descriptor = _open_below(self.root, self.path.relative_to(self.root).parts)
            try:
                return sorted(os.listdir(descriptor))  # noqa: PTH208  a Path has no descriptor
            finally:
                os.close(descriptor)

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        real = Path(os.path.realpath(self.path / name))
        if not real.is_relative_to(self.root):
            raise ConfigError(f"{self.uri}/{name} is a link to outside the adapter_roots. Copy the file itself there.")
        with _reported(f"{self.uri}/{name}"):
            descriptor = _open_below(self.root, real.relative_to(self.root).parts)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise ModelError(f"{self.uri}/{name} is no regular file. Copy the adapter's files there.")
            with open(descriptor, "rb") as stream:
                yield stream


@dataclass(frozen=True)
class _Prefix:
    """Keys below an s3:// prefix. S3 knows neither links nor `..`: a key is the object."""

    uri: str

    def size(self, name: str) -> int:
        return storage.size(storage.join(self.uri, name))

    def chunks(self, name: str, num_bytes: int) -> Iterator[bytes]:
        return storage.read_chunks(storage.join(self.uri, name), num_bytes)

    def names(self) -> list[str]:
        return storage.list_names(self.uri)


_Place = _Directory | _Prefix


def _directory_below(roots: tuple[str, ...], uri: str) -> _Directory | None:
    if not uri.startswith(("/", "file:///")):
        raise ConfigError(
            f"uri {uri!r} is relative to nothing. Write an absolute path, file:///path or s3://bucket/key."
        )
    path = storage.local_path(uri)
    if "\0" in str(path):
        raise ConfigError(f"uri {uri!r} holds a NUL character. Write the path as it is.")
    real = Path(os.path.realpath(path))
    for root in filter(storage.is_local, roots):
        real_root = Path(os.path.realpath(storage.local_path(root)))
        if real.is_relative_to(real_root):
            return _Directory(uri, real_root, real)
    return None


def _prefix_below(roots: tuple[str, ...], uri: str) -> _Prefix | None:
    wanted = _segments(uri)
    inside = (_segments(root) for root in roots if not storage.is_local(root))
    return _Prefix(uri.rstrip("/")) if any(wanted[: len(root)] == root for root in inside) else None


def _segments(uri: str) -> list[str]:
    """Bucket and the parts of the key: compared whole, so that `adapters-old` is not below `adapters`."""
    parts = uri.removeprefix("s3://").rstrip("/").split("/")
    if any(part in ("", ".", "..") or set(part) & set("%?#\\") for part in parts):
        raise ConfigError(
            f"{uri!r} is no plain key: empty parts, '.', '..', '%', '?', '#' and '\\' are not read. "
            "Write s3://bucket/prefix/name as it is, without encoding."
        )
    return parts


def _open_below(root: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of `root/parts` that has followed no link: one that was put there since the look-up fails (ELOOP)."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for number, part in enumerate(parts, start=1):
        # O_NONBLOCK: opening a FIFO would wait for its writer. Of a regular file it changes nothing.
        kind = os.O_NONBLOCK if number == len(parts) else os.O_DIRECTORY
        try:
            child = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = child
    return descriptor


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """The operating system's errors as ours: wrong as it stands (400), not there (404), or not to be had now (503)."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} does not exist.") from error
    except OSError as error:
        if isinstance(error, LorayError):
            raise
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise ConfigError(
                f"{what} is no path of a directory without links ({error.strerror}). Correct it."
            ) from error
        raise StorageError(f"{what} could not be read: {error.strerror or error}. Check it, then repeat.") from error


def _manifest(place: _Place) -> Manifest | None:
    """loray's own manifest, if this is a version of a registry or a copy of one; other programs' files are none."""
    try:
        size = place.size("manifest.json")
    except NotFoundError:
        return None
    try:
        manifest = Manifest.model_validate(_json(place, "manifest.json", size))
    except ValidationError:
        return None
    problems = [problem for problem in map(name_problem, manifest.files) if problem]
    problems += [f"{name} is not in it" for name in ADAPTER_FILES if name not in manifest.files]
    if problems:
        raise ModelError(f"{place.uri}/manifest.json is of no adapter: {'; '.join(problems[:5])}.")
    return manifest


def _sizes(place: _Place, names: tuple[str, ...]) -> dict[str, int]:
    sizes, missing = {}, []
    for name in names:
        try:
            sizes[name] = place.size(name)
        except NotFoundError:
            missing.append(name)
    if len(missing) == len(names) and not place.names():
        raise NotFoundError(f"nothing lies at {place.uri}. Name a directory in PEFT's format.")
    if missing:
        others = ", ".join(name for name in place.names() if name not in sizes)[:200]
        raise ModelError(
            f"{place.uri} is no adapter in PEFT's format: {', '.join(missing)} missing (found: {others or 'nothing else'}). "
            f"Weights are read as safetensors only, never pickles (*.bin, *.pt): write it with PEFT's save_pretrained."
        )
    return sizes


def _json(place: _Place, name: str, size: int) -> dict[str, Any]:
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{place.uri}/{name} has {size} bytes, at most {MAX_JSON_BYTES} are read of a JSON file.")
    try:
        content = json.loads(b"".join(place.chunks(name, size)))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place.uri}/{name} is no JSON: {str(error)[:200]}.") from None
    return content if isinstance(content, dict) else {}


def _hashed(place: _Place, name: str, size: int) -> FileEntry:
    digest, count = hashlib.sha256(), 0
    for chunk in place.chunks(name, size):
        digest.update(chunk)
        count += len(chunk)
    if count != size:
        raise ConflictError(f"{place.uri}/{name} changed while it was being read. Wait for its writer, then PUT again.")
    return FileEntry(bytes=count, sha256=digest.hexdigest())


def _copied(place: _Place, name: str, local: Path, want: FileEntry) -> None:
    """One byte more than wanted is read at most: enough to see that it is another file."""
    got = storage.write_stream(local, place.chunks(name, want.bytes + 1))
    if got != want:
        raise ModelError(
            f"{place.uri}/{name} has changed since it was registered: it is sha256 {got.sha256[:12]} now and was "
            f"{want.sha256[:12]}. PUT it again to serve what lies there now."
        )
