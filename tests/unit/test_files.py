"""Data files: every kind gives the same records, pieces read apart are the whole, and nothing bad passes or is held."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import storage
from service.data import files, json_rows, records
from service.data.files import Piece, Record, Source, open_source, read_piece
from service.data.records import MAX_COLUMNS, MAX_DEPTH, MAX_ROW_BYTES
from service.data.rows import Problem
from service.errors import ConflictError, DataError

pytest_plugins = ("tests.s3_endpoint",)

ROWS = [{"text": f'row {i}: "quoted", {{[\\ü]}}\nnext line', "label": str(i % 3)} for i in range(40)]
Rows = list[dict[str, Any]]


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows)).encode()


def _table(rows: Rows, delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: Rows, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def _arrow(rows: Rows, new: Any = pa.ipc.new_file, chunk: int = 7) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return out.getvalue()


WRITTEN: dict[str, Callable[[Rows], bytes]] = {
    "rows": _jsonl,
    "rows.jsonl": _jsonl,
    "crlf.jsonl": lambda rows: b"\xef\xbb\xbf" + _jsonl(rows).replace(b"\n", b"\r\n"),
    "rows.jsonl.gz": lambda rows: gzip.compress(_jsonl(rows[:9])) + gzip.compress(_jsonl(rows[9:])),
    "rows.jsonl.zst": lambda rows: pa.compress(_jsonl(rows), codec="zstd", asbytes=True),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": _jsonl,
    "of_one_list.json": lambda rows: b"\xef\xbb\xbf" + json.dumps({"v": {"a": "]"}, "data": rows, "n": 1}).encode(),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.csv": _table,
    "excel.csv": lambda rows: b"\xef\xbb\xbf" + _table(rows),
    "rows.csv.gz": lambda rows: gzip.compress(_table(rows)),
    "rows.tsv": lambda rows: _table(rows, "\t"),
    "rows.parquet": lambda rows: _parquet(rows, row_group_size=7),
    "rows.arrow": _arrow,
    "stream.arrow": lambda rows: _arrow(rows, pa.ipc.new_stream),
}


def _put(directory: Path, name: str, data: bytes) -> str:
    (directory / name).write_bytes(data)
    return str(directory / name)


def _all(source: Source) -> list[Record | Problem]:
    return list(source.records())


def _values(source: Source) -> Rows:
    found = _all(source)
    assert all(isinstance(entry, Record) for entry in found), found
    return [entry.values for entry in found if isinstance(entry, Record)]


def _problems(directory: Path, name: str, data: bytes) -> list[str]:
    found = _all(open_source(_put(directory, name, data)))
    return [f"{entry.number}: {entry.text}" for entry in found if isinstance(entry, Problem)]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_file_gives_the_same_records(name: str, tmp_path: Path) -> None:
    source = open_source(_put(tmp_path, name, WRITTEN[name](ROWS)))
    assert _values(source) == ROWS
    assert [entry.number for entry in source.records()] == list(range(1, len(ROWS) + 1))
    assert source.num_bytes == (tmp_path / name).stat().st_size
    assert source.sha256 == storage.sha256_file(tmp_path / name).sha256
    assert source.files == (source.uri,)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE_BYTES", 300)
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_read_apart_in_any_order_are_the_whole(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = open_source(_put(tmp_path, name, WRITTEN[name](ROWS)))
    apart = [list(read_piece(pickle.loads(pickle.dumps(piece)))) for piece in reversed(whole.pieces)]  # noqa: S301
    assert [entry for piece in reversed(apart) for entry in piece] == _all(whole)
    assert _values(whole) == ROWS
    uncut = name.endswith((".gz", ".zst")) or name == "stream.arrow"  # neither can be sought
    assert (len(whole.pieces) == 1) == uncut
    assert all(piece.first == entries[0].number for piece, entries in zip(whole.pieces, reversed(apart), strict=True))
    assert capfd.readouterr().err == "", "no library complains of how it was used"


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"a": TEXTS, "b": TEXTS}), min_size=1, max_size=12),
    chunk=st.integers(1, 40),
    piece=st.integers(1, 200),
)
def test_wherever_a_text_is_cut_its_records_are_the_same(
    rows: Rows, chunk: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("rows.jsonl", "rows.json", "rows.csv"):
            patched.setattr(records, "PIECE_BYTES", piece)
            # The head of a document of one list, and of a file that is no text, is looked for in its first chunk.
            patched.setattr(files, "CHUNK_BYTES", max(chunk, 4 if name == "rows.json" else 1))
            assert _values(open_source(_put(directory, name, WRITTEN[name](rows)))) == rows


def test_numbers_are_lines_of_an_editor_and_blank_lines_count(tmp_path: Path) -> None:
    source = open_source(_put(tmp_path, "x.jsonl", b'\xef\xbb\xbf\r\n{"a": 1}\r\n\n  \t\n{\n{"a": 2}'))
    found = _all(source)
    assert [entry.number for entry in found] == [2, 5, 6]
    assert isinstance(found[1], Problem)


def test_numbers_go_on_through_a_directory_whose_hidden_files_are_no_data(tmp_path: Path) -> None:
    for name, part in (("b.csv", ROWS[5:9]), ("c.csv.gz", ROWS[9:]), ("a.csv", ROWS[:5])):
        _put(tmp_path, name, gzip.compress(_table(part)) if name.endswith(".gz") else _table(part))
    for name in (".hidden.csv", "_SUCCESS"):
        _put(tmp_path, name, b"no data")
    source = open_source(str(tmp_path))
    assert _values(source) == ROWS
    assert [entry.number for entry in source.records()] == list(range(1, 41))
    assert [entry.file for entry in source.records()] == ["a.csv"] * 5 + ["b.csv"] * 4 + ["c.csv.gz"] * 31
    assert [Path(uri).name for uri in source.files] == ["a.csv", "b.csv", "c.csv.gz"]


def test_a_directory_that_datasets_saved_is_its_arrow_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'loray[hub]'")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert _values(open_source(str(tmp_path / "saved"))) == ROWS


def test_the_digest_follows_content_and_not_the_place(tmp_path: Path) -> None:
    digests = set()
    for name, parts in (("one", (ROWS,)), ("two", (ROWS[:9], ROWS[9:])), ("same", (ROWS[:9], ROWS[9:]))):
        (tmp_path / name).mkdir()
        for index, part in enumerate(parts):
            _put(tmp_path / name, f"{index}.jsonl", _jsonl(part))
        digests.add(open_source(str(tmp_path / name)).sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "rows.arrow"])
@pytest.mark.usefixtures("small_pieces")
def test_on_s3_the_same_pieces_give_the_same_records(name: str, s3_home: str, tmp_path: Path) -> None:
    uri = storage.join(s3_home, "data", name)
    storage.write_bytes(uri, WRITTEN[name](ROWS))
    local, remote = open_source(_put(tmp_path, name, WRITTEN[name](ROWS))), open_source(uri)
    assert _all(remote) == _all(local) and remote.sha256 == local.sha256
    assert len(remote.pieces) == len(local.pieces)
    assert [entry.number for entry in open_source(storage.join(s3_home, "data")).records()] == list(range(1, 41))


def test_a_stream_from_storage_seeks_and_is_of_one_content(home: str) -> None:
    data = bytes(range(256)) * 16
    uri = storage.join(home, "object")
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as stream:
        assert stream.read() == data
        assert stream.seek(-10, io.SEEK_END) == len(data) - 10 and stream.read(20) == data[-10:]
        assert stream.seek(3) == 3 and stream.read(5) == data[3:8] and stream.tell() == 8
        assert stream.seek(2, io.SEEK_CUR) == 10 and stream.read(1) == data[10:11]
        if not storage.is_local(uri):
            storage.write_bytes(uri, data[::-1])
            stream.seek(0)
            with pytest.raises(ConflictError):
                stream.read(3000)


def test_a_file_that_changed_after_it_was_opened_is_refused(home: str) -> None:
    uri = storage.join(home, "rows.jsonl")
    storage.write_bytes(uri, _jsonl(ROWS))
    source = open_source(uri)
    storage.write_bytes(uri, _jsonl(ROWS[1:]))
    with pytest.raises(DataError, match="changed while it was being read"):
        _all(source)


def test_a_file_that_changed_and_kept_its_size_is_refused(home: str) -> None:
    uri = storage.join(home, "rows.jsonl")
    storage.write_bytes(uri, _jsonl(ROWS))
    source = open_source(uri)
    storage.write_bytes(uri, _jsonl(ROWS).replace(b"row 7", b"row X"))
    with pytest.raises(DataError, match="changed while it was being read"):
        _all(source)


def test_a_file_of_a_directory_that_holds_no_row_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(_jsonl(ROWS))
    (tmp_path / "cut.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"\['cut.jsonl'\] hold no row"):
        open_source(str(tmp_path))


def test_objects_in_a_table_have_their_own_keys_only(tmp_path: Path) -> None:
    """A column of objects has the keys of all rows: what one row lacks is no null of its own."""
    rows: Rows = [{"calls": [{"arguments": {"a": 1}}]}, {"calls": [{"arguments": {"b": "x"}}]}, {"calls": None}]
    for name, content in (("rows.parquet", _parquet(rows)), ("rows.arrow", _arrow(rows))):
        (tmp_path / name).write_bytes(content)
        assert [record.values for record in _all(open_source(str(tmp_path / name)))] == rows  # type: ignore[union-attr]


def test_a_heading_in_quotes_behind_a_byte_order_mark_is_read_as_without(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbf"say ""hi""",b\n1,2\n')
    (record,) = _all(open_source(str(tmp_path / "rows.csv")))
    assert isinstance(record, Record) and record.values == {'say "hi"': "1", "b": "2"}


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    pairs = [(str(number), 1) for number in range(200_000)]
    with pytest.raises(ValueError, match='the key "7" stands twice'):
        json_rows._unique_keys([*pairs, ("7", 2)])


