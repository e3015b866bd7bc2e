"""Rows to token ids, before any accelerator is held, cached by content.

A prepared dataset is one safetensors file of flat arrays and a data card, under `LORAY_HOME/datasets/<digest>`. The digest
covers the file's bytes, the renderer and the options, so the same data is never tokenised twice and a change is never
missed. Workers read it through their node's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from service import storage
from service.data.files import open_source
from service.data.formats import read_rows
from service.data.rows import Row
from service.errors import ConflictError, DataError, ModelError
from service.render import Renderer

PREPARE_VERSION = 1


@dataclass(frozen=True)
class DataCard:
    """What a prepared dataset holds. Tokens are counted as the model sees them, special tokens included."""

    source: str
    digest: str
    source_sha256: str
    renderer_digest: str
    rows: int  # lines with a conversation
    examples: int  # more than rows, where a template rewrites earlier turns; fewer, where rows were dropped
    rows_split_by_turn: int
    rows_dropped: int  # longer than data.seq_len, with over_long: drop
    tokens: int
    supervised_tokens: int
    longest: int  # tokens of the longest example

    @property
    def supervised_share(self) -> float:
        """Trained tokens / all tokens."""
        return self.supervised_tokens / self.tokens


@dataclass(frozen=True)
class TokenRows:
    """Prepared examples in memory: flat arrays and where each example begins."""

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]  # len(examples) + 1
    row_numbers: npt.NDArray[np.int64]  # the source line of each example
    card: DataCard

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.mask[start:end]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> npt.NDArray[np.int64]:
        """Trained tokens of each example; none is empty."""
        return np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64)


def prepare(uri: str, renderer: Renderer, *, home: str, seq_len: int, over_long: str) -> DataCard:
    """Tokenise a data file into `home/datasets/<digest>`, or find it there. Raises DataError by row."""
    source_sha256 = open_source(uri).sha256
    parts = [PREPARE_VERSION, source_sha256, renderer.digest, seq_len, over_long]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    card_uri = storage.join(home, "datasets", digest, "card.json")
    if storage.exists(card_uri):
        return _card(storage.read_bytes(card_uri), uri)
    rows = _tokenise(read_rows(uri), renderer, uri, seq_len, over_long, source_sha256, digest)
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": rows.ids,
        "mask": rows.mask,
        "offsets": rows.offsets,
        "row_numbers": rows.row_numbers,
    }
    storage.write_bytes(storage.join(home, "datasets", digest, "tokens.safetensors"), save(arrays))
    try:
        storage.create_exclusive(card_uri, json.dumps(asdict(rows.card), indent=2).encode())
    except ConflictError:  # somebody prepared the same content at the same time: the bytes are equal
        return _card(storage.read_bytes(card_uri), uri)
    return rows.card


def find(digest: str, *, home: str) -> DataCard:
    """The card of a dataset prepared before. Raises NotFoundError."""
    return _card(storage.read_bytes(storage.join(home, "datasets", digest, "card.json")), None)


def load(digest: str, *, home: str, cache: Path) -> TokenRows:
    """A prepared dataset, from the node's cache or fetched into it."""
    directory = storage.join(home, "datasets", digest)
    if storage.is_local(home):
        file = storage.local_path(storage.join(directory, "tokens.safetensors"))
    else:
        file = cache / "datasets" / digest / "tokens.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch_file(storage.join(directory, "tokens.safetensors"), file, None)
    arrays = load_file(file)
    card = _card(storage.read_bytes(storage.join(directory, "card.json")), None)
    return TokenRows(arrays["ids"], arrays["mask"], arrays["offsets"], arrays["row_numbers"], card)


def _card(data: bytes, source: str | None) -> DataCard:
    fields = json.loads(data)
    return DataCard(**{**fields, "source": source or fields["source"]})


def _tokenise(
    rows: Sequence[Row], renderer: Renderer, uri: str, seq_len: int, over_long: str, source_sha256: str, digest: str
) -> TokenRows:
    ids: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.uint8]] = []
    numbers: list[int] = []
    too_long: list[str] = []
    split = dropped = 0
    for row in rows:
        try:
            examples = renderer.examples(row.messages)
        except (DataError, ModelError) as error:
            raise type(error)(f"{uri}: row {row.number}: {error}") from None
        split += len(examples) > 1
        longest = max(len(example.ids) for example in examples)
        if longest > seq_len:
            dropped += 1
            too_long.append(f"row {row.number} ({longest})")
            continue
        for example in examples:
            ids.append(np.asarray(example.ids, dtype=np.int32))
            masks.append(np.asarray(example.mask, dtype=np.uint8))
            numbers.append(row.number)
    if too_long and over_long == "error":
        shown = ", ".join(too_long[:10]) + (f" and {len(too_long) - 10} more" if len(too_long) > 10 else "")
        raise DataError(
            f"{uri}: {len(too_long)} row(s) have more than data.seq_len = {seq_len} tokens: {shown}. "
            "Raise data.seq_len, shorten them, or set data.over_long: drop."
        )
    if not ids:
        raise DataError(f"{uri}: no row is left to train on (all {dropped} are over data.seq_len = {seq_len}).")
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    all_masks = np.concatenate(masks)
    card = DataCard(
        source=uri,
        digest=digest,
        source_sha256=source_sha256,
        renderer_digest=renderer.digest,
        rows=len(rows),
        examples=len(ids),
        rows_split_by_turn=split,
        rows_dropped=dropped,
        tokens=int(offsets[-1]),
        supervised_tokens=int(all_masks.sum()),
        longest=max(len(i) for i in ids),
    )
    return TokenRows(np.concatenate(ids), all_masks, offsets, np.asarray(numbers, dtype=np.int64), card)
