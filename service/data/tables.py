"""Records from Parquet (by row groups) and Arrow (by record batches, of its file and its stream format).

Read are batches of a few MiB, so memory stays flat where a row group or a batch is large. A float column's NaN is how
pandas writes a missing value and becomes None; a class of `datasets` becomes its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

from service import storage
from service.data.json_rows import too_large
from service.data.records import MAX_ROW_BYTES, Mark, Piece, Record, check_columns
from service.data.rows import Problem

BATCH_BYTES = 8 * 2**20
_BUFFER_BYTES = 2**20
_UNREADABLE = (ValueError, KeyError, OverflowError)  # text that is no UTF-8, a key twice, a date out of range
_MAGIC = b"ARROW1"  # of Arrow's file format; its stream format has none


def begin(stream: BinaryIO, whole: Piece) -> tuple[Piece, Iterator[Mark]]:
    """The file, and where it can be cut. Raises DataError for columns that are too many, or of one name."""
    table = _open(stream, whole)
    check_columns(table.schema_arrow.names if whole.kind == "parquet" else table.schema.names, whole.uri)
    return whole, _groups(table) if whole.kind == "parquet" else _batches(table)


def read(stream: BinaryIO, piece: Piece) -> Iterator[Record | Problem]:
    """The records of a piece."""
    table = _open(stream, piece)
    if piece.kind == "parquet":
        yield from records(_parquet_batches(table, piece), table.schema_arrow, piece)
    elif hasattr(table, "get_batch"):
        yield from records(map(table.get_batch, range(piece.start, piece.end)), table.schema, piece)
    else:
        yield from records(islice(table, piece.start, piece.end), table.schema, piece)


def records(batches: Iterator[Any], schema: Any, piece: Piece) -> Iterator[Record | Problem]:
    """Numbered from the piece's first row; a row that is too large, or that Python cannot hold, is a Problem."""
    named, nested = _classes(schema), [field.name for field in schema if _has_objects(field.type)]
    number = piece.first
    for batch in _small(batches):
        for values in _rows(_without_nan(batch)):
            if isinstance(values, str):
                yield Problem(number, values, piece.file)
            else:
                values |= {key: name(values[key]) for key, name in named.items()}
                values |= {key: _without_missing(values[key]) for key in nested}
                yield Record(number, values, piece.file)
            number += 1


def _has_objects(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind) or (types.is_nested(kind) and any(_has_objects(f.type) for f in _fields(kind)))


def _fields(kind: Any) -> list[Any]:
    return [kind.field(index) for index in range(kind.num_fields)]


def _without_missing(value: Any) -> Any:
    """Objects without their nulls: a column of them has the keys of all rows, and null where a row has none of that key."""
    if isinstance(value, dict):
        return {key: _without_missing(inner) for key, inner in value.items() if inner is not None}
    return [_without_missing(inner) for inner in value] if isinstance(value, list) else value


def _open(stream: BinaryIO, piece: Piece) -> Any:
    import pyarrow
    from pyarrow import parquet

    if piece.kind == "parquet":
        return parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    whole = stream.read(len(_MAGIC)) == _MAGIC
    stream.seek(0)
    # A mapped batch costs no memory before it is looked at, however large it is.
    source = pyarrow.memory_map(str(storage.local_path(piece.uri))) if storage.is_local(piece.uri) else stream
    return pyarrow.ipc.open_file(source) if whole else pyarrow.ipc.open_stream(source)


def _groups(file: Any) -> Iterator[Mark]:
    rows = size = 0
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        rows += group.num_rows
        size += group.total_byte_size
        yield Mark(index + 1, rows, size)


def _batches(table: Any) -> Iterator[Mark]:
    """Behind each batch of a file; a stream has no index, and is not cut."""
    indexed = hasattr(table, "get_batch")
    batches = map(table.get_batch, range(table.num_record_batches)) if indexed else table
    last = Mark(0, 0, 0)
    for batch in batches:
        batch.validate()
        last = Mark(last.position + 1, last.rows + batch.num_rows, last.num_bytes + batch.nbytes)
        if indexed:
            yield last
    if not indexed and last.rows:
        yield last


def _parquet_batches(file: Any, piece: Piece) -> Iterator[Any]:
    for index in range(piece.start, piece.end):
        group = file.metadata.row_group(index)
        rows = _rows_of_batch(group.num_rows, group.total_byte_size)
        yield from file.iter_batches(batch_size=rows, row_groups=[index], use_threads=False)


def _small(batches: Iterator[Any]) -> Iterator[Any]:
    """The same rows in batches of about BATCH_BYTES."""
    for batch in batches:
        batch.validate()  # that its buffers have the length they need: Arrow trusts a file, and reads beyond them
        rows = _rows_of_batch(batch.num_rows, batch.nbytes)
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _rows_of_batch(rows: int, num_bytes: int) -> int:
    return max(1, min(rows, 1024, rows * BATCH_BYTES // max(num_bytes, 1)))


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The values of each row, or why they cannot be had."""
    if batch.nbytes <= MAX_ROW_BYTES:
        try:
            yield from _values(batch)
            return
        except _UNREADABLE:
            pass  # row by row, then
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        try:
            yield too_large(row.nbytes) if row.nbytes > MAX_ROW_BYTES else _values(row)[0]
        except _UNREADABLE as error:
            yield f"cannot be read: {error}. Write the row again."


def _values(batch: Any) -> list[dict[str, Any]]:
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            column.validate(full=True)  # offsets and text
        except ValueError as error:
            raise ValueError(f"{field.name} is damaged, or no UTF-8 ({error})") from None
    rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    return rows


def _without_nan(batch: Any) -> Any:
    import pyarrow
    from pyarrow import compute

    for index, field in enumerate(batch.schema):
        if pyarrow.types.is_floating(field.type):
            column = batch.column(index)
            nothing = pyarrow.scalar(None, type=field.type)
            batch = batch.set_column(index, field.name, compute.if_else(compute.is_nan(column), nothing, column))
    return batch


def _classes(schema: Any) -> dict[str, Callable[[Any], Any]]:
    """For each column that `datasets` wrote as ClassLabel numbers, or lists of them, how a value becomes its names."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    found = {}
    for column in schema.names:
        feature = features.get(column, {})
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = _namer(inner["names"])
    return found


def _namer(names: list[str]) -> Callable[[Any], Any]:
    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(one) for one in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None

    return name