BAD_FILES = [
    ("x.jsonl", b"", "is empty"),
    ("x.jsonl", b"\xef\xbb\xbf \n\t\n", "is empty"),
    ("x.json", b"", "is empty"),
    ("x.json", b"[]", "is empty"),
    ("x.csv", b"", "is empty"),
    ("x.csv", b"a,b\n", "is empty"),
    ("x.parquet", b"", "cannot be read"),
    ("x.parquet", _parquet(ROWS)[:-30], "cannot be read"),
    ("x.parquet", _parquet(ROWS)[:20], "cannot be read"),
    ("x.parquet", _jsonl(ROWS), "cannot be read"),
    ("x.arrow", b"", "cannot be read"),
    ("x.arrow", _arrow(ROWS)[:-30], "cannot be read"),
    ("x.arrow", _arrow(ROWS, pa.ipc.new_stream)[:-600], "cannot be read"),
    ("x.jsonl.gz", b"", "is empty"),
    ("x.jsonl.gz", gzip.compress(_jsonl(ROWS))[:-9], "cannot be read to its end: Compressed file ended"),
    ("x.jsonl.gz", gzip.compress(_jsonl(ROWS))[:-4] + b"1234", "cannot be read"),
    ("x.jsonl.gz", _jsonl(ROWS), "Not a gzipped file"),
    ("x.jsonl.zst", pa.compress(_jsonl(ROWS), codec="zstd", asbytes=True)[:-9], "cannot be read to its end"),
    ("x.jsonl.zst", _jsonl(ROWS), "cannot be read"),
    ("x.parquet.gz", gzip.compress(_parquet(ROWS)), "compressed inside"),
    ("x.jsonl", _parquet(ROWS), "is a Parquet file. Name it .parquet"),
    ("x.json", _arrow(ROWS), "is an Arrow file"),
    ("x.csv", gzip.compress(_table(ROWS)), "is a gzip file. Add .gz"),
    ("x.jsonl", b"PK\x03\x04....", "is a zip or Excel file"),
    ("x.jsonl", _jsonl(ROWS).decode().encode("utf-16"), "is UTF-16"),
    ("x.csv", _table(ROWS).decode().encode("utf-16-le"), "is UTF-16"),
    ("x.jsonl", b'{"a": 1}\n' + bytes(range(1, 256)) + b"\0", "is a binary file"),
    ("x.csv", ",".join(f"c{i}" for i in range(10**6)).encode() + b"\n1\n", "has 1,000,000 columns"),
    ("x.csv", b"a,b,a\n1,2,3\n", "more than one column of the name(s) ['a']"),
    ("x.csv", 'ä,b\n"1",2\n'.encode("latin-1"), "the heading is no UTF-8"),
    ("x.csv", b'"a,b\n1,2\n', "unexpected end of data"),
    ("x.json", b'[{"a": 1}, {"a": 2}', "is not closed"),
    ("x.json", b'[{"a": 1}] trailing', "is followed by ' trailing'"),
    ("x.json", b'{"data": [{"a": 1}], "more": [1]}', "the object holds 2 lists, ['data', 'more']"),
    ("x.json", b'{\n"a": 1}', "no list of rows begins"),
    ("x.json", b"3", "no list of rows begins"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "said"), BAD_FILES)
