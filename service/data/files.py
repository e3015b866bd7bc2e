"""From a data file, a directory of them or a data set of a hub to records: streamed, in bounded memory, without a meaning.

    source = open_source("s3://bucket/tickets.jsonl")      # one pass: its digest, and where it can be cut
    for piece in source.pieces: ...                        # each can be read alone, on any machine: read_piece(piece)

Read are .jsonl (also .ndjson, and a file without a known ending), .json, .csv, .tsv, .parquet and .arrow, of text also .gz
and .zst, on this machine or on s3://, directories of one kind of them, and hub:owner/name (see `hub.py`). Files of a
directory are taken in the order of their names, without those that begin with a dot or an underscore.

A row's number is its line in JSON lines, as an editor shows it; elsewhere rows are counted from 1. Through the files of a
directory numbers go on.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import BinaryIO

from service import storage
from service.data import hub, lines, tables
from service.data.hub import is_hub
from service.data.records import Compression, Kind, Piece, Record, cut
from service.data.rows import Problem
from service.errors import DataError, LorayError, NotFoundError

__all__ = ["Piece", "Record", "Source", "is_hub", "open_source", "read_piece"]

CHUNK_BYTES = 2**20
_TABLES = ("parquet", "arrow")
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_BESIDE_ARROW = ("dataset_info.json", "state.json")  # datasets' save_to_disk writes them beside the data


@dataclass(frozen=True)
class Source:
    """What a URI holds, as it was when it was opened. `sha256` is the file's; of a directory, one over those of its files."""

    uri: str
    sha256: str
    num_bytes: int
    pieces: tuple[Piece, ...]
    files: tuple[str, ...]  # URIs

    @property
    def kind(self) -> Kind:
        """How its bytes are read: the same bytes are other rows in a .csv than in a .tsv."""
        return self.pieces[0].kind

    def records(self) -> Iterator[Record | Problem]:
        """All of them in order; what cannot be read stands as a Problem in its place."""
        for piece in self.pieces:
            yield from read_piece(piece)


def open_source(uri: str) -> Source:
    """Reads the source once. Raises DataError when it is missing, empty, or not what its name says."""
    files = [Piece(uri, "hub", 0)] if is_hub(uri) else _files(uri)
    scans: list[_Scan] = []
    for whole in files:
        scans.append(_scan(replace(whole, first=1 + sum(scan.rows for scan in scans))))
    pieces = tuple(piece for scan in scans for piece in scan.pieces)
    if not pieces:
        raise DataError(f"{uri} is empty: it holds no row. Is it the right file, and has its writer finished?")
    if hollow := [whole.file for whole, scan in zip(files, scans, strict=True) if not scan.pieces]:
        raise DataError(f"{uri}: {hollow[:8]} hold no row. Was their upload cut off? Write them again, or remove them.")
    if len({piece.kind for piece in pieces}) > 1:
        raise DataError(
            f"{uri}: some of its .json files are lists, some are JSON lines. Name the latter .jsonl, and keep one kind."
        )
    joined = hashlib.sha256("\n".join(scan.sha256 for scan in scans).encode()).hexdigest()
    return Source(
        uri=uri,
        sha256=scans[0].sha256 if len(scans) == 1 else joined,
        num_bytes=sum(scan.num_bytes for scan in scans),
        pieces=pieces,
        files=tuple(whole.uri for whole in files),
    )


def read_piece(piece: Piece) -> Iterator[Record | Problem]:
    """The records of one piece, streamed. Raises DataError when the file is not the one that was opened, or is damaged."""
    if piece.kind == "hub":
        yield from hub.read(piece)
        return
    if storage.size(piece.uri) != piece.file_bytes or storage.stamp(piece.uri) != piece.stamp:
        raise DataError(f"{piece.uri} changed while it was being read. Wait until its writer is done, then repeat.")
    with closing(storage.open_read(piece.uri)) as stream, _whole_file(piece):
        if piece.kind in _TABLES:
            yield from tables.read(stream, piece)
        else:
            yield from lines.read(_chunks(stream, piece, piece.end), piece)


