"""Prepared examples as they lie in storage: shards of token ids, an index, and a card that is written last.

    datasets/<digest>/card.json                        what it holds, for people; it is there when all the rest is
    datasets/<digest>/<attempt>/index.arrow            of each example: its place, length, trained tokens, row number
    datasets/<digest>/<attempt>/tokens-00000-00.arrow  ids and mask of single examples, at most SHARD_TOKENS of them

All are Arrow IPC files that any Arrow reader opens. They are mapped, never loaded, so that a run's own memory does not grow
with its data. On S3 the index is fetched to the node, and the shards with it where they are small; else each example is
read by its byte range. A mixture of datasets is an index and a card of its own over the shards of its parts.
"""

from __future__ import annotations

import json
import secrets
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache as cached
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from service import storage
from service.domain import FileEntry
from service.errors import ConflictError, DataError, NotFoundError, StorageError

LAYOUT = 2
SHARD_TOKENS = 2**22  # 20 MiB of ids and mask: little to hold while it is written, and 6,000 files for 100 GB of text
# A dataset on S3 of at most so many bytes is fetched to the node whole. An epoch reads every byte once in any case, and in
# one stream instead of two requests an example; the limit is for the node's disk, of which a pod often has 10 GB.
CACHED_BYTES = 2**33
SHOWN_ROWS = 20
INTEGERS = ("starts", "lengths", "supervised", "row_numbers")

_NONE = np.zeros(0, dtype=np.int64)

TokenArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
Integers = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Where an example lies: tokens of a shard."""

    shard: int
    start: int
    length: int


_Read = Callable[[Sequence[Span]], list[TokenArrays]]


@dataclass(frozen=True)
class Part:
    """One source of a dataset. Its rows have the numbers after `rows_before`, its examples the places from `examples_from`."""

    source: str
    digest: str
    examples: int
    examples_from: int = 0
    rows_before: int = 0
    files: tuple[tuple[str, int], ...] = ()  # (name, rows of the source before its first one) of each file


@dataclass(frozen=True)
class DataCard:
    """What a prepared dataset holds. Tokens are counted as the model sees them, special tokens included."""

    source: str
    digest: str
    source_sha256: str
    renderer_digest: str
    rows: int  # with a content, of this side of the split
    examples: int  # more than rows, where a template rewrites earlier turns; fewer, where rows were left out
    rows_split_by_turn: int
    rows_dropped: int  # longer than data.seq_len; with over_long: truncate, of which no trained token was left
    tokens: int
    supervised_tokens: int
    longest: int  # tokens of the longest example
    rows_truncated: int = 0
    rows_copied: int = 0  # changed copies, by data.augment
    rows_filtered: Mapping[str, int] = field(default_factory=dict)  # left out by data.filter, by reason
    last_row: int = 0  # the highest row number of the source, whatever became of that row
    parts: tuple[Part, ...] = ()
    index: str = ""  # where its index lies, below datasets/

    @property
    def supervised_share(self) -> float:
        """Trained tokens / all tokens."""
        return self.supervised_tokens / self.tokens

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where the examples of each source begin, and where the last one's end."""
        return (*(part.examples_from for part in self.parts), self.examples)

    def place(self, row_number: int) -> tuple[str, int]:
        """The file of a row of this dataset, and the row's number in it."""
        part = [part for part in self.parts if part.rows_before < row_number][-1]
        number = row_number - part.rows_before
        file, before = [file for file in part.files if file[1] < number][-1]
        return file, number - before

    def where(self, row_numbers: Iterable[int]) -> str:
        """`[7, 12] of rows.jsonl, [3] of more.jsonl`, for messages; so many rows at most as one reads."""
        numbers = sorted(set(row_numbers))
        files: dict[str, list[int]] = {}
        for number in numbers[:SHOWN_ROWS]:
            file, row = self.place(number)
            files.setdefault(file, []).append(row)
        more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
        return ", ".join(f"{rows} of {file}" for file, rows in files.items()) + more