def test_a_file_that_is_no_data_is_refused_with_the_reason(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    uri = _put(tmp_path, name, data)
    with pytest.raises(DataError) as caught:
        _all(open_source(uri))
    assert said in str(caught.value) and str(caught.value).startswith(uri)


def test_a_directory_holds_one_kind_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="directory without data files"):
        open_source(str(tmp_path))
    _put(tmp_path, "a.jsonl", _jsonl(ROWS))
    _put(tmp_path, "notes.md", b"# Notes")
    with pytest.raises(DataError, match=r"holds \['notes.md'\], which are no data files"):
        open_source(str(tmp_path))
    (tmp_path / "notes.md").rename(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"several kinds: \['csv', 'jsonl'\]"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "absent"))


GOOD = b'{"text": "good"}'
BAD_ROWS = [
    (b"{", "no valid JSON: Expecting property name"),
    (b"{} {}", "no valid JSON: Extra data"),
    (b"[1]", "a JSON list, wanted an object"),
    (b"null", "a JSON NoneType, wanted an object"),
    (b'{"a": NaN}', "NaN is no JSON number"),
    (b'{"a": [-Infinity]}', "-Infinity is no JSON number"),
    (b'{"a": 1e999}', "1e999 is larger than any float"),
    (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    (b'{"a": {"b": 1, "b": 2}}', 'the key "b" stands twice'),
    (b'{"a": ["\\ud800"]}', "a has a lone surrogate"),
    (b'{"a": 1, "\\udfff": 2}', "has a lone surrogate"),
    (b'{"a": "\xe9"}', "byte 7 of the row is no UTF-8"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", f"more than {MAX_DEPTH} deep"),
    (b"[" * 100_000, f"more than {MAX_DEPTH} deep"),
    (json.dumps(dict.fromkeys(map(str, range(MAX_COLUMNS + 1)))).encode(), "has 10,001 columns"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_a_problem_with_its_number_and_the_others_are_read(row: bytes, said: str, tmp_path: Path) -> None:
    found = _all(open_source(_put(tmp_path, "x.jsonl", b"\n".join([GOOD, row, GOOD]))))
    assert [type(entry) for entry in found] == [Record, Problem, Record]
    assert isinstance(found[1], Problem) and found[1].number == 2 and said in found[1].text
    if row.count(b"[") == row.count(b"]") and row not in (b"{", b"{} {}"):  # else it ends elsewhere in a list
        in_list = _all(open_source(_put(tmp_path, "x.json", b"[" + b", ".join([GOOD, row, GOOD]) + b"]")))
        assert [type(entry) for entry in in_list] == [Record, Problem, Record]
        assert isinstance(in_list[1], Problem) and in_list[1].number == 2


def test_an_empty_place_in_a_list_is_a_problem(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, "x.json", b"[" + GOOD + b", ," + GOOD + b"]")
    assert problem.startswith("2: no valid JSON")


def test_what_only_looks_deep_or_broken_is_a_row(tmp_path: Path) -> None:
    row = {
        "code": "[{" * 500,
        "pair": "\U0001f600 \\ud83d",
        "deep": json.loads("[" * 60 + "]" * 60),
        "wide": [[1]] * 99,
    }
    assert _values(open_source(_put(tmp_path, "x.jsonl", json.dumps(row).encode()))) == [row]


def test_bad_rows_of_a_table_are_problems_with_their_numbers(tmp_path: Path) -> None:
    lines = [b"a,b", b"1,2", b"1", b'"x"y,2', b"", b"1,2,3", b"\xe9,2", b'"two', b'lines",2', b'5" disk,2', b'"open,2']
    assert _problems(tmp_path, "x.csv", b"\n".join(lines)) == [
        "2: has 1 cells, and the heading has 2. Quote cells that hold separators or newlines.",
        "3: is no valid CSV: ',' expected after '\"'. Quote cells that hold quotes, and double those.",
        "4: has 3 cells, and the heading has 2. Quote cells that hold separators or newlines.",
        "5: a is no UTF-8. Save the file as UTF-8.",
        "8: is no valid CSV: unexpected end of data. Quote cells that hold quotes, and double those.",
    ]


def test_a_missing_value_of_a_table_is_none_however_it_is_written(tmp_path: Path) -> None:
    table = pa.table({"a": [1.5, float("nan"), None], "b": ["x", None, "z"]})
    out = io.BytesIO()
    pq.write_table(table, out)
    rows = _values(open_source(_put(tmp_path, "x.parquet", out.getvalue())))
    assert rows == [{"a": 1.5, "b": "x"}, {"a": None, "b": None}, {"a": None, "b": "z"}]


def test_text_in_a_table_that_is_no_utf8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xe9", b"good"]).cast(pa.binary()).view(pa.string())
    out = io.BytesIO()
    pq.write_table(pa.table({"a": broken}), out)
    (problem,) = _problems(tmp_path, "x.parquet", out.getvalue())
    assert problem.startswith("2: cannot be read: a is damaged, or no UTF-8")


def test_a_table_with_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), out)
    with pytest.raises(DataError, match="more than one column"):
        open_source(_put(tmp_path, "x.parquet", out.getvalue()))


class _Peak:
    """The most memory that Python took inside the block."""

    def __enter__(self) -> _Peak:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


LARGE = 96 * 2**20


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_row_that_is_too_large_is_a_problem_that_is_never_held(kind: str, tmp_path: Path) -> None:
    before, after = {"jsonl": (GOOD + b"\n", b"\n" + GOOD), "json": (b"[" + GOOD + b",", b"," + GOOD + b"]")}.get(
        kind, (b"text\ngood\n", b"\ngood\n")
    )
    with gzip.open(tmp_path / f"x.{kind}.gz", "wb", compresslevel=1) as out:
        out.write(before)
        for _ in range(LARGE // 2**20):
            out.write(b"x" * 2**20)
        out.write(after)
    with _Peak() as peak:
        found = _all(open_source(str(tmp_path / f"x.{kind}.gz")))
    assert [type(entry) for entry in found] == [Record, Problem, Record]
    assert isinstance(found[1], Problem) and "a row has at most 16,777,216" in found[1].text
    assert peak.num_bytes < 4 * MAX_ROW_BYTES < LARGE  # a row, the same with the next chunk, and its parts


def test_a_large_row_of_a_table_is_a_problem_and_its_neighbours_are_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["good", "x" * (MAX_ROW_BYTES + 1), "good"]}), out, compression="zstd")
    (problem,) = _problems(tmp_path, "x.parquet", out.getvalue())
    assert problem.startswith("2: has 16,777,")


