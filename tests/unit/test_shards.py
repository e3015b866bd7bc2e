"""Prepared examples in storage: the same from a mapped file and by ranges, visible when whole, and never in memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from service import storage
from service.data import shards
from service.data.shards import DataCard, Part, ShardWriter, TokenArrays
from service.errors import DataError, NotFoundError

pytest_plugins = ("tests.s3_endpoint",)

NUM_EXAMPLES = 50


def _example(number: int) -> tuple[list[int], list[int]]:
    return [1000 * number + i for i in range(number % 7 + 2)], [i % 2 for i in range(number % 7 + 2)]


def _written(home: str, *, digest: str = "d" * 64) -> DataCard:
    """NUM_EXAMPLES examples, some twenty tokens to a shard, by two writers."""
    root = storage.join(home, "datasets")
    with shards.attempt(digest, home=home) as place:
        writers = [ShardWriter(root, f"{place}/tokens-{i}", shard_tokens=20) for i in range(2)]
        for number in range(NUM_EXAMPLES):
            writers[number >= NUM_EXAMPLES // 2].add(*_example(number), row_number=number + 1)
        indices = [writer.close() for writer in writers]
        files = [shard for writer in writers for shard in writer.shards]
        counts = shards.write_index(storage.join(root, f"{place}/index.arrow"), indices, files)
        part = Part("rows.jsonl", digest, NUM_EXAMPLES, files=(("rows.jsonl", 0),))
        card = DataCard(
            source="rows.jsonl", digest=digest, source_sha256="", renderer_digest="", rows=NUM_EXAMPLES,
            rows_split_by_turn=0, rows_dropped=0, parts=(part,), index=f"{place}/index.arrow", **counts,
        )  # fmt: skip
        return shards.publish(card, home=home)


def _plain(examples: list[TokenArrays]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in examples]


@pytest.mark.parametrize("cached_bytes", [0, shards.CACHED_BYTES], ids=["by ranges", "cached"])
def test_what_was_written_is_read_wherever_it_lies(home: str, tmp_path: Path, cached_bytes: int) -> None:
    card = _written(home)
    rows = shards.load(card.digest, home=home, cache=tmp_path / "cache", cached_bytes=cached_bytes)
    wanted = [(ids, [0, *mask[1:]]) for ids, mask in map(_example, range(NUM_EXAMPLES))]
    order = np.random.default_rng(0).permutation(NUM_EXAMPLES)
    assert _plain(rows.take(order.tolist())) == [wanted[i] for i in order]
    assert _plain([rows[3]]) == [wanted[3]] and len(rows) == NUM_EXAMPLES
    assert rows.lengths.tolist() == [len(ids) for ids, _ in wanted]
    assert rows.supervised.tolist() == [sum(mask) for _, mask in wanted]
    assert rows.row_numbers.tolist() == list(range(1, NUM_EXAMPLES + 1)) and rows.scores is None
    assert (card.tokens, card.longest) == (sum(rows.lengths), max(rows.lengths))
    with pytest.raises(IndexError):
        rows[NUM_EXAMPLES]


def test_a_node_fetches_a_small_dataset_once(s3_home: str, tmp_path: Path) -> None:
    card = _written(s3_home)
    first = shards.load(card.digest, home=s3_home, cache=tmp_path)
    for name in storage.list_names(storage.join(s3_home, "datasets", card.digest)):
        if name != "card.json":
            storage.delete_tree(storage.join(s3_home, "datasets", card.digest, name))
    again = shards.load(card.digest, home=s3_home, cache=tmp_path)
    assert _plain(again.take(range(NUM_EXAMPLES))) == _plain(first.take(range(NUM_EXAMPLES)))


def test_examples_are_pages_of_their_file_and_not_copies(tmp_path: Path) -> None:
    card = _written(str(tmp_path))
    rows = shards.load(card.digest, home=str(tmp_path), cache=tmp_path)
    for array in (*rows[7], rows.lengths, rows.supervised, rows.row_numbers):
        assert not array.flags.owndata and not array.flags.writeable
    assert rows.lengths.dtype == np.int64  # as the planner takes it, without a copy


def test_any_arrow_reader_opens_a_shard(tmp_path: Path) -> None:
    _written(str(tmp_path))
    files = sorted(tmp_path.rglob("tokens-*.arrow"))
    tables = [ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    read = [ids for table in tables for ids in table.column("ids").to_pylist()]
    assert read == [_example(number)[0] for number in range(NUM_EXAMPLES)]


def test_a_dataset_is_not_there_before_its_card_and_leaves_nothing_when_it_fails(home: str) -> None:
    with pytest.raises(KeyboardInterrupt), shards.attempt("e" * 64, home=home) as place:
        writer = ShardWriter(storage.join(home, "datasets"), f"{place}/tokens")
        writer.add([1, 2], [0, 1], row_number=1)
        writer.close()
        with pytest.raises(NotFoundError):
            shards.find("e" * 64, home=home)
        raise KeyboardInterrupt
    assert not storage.list_names(storage.join(home, "datasets", *place.split("/")))


def test_of_two_that_prepare_the_same_one_wins_and_the_other_takes_its_files_away(home: str, tmp_path: Path) -> None:
    first, second = _written(home), _written(home)
    assert second == first
    names = storage.list_names(storage.join(home, "datasets", first.digest))
    assert sorted(names) == sorted(["card.json", first.index.split("/")[1]])


def test_a_card_of_another_version_is_told_apart(tmp_path: Path) -> None:
    directory = tmp_path / "datasets" / "f"
    directory.mkdir(parents=True)
    (directory / "card.json").write_text('{"source": "rows.jsonl", "rows": 3}')
    with pytest.raises(DataError, match="another version"):
        shards.find("f", home=str(tmp_path))


def test_a_row_number_of_a_mixture_leads_back_to_file_and_row() -> None:
    parts = (
        Part("one", "a", 3, files=(("one/x", 0), ("one/y", 2))),
        Part("two", "b", 2, examples_from=3, rows_before=5, files=(("two", 0),)),
    )
    card = DataCard(
        source="one, two", digest="", source_sha256="", renderer_digest="", rows=7, examples=5, rows_split_by_turn=0,
        rows_dropped=0, tokens=1, supervised_tokens=1, longest=1, parts=parts,
    )  # fmt: skip
    assert [card.place(number) for number in (1, 2, 3, 5, 6, 7)] == list(
        itertools.chain([("one/x", 1), ("one/x", 2), ("one/y", 1), ("one/y", 3), ("two", 1), ("two", 2)])
    )
    assert card.where([6, 1, 3, 1]) == "[1] of one/x, [1] of one/y, [1] of two"
    assert card.bounds == (0, 3, 5)
    assert card.where(range(1, 8)).endswith("of two")