@dataclass(frozen=True)
class Shard:
    """A file of examples, its name below datasets/, and where in it the ids and the mask begin, in bytes."""

    file: str
    examples: int
    tokens: int
    ids_at: int
    mask_at: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What is known of each example without reading it. `starts`: tokens of its shard before it."""

    starts: Integers
    lengths: Integers
    supervised: Integers
    row_numbers: Integers
    scores: npt.NDArray[np.float64] | None = None  # the field that data.curriculum names


class TokenRows:
    """Prepared examples: `rows[i]` is (ids, mask). What the index knows of them are mapped arrays of 64-bit integers."""

    def __init__(self, card: DataCard, index: Index, shards: Sequence[Shard], read: _Read) -> None:
        self.card = card
        self.lengths = index.lengths  # tokens of each example
        self.supervised = index.supervised  # trained tokens of each example; none has none
        self.row_numbers = index.row_numbers  # of its source; of several sources, see `DataCard.where`
        self.scores = index.scores  # of data.curriculum; None without one
        self._starts, self._read = index.starts, read
        self._firsts = [0, *accumulate(shard.examples for shard in shards)]  # example of each shard

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenArrays:
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[TokenArrays]:
        """Several examples at once: on S3, one journey instead of many."""
        return self._read([self._span(index) for index in indices])

    def _span(self, index: int) -> Span:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = bisect_right(self._firsts, index) - 1
        return Span(shard, int(self._starts[index]), int(self.lengths[index]))


def find(digest: str, *, home: str) -> DataCard:
    """The card of a dataset prepared before. Raises NotFoundError."""
    uri = storage.join(home, "datasets", digest, "card.json")
    return card_of(storage.read_bytes(uri), uri)


def card_of(data: bytes, uri: str) -> DataCard:
    """A card from its bytes. Raises DataError where another version of loray has prepared the data."""
    fields = json.loads(data)
    if fields.pop("layout", 1) != LAYOUT:
        raise DataError(f"{uri} is of another version of loray. Start a new run, which prepares the data again.")
    parts = [Part(**part | {"files": tuple(map(tuple, part["files"]))}) for part in fields.pop("parts")]
    return DataCard(**fields, parts=tuple(parts))


def load(digest: str, *, home: str, cache: Path, cached_bytes: int = CACHED_BYTES) -> TokenRows:
    """A prepared dataset, mapped where it lies on this machine, or is small enough to be fetched into the node's cache."""
    card = find(digest, home=home)
    root = storage.join(home, "datasets")
    if storage.is_local(home):
        directory = storage.local_path(root)
        index, shards = _read_index(_map(directory / card.index))
        return TokenRows(card, index, shards, _mapped(shards, directory))
    directory = cache / "datasets"
    _fetch(storage.join(root, card.index), directory / card.index, None)
    index, shards = _read_index(_map(directory / card.index))
    missing = [shard for shard in shards if not (directory / shard.file).is_file()]
    num_bytes = sum(shard.bytes for shard in missing)
    if num_bytes > min(cached_bytes, (storage.free_bytes(str(cache)) or 0) // 2):
        return TokenRows(card, index, shards, _ranged(shards, root))
    for shard in missing:
        _fetch(
            storage.join(root, shard.file), directory / shard.file, FileEntry(bytes=shard.bytes, sha256=shard.sha256)
        )
    return TokenRows(card, index, shards, _mapped(shards, directory))


def _fetch(uri: str, local: Path, entry: FileEntry | None) -> None:
    """Once on a node, however many of its workers ask."""
    with storage.locked(local):
        if not local.is_file():
            storage.fetch_file(uri, local, entry)


def _read_index(data: pa.Buffer) -> tuple[Index, list[Shard]]:
    table = ipc.open_file(data).read_all()
    shards = [Shard(**fields) for fields in json.loads(table.schema.metadata[b"shards"])]
    columns = {name: table.column(name).chunk(0).to_numpy(zero_copy_only=True) for name in table.column_names}
    return Index(**columns), shards


def _map(file: Path) -> pa.Buffer:
    """A file's bytes as pages of the kernel. The mapping stays with the buffer, and the file is closed: there may be thousands."""
    try:
        with pa.memory_map(str(file)) as mapped:
            return mapped.read_buffer()
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist. Prepare the data again: loray data prepare RUN.YAML") from error


def _mapped(shards: Sequence[Shard], directory: Path) -> _Read:
    """Reads without copying, from files of this machine; each is mapped when it is first needed."""

    @cached
    def arrays(number: int) -> TokenArrays:
        shard = shards[number]
        pages = _map(directory / shard.file)
        ids = np.frombuffer(pages, np.int32, shard.tokens, shard.ids_at)
        return ids, np.frombuffer(pages, np.uint8, shard.tokens, shard.mask_at)

    def read(spans: Sequence[Span]) -> list[TokenArrays]:
        found = []
        for number, start, length in spans:
            ids, mask = arrays(number)
            found.append((ids[start : start + length], mask[start : start + length]))
        return found

    return read


def _ranged(shards: Sequence[Shard], root: str) -> _Read:
    """Reads just the bytes of the examples, which are too many for this machine."""

    def read(spans: Sequence[Span]) -> list[TokenArrays]:
        ranges = []
        for number, start, length in spans:
            shard = shards[number]
            uri = storage.join(root, shard.file)
            ranges += [(uri, shard.ids_at + 4 * start, 4 * length), (uri, shard.mask_at + start, length)]
        parts = storage.read_ranges(ranges)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return [(np.frombuffer(ids, np.int32), np.frombuffer(mask, np.uint8)) for ids, mask in pairs]

    return read


class ShardWriter:
    """Examples, one after the other, into shards `<prefix>-00.arrow`, `<prefix>-01.arrow` ... below a directory's URI."""

    def __init__(self, root: str, prefix: str, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self.shards: list[Shard] = []
        self._root, self._prefix, self._shard_tokens = root, prefix, shard_tokens
        self._integers = {name: array("q") for name in INTEGERS}
        self._scores = array("d")
        self._begin()

    def add(self, ids: Sequence[int], mask: Sequence[int], row_number: int, score: float | None = None) -> None:
        """One example. Its first token has nothing before it, and is never a trained one."""
        if self._ids and len(self._ids) + len(ids) > self._shard_tokens:
            self._end()
        place = len(self._ids)
        trained = b"\0" + bytes(mask[1:])
        self._ids += array("i", ids)
        self._mask += trained
        self._offsets.append(len(self._ids))
        values = (place, len(ids), trained.count(1), row_number)
        for name, value in zip(INTEGERS, values, strict=True):
            self._integers[name].append(value)
        if score is not None:
            self._scores.append(score)

    def close(self) -> Index:
        """Write what is left; what the index has to know of all examples."""
        if self._ids:
            self._end()
        integers = {name: np.asarray(values) for name, values in self._integers.items()}
        return Index(**integers, scores=np.asarray(self._scores) if self._scores else None)

    def _begin(self) -> None:
        self._ids, self._mask, self._offsets = array("i"), bytearray(), array("i", [0])

    def _end(self) -> None:
        offsets = pa.array(np.asarray(self._offsets))
        columns = {
            "ids": pa.ListArray.from_arrays(offsets, np.asarray(self._ids)),
            "mask": pa.ListArray.from_arrays(offsets, np.frombuffer(self._mask, np.uint8)),
        }
        file = f"{self._prefix}-{len(self.shards):02d}.arrow"
        data = _ipc_file(pa.record_batch(columns))
        entry = storage.write_chunks(storage.join(self._root, file), [memoryview(data).cast("B")])
        written = ipc.open_file(data).get_batch(0)
        ids_at, mask_at = (written.column(name).values.buffers()[1].address - data.address for name in ("ids", "mask"))
        size = {"examples": len(self._offsets) - 1, "tokens": len(self._ids)}
        where = {"ids_at": ids_at, "mask_at": mask_at}
        self.shards.append(Shard(file=file, **size, **where, bytes=entry.bytes, sha256=entry.sha256))
        self._begin()


def write_index(uri: str, parts: Sequence[Index], written: Sequence[Shard]) -> dict[str, Any]:
    """The index of the examples of `parts`, in their order, which lie in `written`, in theirs; the counts of their card."""
    names = [*INTEGERS, *(["scores"] if any(part.scores is not None for part in parts) else [])]
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts if len(part.lengths)] or [_NONE]) for name in names
    }
    table = pa.record_batch(columns, metadata={"shards": json.dumps([asdict(shard) for shard in written])})
    storage.write_chunks(uri, [memoryview(_ipc_file(table)).cast("B")])
    lengths, supervised = columns["lengths"], columns["supervised"]
    return {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "longest": int(lengths.max(initial=0)),
    }