def _files(uri: str) -> list[Piece]:
    """The file, or the files of a directory, each as one piece."""
    names = [name for name in storage.list_names(uri) if not name.startswith("_")]
    if not names:
        if storage.is_local(uri) and storage.local_path(uri).is_dir():
            raise DataError(f"{uri} is a directory without data files ({', '.join(_KINDS)}).")
        return [_whole(uri, "")]
    kinds = {name: _kind(name)[0] for name in names}
    if "arrow" in kinds.values():
        kinds = {name: kind for name, kind in kinds.items() if name not in _BESIDE_ARROW}
    if strangers := [name for name, kind in kinds.items() if kind is None]:
        raise DataError(
            f"{uri} holds {strangers[:8]}, which are no data files ({', '.join(_KINDS)}). Move them elsewhere."
        )
    if len(set(kinds.values())) > 1:
        raise DataError(f"{uri} holds files of several kinds: {sorted(set(map(str, kinds.values())))}. Keep one kind.")
    return [_whole(storage.join(uri, name), name) for name in kinds]


def _kind(name: str) -> tuple[Kind | None, Compression]:
    """What a file's name says of it: .jsonl.gz is JSON lines in gzip."""
    path = PurePosixPath(name.lower())
    compression = _COMPRESSIONS.get(path.suffix, "")
    return _KINDS.get(path.with_suffix("").suffix if compression else path.suffix), compression


def _whole(uri: str, file: str) -> Piece:
    kind, compression = _kind(uri)
    if kind in _TABLES and compression:
        raise DataError(f"{uri}: a {kind} file is compressed inside. Decompress it, and drop the ending.")
    try:
        return Piece(uri, kind or "jsonl", storage.size(uri), file, compression, stamp=storage.stamp(uri))
    except NotFoundError:
        raise DataError(f"{uri}: the data file does not exist. Check data.train and data.eval.") from None


@dataclass(frozen=True)
class _Scan:
    """What one pass over a file found."""

    pieces: list[Piece]
    rows: int  # numbers that its rows take
    sha256: str
    num_bytes: int


def _scan(whole: Piece) -> _Scan:
    if whole.kind == "hub":
        begun, marks, digest = hub.begin(whole)
        pieces, rows, size = cut(begun, marks)
        return _Scan(pieces, rows, digest.hexdigest(), size)
    with closing(storage.open_read(whole.uri)) as stream, _whole_file(whole):
        hashed = _Hashed(stream)
        if whole.kind in _TABLES:
            hashed.drain()
            stream.seek(0)
            pieces, rows, _ = cut(*tables.begin(stream, whole))
        else:
            pieces, rows, _ = cut(*lines.begin(_chunks(hashed, whole, None), whole))
            hashed.drain()
    return _Scan(pieces, rows, hashed.sha256.hexdigest(), whole.file_bytes)


class _Hashed:
    """A stream that knows the sha256 of what was read of it."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.sha256 = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        return data

    def close(self) -> None:
        """For who reads through this and closes what it reads; whoever opened the stream closes it."""

    def drain(self) -> None:
        """Reads what is left."""
        while self.read(CHUNK_BYTES):
            pass


def _chunks(stream: BinaryIO | _Hashed, piece: Piece, end: int | None) -> Iterator[bytes]:
    """The bytes from `piece.start` to `end` (None: all), decompressed."""
    at = piece.start
    plain = _decompressed(stream, piece)
    if piece.compression:
        plain.read(at)
    elif at:
        assert not isinstance(stream, _Hashed), "a pass begins at the beginning"
        stream.seek(at)
    while chunk := plain.read(CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - at)):
        at += len(chunk)
        yield chunk


def _decompressed(stream: BinaryIO | _Hashed, piece: Piece) -> BinaryIO | _Hashed:
    if piece.compression == "gzip":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[arg-type,return-value]  # it reads, no more
    if piece.compression == "zstd":
        import pyarrow

        plain: BinaryIO = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
        return plain
    return stream


@contextmanager
def _whole_file(whole: Piece) -> Iterator[None]:
    """What gzip, zlib and Arrow say of a file that is cut off or damaged, as a DataError."""
    damaged: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    if whole.kind in _TABLES:
        import pyarrow

        damaged = (OSError, pyarrow.ArrowException)
    try:
        yield
    except LorayError:
        raise
    except damaged as error:
        raise DataError(
            f"{whole.uri} cannot be read to its end: {str(error).rstrip('.')}. Is it whole? Write or copy it again."
        ) from error
