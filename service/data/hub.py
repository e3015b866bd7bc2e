"""Records from a data set of the Hugging Face Hub, through its library `datasets`, an extra: pip install 'loray[hub]'.

    hub:owner/name                      its split `train`
    hub:owner/name?split=test&config=sst2&revision=<commit>

The library downloads once a machine, into its own cache, and maps it into memory. Give a commit as the revision where
several machines read: a branch may move between them. `split` may be a slice, `train[:1000]`; the id may be a directory
that the library can load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from service.data.records import Mark, Piece, Record, check_columns
from service.data.rows import Problem
from service.data.tables import records
from service.errors import DataError

SCHEME = "hub:"
_OPTIONS = ("split", "config", "revision")
_BATCH_ROWS = 1000


def is_hub(uri: str) -> bool:
    """Whether a data set of the Hub is meant, not a file."""
    return uri.startswith(SCHEME)


def begin(whole: Piece) -> tuple[Piece, Iterator[Mark], Any]:
    """The data set, where it can be cut (by rows), and the sha256 of what the marks have gone through."""
    dataset = _load(whole.uri)
    check_columns(dataset.column_names, whole.uri)
    digest = hashlib.sha256()
    return whole, _marks(dataset, digest), digest


def read(piece: Piece) -> Iterator[Record | Problem]:
    """The records of a piece."""
    dataset = _load(piece.uri)
    yield from records(_batches(dataset, piece.start, piece.end), dataset.features.arrow_schema, piece)


def _marks(dataset: Any, digest: Any) -> Iterator[Mark]:
    last = Mark(0, 0, 0)
    digest.update(dataset.features.arrow_schema.serialize())
    for batch in _batches(dataset, 0, len(dataset)):
        digest.update(batch.serialize())
        rows = last.rows + batch.num_rows
        last = Mark(rows, rows, last.num_bytes + batch.nbytes)
        yield last


def _batches(dataset: Any, start: int, end: int) -> Iterator[Any]:
    arrow = dataset.with_format("arrow")
    for at in range(start, end, _BATCH_ROWS):
        yield from arrow[at : min(at + _BATCH_ROWS, end)].to_batches()


@lru_cache(maxsize=8)
def _load(uri: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{uri} needs the library datasets. Install it: pip install 'loray[hub]'.") from None
    name, options = _parsed(uri)
    try:
        return datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision")
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{uri} cannot be loaded: {error} Check the id, its split and config, and the network."
        ) from error


def _parsed(uri: str) -> tuple[str, dict[str, str]]:
    name, _, query = uri.removeprefix(SCHEME).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_OPTIONS))
    if not name or unknown:
        what = f"has the option(s) {unknown}" if unknown else "names no data set"
        raise DataError(
            f"{uri} {what}. Write hub:owner/name?split=train&config=...&revision=..., what is not needed left out."
        )
    return name, options
