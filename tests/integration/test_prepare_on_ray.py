"""Large sources are tokenised by Ray Data on the cluster's CPUs: the same bytes, and the same words for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.config import ReadingBlock
from service.data.files import open_source
from service.data.prepare import prepare
from service.data.shards import DataCard
from service.data.tokenised import Recipe
from service.errors import DataError, ModelError
from service.render import Renderer, load_renderer
from tests.integration.tiny import CHATML, save_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # of its own context, as it copies that
]
RECIPE = Recipe(reading=ReadingBlock(), train_on="responses", seq_len=256, over_long="error")
NUM_ROWS = 2000


@pytest.fixture
def renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    """ChatML on one token a letter; sources are cut into pieces of 4 KiB."""
    monkeypatch.setattr("service.data.files.CHUNK_BYTES", 2**10)
    for module in ("records", "prepare"):
        monkeypatch.setattr(f"service.data.{module}.PIECE_BYTES", 2**12)
    save_tokenizer(tmp_path / "tokenizer")
    return load_renderer(tmp_path / "tokenizer")


def _file(path: Path, **changed: object) -> str:
    """Rows with an answer each; `changed` are fields of the one before the last."""
    rows: list[dict[str, object]] = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(NUM_ROWS)]
    rows[-2] |= changed
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _prepare(uri: str, renderer: Renderer, home: Path, *, on_ray: bool) -> DataCard:
    return prepare(open_source(uri), RECIPE, renderer, home=str(home), **({"spread_bytes": 1} if on_ray else {}))


def _shards(home: Path) -> dict[str, bytes]:
    """All but the index, which says where they lie."""
    return {file.name: file.read_bytes() for file in home.rglob("tokens-*.arrow")}


def test_ray_data_writes_the_bytes_that_one_process_writes(
    ray_cluster: str, tmp_path: Path, renderer: Renderer
) -> None:
    uri = _file(tmp_path / "rows.jsonl")
    spread = _prepare(uri, renderer, tmp_path / "spread", on_ray=True)
    alone = _prepare(uri, renderer, tmp_path / "alone", on_ray=False)
    assert (spread.digest, spread.tokens, spread.examples) == (alone.digest, alone.tokens, NUM_ROWS)
    assert _shards(tmp_path / "spread") == _shards(tmp_path / "alone") and len(_shards(tmp_path / "alone")) > 10


def test_what_is_wrong_is_said_as_one_process_says_it_and_nothing_is_left(
    ray_cluster: str, tmp_path: Path, renderer: Renderer
) -> None:
    too_long = _file(tmp_path / "long.jsonl", completion="x" * 300)
    with pytest.raises(DataError) as alone:
        _prepare(too_long, renderer, tmp_path / "alone", on_ray=False)
    with pytest.raises(DataError) as spread:
        _prepare(too_long, renderer, tmp_path / "spread", on_ray=True)
    assert str(spread.value) == str(alone.value) and str(NUM_ROWS - 1) in str(alone.value)
    save_tokenizer(tmp_path / "tokenizer", CHATML.replace("<|im_end|>", ""))
    endless = load_renderer(tmp_path / "tokenizer")
    with pytest.raises(ModelError, match=r"row 1: .*would never stop"):
        _prepare(_file(tmp_path / "rows.jsonl"), endless, tmp_path / "spread", on_ray=True)
    assert _shards(tmp_path / "spread") == {}
