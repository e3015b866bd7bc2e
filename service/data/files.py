"""From a data file, or a directory of them, to records: streamed, in bounded memory, without giving them a meaning.

    source = open_source("s3://bucket/tickets.jsonl")      # one pass: its digest, and where it can be cut
    for piece in source.pieces: ...                        # each can be read alone, on any machine: read_piece(piece)

JSON lines (.jsonl, .ndjson, and whatever has no name of its own), gzipped (.gz) or in zstd (.zst), on this machine or on
s3://. A row's number is its line, as an editor shows it. Through the files of a directory numbers go on.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

from service import storage
from service.data import lines
from service.data.records import Kind, Piece, Record, cut
from service.data.rows import Problem
from service.errors import DataError, NotFoundError

__all__ = ["Piece", "Record", "Source", "open_source", "read_piece"]

CHUNK_BYTES = 2**20
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}


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
    files = _files(uri)
    pieces: list[Piece] = []
    digests: list[str] = []
    first = 1
    for whole in files:
        parts, rows, sha256 = _scanned(replace(whole, first=first))
        pieces += parts
        digests.append(sha256)
        first += rows
    if not pieces:
        raise DataError(f"{uri}: the data file is empty. It needs one JSON object a line.")
    joined = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Source(
        uri=uri,
        sha256=digests[0] if len(digests) == 1 else joined,
        num_bytes=sum(whole.file_bytes for whole in files),
        pieces=tuple(pieces),
        files=tuple(whole.uri for whole in files),
    )


def read_piece(piece: Piece) -> Iterator[Record | Problem]:
    """The records of one piece, streamed. Raises DataError when the file is not the one that was opened."""
    if storage.size(piece.uri) != piece.file_bytes:
        raise DataError(f"{piece.uri} changed while it was being read. Wait until its writer is done, then repeat.")
    with closing(storage.open_read(piece.uri)) as stream:
        yield from lines.read(_chunks(stream, piece, piece.end), piece)


def _files(uri: str) -> list[Piece]:
    """The file, or the files of a directory in the order of their names, each as one piece."""
    names = [name for name in storage.list_names(uri) if not name.startswith("_")]
    if names:
        return [_whole(storage.join(uri, name), name) for name in names]
    return [_whole(uri, "")]


def _whole(uri: str, file: str) -> Piece:
    path = PurePosixPath(uri)
    compression = _COMPRESSIONS.get(path.suffix)
    kind = _KINDS.get(path.with_suffix("").suffix if compression else path.suffix, "jsonl")
    try:
        return Piece(uri, kind, storage.size(uri), file=file, compression=compression or "")
    except NotFoundError:
        raise DataError(f"{uri}: the data file does not exist. Check data.train and data.eval.") from None


def _scanned(whole: Piece) -> tuple[list[Piece], int, str]:
    """The pieces of a file, how many numbers its rows take, and its sha256."""
    with closing(storage.open_read(whole.uri)) as stream:
        hashed = _Hashed(stream)
        pieces, rows = cut(whole, lines.marks(_chunks(hashed, whole, None), whole))
        while hashed.read(CHUNK_BYTES):
            pass
    return pieces, rows, hashed.sha256.hexdigest()


class _Hashed:
    """A stream that knows the sha256 of what was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.sha256, self.closed = stream, hashlib.sha256(), False

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        return data


def _chunks(stream: BinaryIO | _Hashed, piece: Piece, end: int | None) -> Iterator[bytes]:
    """The bytes from `piece.start` to `end` (None: all), decompressed."""
    at = piece.start
    if at:
        assert not isinstance(stream, _Hashed), "only what can seek begins in its middle"
        stream.seek(at)
    try:
        plain = _decompressed(stream, piece)
        while chunk := plain.read(CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - at)):
            at += len(chunk)
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{piece.uri} is no whole .gz file: {error}. Copy it again.") from None


def _decompressed(stream: BinaryIO | _Hashed, piece: Piece) -> BinaryIO | _Hashed:
    if piece.compression == "gzip":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[arg-type,return-value]  # it reads, no more
    if piece.compression == "zstd":
        import pyarrow

        plain: BinaryIO = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
        return plain
    return stream