def _damaged(data: bytes, places: list[tuple[float, int]], kept: float) -> bytes:
    damaged = bytearray(data)
    for place, byte in places:
        damaged[int(place * (len(damaged) - 1))] = byte
    return bytes(damaged[: int(kept * len(damaged))])


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITTEN)),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    kept=st.just(1.0) | st.floats(0, 1),
)
def test_a_damaged_file_is_a_problem_or_a_data_error_and_nothing_else(
    name: str, places: list[tuple[float, int]], kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    uri = _put(tmp_path_factory.mktemp("damaged"), name, _damaged(WRITTEN[name](ROWS), places, kept))
    try:
        found = _all(open_source(uri))
    except DataError as error:
        assert uri in str(error)
    else:
        assert all(isinstance(entry, Record | Problem) for entry in found)


@pytest.fixture
def hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A directory as `datasets.load_dataset` takes it in the place of a hub id, with classes as numbers."""
    datasets = pytest.importorskip("datasets", reason="pip install 'loray[hub]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, numbers in (("train", [1, 0, -1]), ("test", [0])):
        rows = {"text": [f"{split} {number}" for number in numbers], "label": numbers}
        (tmp_path / "owner").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "owner" / f"{split}.parquet")
    yield f"hub:{tmp_path / 'owner'}"


def test_a_data_set_of_a_hub_is_a_source_whose_classes_have_names(hub_id: str) -> None:
    source = open_source(hub_id)
    assert _values(source) == [
        {"text": "train 1", "label": "yes"},
        {"text": "train 0", "label": "no"},
        {"text": "train -1", "label": None},
    ]
    assert source.kind == "hub" and source.num_bytes > 0
    assert open_source(hub_id).sha256 == source.sha256 != open_source(f"{hub_id}?split=test").sha256
    assert _values(open_source(f"{hub_id}?split=test")) == [{"text": "test 0", "label": "no"}]
    assert _values(open_source(f"{hub_id}?split=train[1:2]"))[0]["text"] == "train 0"
    part = Piece(hub_id, "hub", 0, first=3, start=2, end=3)
    assert [entry.number for entry in read_piece(part)] == [3]


@pytest.mark.parametrize(
    ("options", "said"),
    [("?split=valid", "valid"), ("?splt=train", r"option\(s\) \['splt'\]"), ("x", "cannot be loaded")],
)
def test_a_data_set_that_cannot_be_loaded_is_named_with_the_reason(hub_id: str, options: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_source(f"{hub_id}{options}")