def join_indices(indices: Sequence[str], rows_before: Sequence[int], index: str, *, home: str) -> None:
    """One index over the shards of several datasets, whose rows have the numbers after those before theirs."""
    root = storage.join(home, "datasets")
    read = [_read_index(pa.py_buffer(storage.read_bytes(storage.join(root, one)))) for one in indices]
    moved = [
        replace(part, row_numbers=part.row_numbers + before)
        for (part, _), before in zip(read, rows_before, strict=False)
    ]
    write_index(storage.join(root, index), moved, [shard for _, written in read for shard in written])


def _ipc_file(batch: pa.RecordBatch) -> pa.Buffer:
    """The bytes of a file. Their number is found first: a buffer that grows takes twice the memory, and an index may be large."""
    counted = pa.MockOutputStream()
    _write(batch, counted)
    data = pa.allocate_buffer(counted.size())
    _write(batch, pa.FixedSizeBufferWriter(data))
    return data


def _write(batch: pa.RecordBatch, sink: pa.NativeFile) -> None:
    with ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def publish(card: DataCard, *, home: str) -> DataCard:
    """Make a dataset visible. The card that counts, which is another's where the same content was prepared meanwhile.

    Removes what other attempts have left: those that were killed, and those that still run, which find the card.
    """
    root = storage.join(home, "datasets", card.digest)
    try:
        document = json.dumps({"layout": LAYOUT, **asdict(card)}, indent=2).encode()
        storage.create_exclusive(storage.join(root, "card.json"), document)
    except ConflictError:
        card = replace(card, index=find(card.digest, home=home).index)
    for name in storage.list_names(root):
        if name not in ("card.json", *card.index.split("/")):
            with suppress(StorageError):  # one that is being written to: whoever writes removes it
                storage.delete_tree(storage.join(root, name))
    return card


@contextmanager
def attempt(digest: str, *, home: str) -> Iterator[str]:
    """A place below datasets/ for the files of one that is being made; gone with an error."""
    place = f"{digest}/{secrets.token_hex(4)}"
    try:
        yield place
    except BaseException:
        storage.delete_tree(storage.join(home, "datasets", place))
        raise
