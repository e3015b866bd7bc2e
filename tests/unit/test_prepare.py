"""Prepared data: tokenised once per content, named rows where it cannot be, and equal arrays on every store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service import storage
from service.data.prepare import DataCard, load, prepare
from service.errors import DataError, ModelError
from service.render import Example, Message, Renderer, load_renderer
from tests.integration.tiny import CHATML, save_tokenizer

pytest_plugins = ("tests.s3_endpoint",)

# With this template a row of prompt and completion has its letters, one a role, and two end tokens.
PLAIN = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


class CountingRenderer(Renderer):
    """A renderer that counts the conversations it was asked to tokenise."""

    rendered = 0

    def examples(self, messages: Sequence[Message]) -> list[Example]:
        self.rendered += 1
        return super().examples(messages)


@pytest.fixture
def renderer(tmp_path: Path) -> CountingRenderer:
    """ChatML on one token a letter."""
    save_tokenizer(tmp_path / "tokenizer")
    plain = load_renderer(tmp_path / "tokenizer")
    return CountingRenderer(plain.tokenizer, plain.stop_ids)


def _file(directory: Path, *answers: str, name: str = "rows.jsonl") -> str:
    directory.mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": f"q{i}", "completion": answer}) for i, answer in enumerate(answers)]
    (directory / name).write_text("\n".join(rows) + "\n")
    return str(directory / name)


def _prepare(uri: str, renderer: Renderer, home: str, seq_len: int = 256, over_long: str = "error") -> DataCard:
    return prepare(uri, renderer, home=home, seq_len=seq_len, over_long=over_long)


def test_what_is_loaded_is_what_the_renderer_gives(home: str, tmp_path: Path, renderer: CountingRenderer) -> None:
    answers = ["one", "a longer answer", "3"]
    card = _prepare(_file(tmp_path, *answers), renderer, home)
    rows = load(card.digest, home=home, cache=tmp_path / "cache")
    assert len(rows) == card.examples == card.rows == 3
    for index, answer in enumerate(answers):
        conversation = [{"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": answer}]
        (wanted,) = renderer.examples(conversation)
        ids, mask = rows[index]
        assert ids.tolist() == wanted.ids and mask.astype(bool).tolist() == wanted.mask
        assert rows.lengths[index] == len(wanted.ids) and rows.supervised[index] == sum(wanted.mask)
    assert (card.tokens, card.supervised_tokens, card.longest) == (
        sum(rows.lengths),
        sum(rows.supervised),
        max(rows.lengths),
    )
    assert rows.lengths.dtype == rows.supervised.dtype == np.int64
    assert rows.lengths is rows.lengths and rows.supervised is rows.supervised  # counted once
    assert card.supervised_share == card.supervised_tokens / card.tokens
    assert rows.card == card and rows.row_numbers.tolist() == [1, 2, 3]


def test_the_same_content_is_tokenised_once(home: str, tmp_path: Path, renderer: CountingRenderer) -> None:
    first = _prepare(_file(tmp_path, "one", "two"), renderer, home)
    copy = _file(tmp_path / "elsewhere", "one", "two", name="copy.jsonl")
    second = _prepare(copy, renderer, home)
    assert renderer.rendered == 2
    assert second.digest == first.digest and second.source == copy
    assert storage.list_names(storage.join(home, "datasets")) == [first.digest]


def test_a_cached_copy_on_the_node_equals_the_store(s3_home: str, tmp_path: Path, renderer: CountingRenderer) -> None:
    card = _prepare(_file(tmp_path, "one", "two"), renderer, s3_home)
    first = load(card.digest, home=s3_home, cache=tmp_path / "cache")
    storage.delete_tree(storage.join(s3_home, "datasets", card.digest, "tokens.safetensors"))
    again = load(card.digest, home=s3_home, cache=tmp_path / "cache")
    assert np.array_equal(first.ids, again.ids) and np.array_equal(first.offsets, again.offsets)


def test_every_option_that_changes_tokens_changes_the_digest(tmp_path: Path, renderer: CountingRenderer) -> None:
    uri, home = _file(tmp_path, "one"), str(tmp_path / "home")
    other = load_renderer(tmp_path / "tokenizer", CHATML.replace("\n{% endfor", "{% endfor"))
    cards = [
        _prepare(uri, renderer, home),
        _prepare(uri, renderer, home, seq_len=128),
        _prepare(uri, renderer, home, over_long="drop"),
        _prepare(uri, other, home),
        _prepare(_file(tmp_path / "b", "onE"), renderer, home),
    ]
    assert len({card.digest for card in cards}) == 5


def _plain(tmp_path: Path) -> Renderer:
    save_tokenizer(tmp_path / "tokenizer")
    return load_renderer(tmp_path / "tokenizer", PLAIN)


def test_rows_longer_than_seq_len_are_named_with_their_length(tmp_path: Path) -> None:
    # u q 0 <end> a ANSWER <end>: 6 tokens and the answer's letters
    uri = _file(tmp_path, "12", "x" * 30, "123", "x" * 40)
    with pytest.raises(DataError) as caught:
        _prepare(uri, _plain(tmp_path), str(tmp_path / "home"), seq_len=9)
    assert "2 row(s) have more than data.seq_len = 9 tokens: row 2 (36), row 4 (46)" in str(caught.value)
    assert "data.over_long: drop" in str(caught.value)
    assert storage.list_names(str(tmp_path / "home")) == []


def test_dropped_rows_are_counted_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    uri, home = _file(tmp_path, "12", "x" * 30, "123", "x" * 40), str(tmp_path / "home")
    card = _prepare(uri, _plain(tmp_path), home, seq_len=9, over_long="drop")
    assert (card.rows, card.examples, card.rows_dropped, card.longest) == (4, 2, 2, 9)
    assert load(card.digest, home=home, cache=tmp_path).row_numbers.tolist() == [1, 3]


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    uri = _file(tmp_path, "x" * 30)
    with pytest.raises(DataError, match=r"no row is left.*all 1 are over data\.seq_len = 9"):
        _prepare(uri, _plain(tmp_path), str(tmp_path / "home"), seq_len=9, over_long="drop")


def test_a_template_that_cannot_train_a_row_names_it(tmp_path: Path, renderer: CountingRenderer) -> None:
    endless = load_renderer(tmp_path / "tokenizer", CHATML.replace("<|im_end|>", ""))
    with pytest.raises(ModelError, match=r"rows\.jsonl: row 1: .*would never stop"):
        _prepare(_file(tmp_path, "one"), endless, str(tmp_path / "home"))


def test_an_answer_without_a_question_is_trained_or_its_row_named(tmp_path: Path, renderer: CountingRenderer) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    try:
        assert _prepare(str(file), renderer, str(tmp_path / "home")).examples == 1
    except DataError as error:
        assert "row 1" in str(error)


def test_a_conversation_that_a_template_rewrites_is_counted_as_split(
    tmp_path: Path, renderer: CountingRenderer
) -> None:
    only_last = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    card = _prepare(str(file), load_renderer(tmp_path / "tokenizer", only_last), str(tmp_path / "home"))
    assert (card.rows, card.examples, card.rows_split_by_turn) == (1, 2, 1)


def test_data_on_s3_is_the_same_data(s3_home: str, tmp_path: Path, renderer: CountingRenderer) -> None:
    local = _file(tmp_path, "one", "two")
    remote = storage.join(s3_home, "rows.jsonl")
    storage.put_file(Path(local), remote)
    assert _prepare(remote, renderer, s3_home).digest == _prepare(local, renderer, str(tmp_path / "home")).digest
