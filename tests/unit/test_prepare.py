"""Prepared data: tokenised once per content, named rows where it cannot be, and equal examples on every store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service import storage
from service.cli.planned import data_table
from service.config import AugmentBlock, FilterBlock, ReadingBlock, RunConfig, SplitBlock
from service.data.files import open_source
from service.data.prepare import prepare, prepare_run
from service.data.shards import DataCard, load
from service.data.split import Sides
from service.data.tokenised import Recipe
from service.errors import DataError, ModelError, StorageError
from service.render import Chat, Example, Renderer, TrainOn, load_renderer
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

    def examples_batch(
        self, chats: Sequence[Chat], train_on: TrainOn = "responses"
    ) -> list[list[Example] | DataError | ModelError]:
        self.rendered += len(chats)
        return super().examples_batch(chats, train_on)


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


def _config(directory: Path, *answers: str, **data: Any) -> RunConfig:
    block = {"train": _file(directory, *answers), "seq_len": 256} | data if answers else data
    return RunConfig.model_validate({"model": {"id": "any"}, "data": block})


def _recipe(**options: Any) -> Recipe:
    return Recipe(
        **{"reading": ReadingBlock(), "train_on": "responses", "seq_len": 256, "over_long": "error", **options}
    )


def _prepare(uri: str, renderer: Renderer, home: str, **options: Any) -> DataCard:
    return prepare(open_source(uri), _recipe(**options), renderer, home=home)


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
    assert card.supervised_share == card.supervised_tokens / card.tokens
    assert rows.card == card and rows.row_numbers.tolist() == [1, 2, 3]


def test_the_same_content_is_tokenised_once(home: str, tmp_path: Path, renderer: CountingRenderer) -> None:
    first = _prepare(_file(tmp_path, "one", "two"), renderer, home)
    copy = _file(tmp_path / "elsewhere", "one", "two", name="copy.jsonl")
    second = _prepare(copy, renderer, home)
    assert renderer.rendered == 2
    assert second.digest == first.digest and second.source == copy
    assert storage.list_names(storage.join(home, "datasets")) == [first.digest]


def test_what_a_killed_preparation_has_left_is_removed_by_the_next(
    home: str, tmp_path: Path, renderer: CountingRenderer
) -> None:
    uri = _file(tmp_path, "one", "two")
    digest = _recipe().digest(open_source(uri).sha256, "jsonl", renderer.digest)
    place = storage.join(home, "datasets", digest)
    storage.write_bytes(storage.join(place, "killed", "tokens-00000-00.arrow"), b"half of it")
    card = _prepare(uri, renderer, home)
    assert card.digest == digest and storage.list_names(place) == sorted([card.index.split("/")[1], "card.json"])


class OvertakenRenderer(CountingRenderer):
    """One whose first conversations are rendered when another preparation of the same rows has begun and ended."""

    def overtaken_by(self, other: Callable[[], object], error: Exception | None) -> OvertakenRenderer:
        self.other, self.error = [other], error
        return self

    def examples_batch(
        self, chats: Sequence[Chat], train_on: TrainOn = "responses"
    ) -> list[list[Example] | DataError | ModelError]:
        if self.other:
            self.other.pop()()
            if self.error:
                raise self.error
        return super().examples_batch(chats, train_on)


@pytest.mark.parametrize("error", [None, StorageError("its directory went away")], ids=["writing", "not writing"])
def test_a_preparation_that_is_overtaken_gives_what_the_other_has_made(
    home: str, tmp_path: Path, renderer: CountingRenderer, error: Exception | None
) -> None:
    uri, cards = _file(tmp_path, "one", "two"), list[DataCard]()
    slow = OvertakenRenderer(renderer.tokenizer, renderer.stop_ids)
    slow.overtaken_by(lambda: cards.append(_prepare(uri, renderer, home)), error)
    assert _prepare(uri, slow, home) == cards[0]
    left = storage.list_names(storage.join(home, "datasets", cards[0].digest))
    assert left == sorted([cards[0].index.split("/")[1], "card.json"])
    assert len(load(cards[0].digest, home=home, cache=tmp_path / "cache")) == 2


def test_storage_that_fails_is_told_where_nobody_else_has_made_the_dataset(
    tmp_path: Path, renderer: CountingRenderer
) -> None:
    slow = OvertakenRenderer(renderer.tokenizer, renderer.stop_ids).overtaken_by(lambda: None, StorageError("away"))
    with pytest.raises(StorageError, match="away"):
        _prepare(_file(tmp_path, "one"), slow, str(tmp_path / "home"))


def test_what_the_test_asks_is_no_more_to_be_trained_than_what_the_evaluation_asks(
    tmp_path: Path, renderer: CountingRenderer
) -> None:
    config = _config(tmp_path, *map(str, range(60)))
    lines = Path(config.data.train).read_text().splitlines(keepends=True)  # type: ignore[arg-type]
    files = {"eval": [lines[7]], "test": [lines[9], lines[3]]}
    for side, rows in files.items():
        (tmp_path / f"{side}.jsonl").write_text("".join(rows))
    named = {side: str(tmp_path / f"{side}.jsonl") for side in files}
    config = config.model_copy(update={"data": config.data.model_copy(update=named)})
    (checkup,) = prepare_run(config, renderer, home=str(tmp_path / "home")).checkups
    (leak,) = (finding for finding in checkup.findings if finding.kind == "leak")
    assert checkup.against == f"{named['eval']} and then {named['test']}" and checkup.against_rows == 3
    assert leak.rows == (4, 8, 10)


def test_a_source_that_the_checkup_did_not_read_to_its_end_is_named_in_the_plan(
    tmp_path: Path, renderer: CountingRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, *map(str, range(60)))
    for rows, told in ((60, False), (59, True)):
        monkeypatch.setattr("service.data.precheck.CHECKED_ROWS", rows)
        for _ in range(2):  # looked at, and remembered
            prepared = prepare_run(config, renderer, home=str(tmp_path / "home"))
            console = Console(width=400, record=True, file=io.StringIO())
            console.print(data_table(prepared))
            shown = console.export_text()
            assert ("The checkup read the first 59 rows. All: loray data check" in shown) is told
            assert [checkup.whole for checkup in prepared.checkups] == [not told]


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "seq_len": {"seq_len": 128},
    "over_long": {"over_long": "drop"},
    "train_on": {"train_on": "all"},
    "columns": {"reading": ReadingBlock(columns={"prompt": "completion", "completion": "prompt"})},
    "format": {"reading": ReadingBlock(format="prompt")},
    "template": {"reading": ReadingBlock(template="Say {prompt}")},
    "filter": {"filter": FilterBlock(max_chars=1000)},
    "augment": {"augment": AugmentBlock(copies=1, swap=0.5)},
    "seed of the copies": {"augment": AugmentBlock(copies=1, swap=0.5), "seed": 1},
    "synonyms": {"augment": AugmentBlock(copies=1, swap=0.5), "synonyms": {"q0": ("q1",)}},
    "curriculum": {"score": "level"},
    "side of a split": {"sides": Sides.of(SplitBlock(eval=0.5), lambda: iter(())), "side": "train"},
    "other side": {"sides": Sides.of(SplitBlock(eval=0.5), lambda: iter(())), "side": "eval"},
    "other split": {"sides": Sides.of(SplitBlock(eval=0.4), lambda: iter(())), "side": "eval"},
}


def test_every_option_that_decides_what_rows_become_changes_the_digest(tmp_path: Path) -> None:
    digests = {name: _recipe(**options).digest("content", "jsonl", "renderer") for name, options in OPTIONS.items()}
    digests |= {"content": _recipe().digest("other", "jsonl", "renderer")}
    digests |= {"kind of file": _recipe().digest("content", "csv", "renderer")}
    digests |= {"renderer": _recipe().digest("content", "jsonl", "other")}
    assert len(set(digests.values())) == len(digests)


def test_no_field_of_a_recipe_is_missing_from_its_digest() -> None:
    assert {field for options in OPTIONS.values() for field in options} == {field.name for field in fields(Recipe)}


def test_what_does_not_decide_prepares_nothing_again(tmp_path: Path, renderer: CountingRenderer) -> None:
    config = _config(tmp_path, "one", "two")
    first = prepare_run(config, renderer, home=str(tmp_path / "home"))
    done = renderer.rendered
    other = config.model_copy(update={"seed": 5, "optim": config.optim.model_copy(update={"lr": 1.0})})
    assert prepare_run(other, renderer, home=str(tmp_path / "home")) == first
    assert renderer.rendered == done == 2


def test_a_file_that_has_grown_is_tokenised_again(tmp_path: Path, renderer: CountingRenderer) -> None:
    uri, home = _file(tmp_path, "one"), str(tmp_path / "home")
    first = _prepare(uri, renderer, home)
    assert _prepare(_file(tmp_path, "one", "two"), renderer, home).digest != first.digest
    assert renderer.rendered == 3


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
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_dropped_rows_are_counted_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    uri, home = _file(tmp_path, "12", "x" * 30, "123", "x" * 40), str(tmp_path / "home")
    card = _prepare(uri, _plain(tmp_path), home, seq_len=9, over_long="drop")
    assert (card.rows, card.examples, card.rows_dropped, card.longest) == (4, 2, 2, 9)
    assert load(card.digest, home=home, cache=tmp_path).row_numbers.tolist() == [1, 3]


def test_truncated_rows_keep_their_beginning_and_those_without_a_trained_token_go(tmp_path: Path) -> None:
    # u q 0 <end> a ANSWER <end>, of which 6 tokens are left: one letter of the answer, and none of the last row's
    uri, home, renderer = _file(tmp_path, "1", "23"), str(tmp_path / "home"), _plain(tmp_path)
    with Path(uri).open("a") as file:
        file.write(json.dumps({"prompt": "longer", "completion": "4"}) + "\n")
    card = _prepare(uri, renderer, home, seq_len=6, over_long="truncate")
    assert (card.rows, card.examples, card.rows_truncated, card.rows_dropped) == (3, 2, 3, 1)
    rows = load(card.digest, home=home, cache=tmp_path)
    assert [renderer.decode(rows[i][0].tolist()) for i in range(2)] == ["uq0a1", "uq1a2"]
    assert rows.supervised.tolist() == [1, 1] and rows.row_numbers.tolist() == [1, 2]


def test_everything_that_is_wrong_is_said_at_once_with_its_row(tmp_path: Path) -> None:
    uri = _file(tmp_path, "1", "x" * 30, "2")
    with Path(uri).open("a") as file:
        file.write('{"prompt": "only"}\nno json\n')
    with pytest.raises(DataError) as caught:
        _prepare(uri, _plain(tmp_path), str(tmp_path / "home"), seq_len=9, score="level")
    message = str(caught.value)
    assert "row 2 (36)" in message and "row 4: field 'completion' is missing" in message and "row 5" in message
    assert "row 1: field 'level' is missing, wanted a number: data.curriculum" in message


def test_a_source_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    config = _config(tmp_path, "x" * 30, seq_len=9, over_long="drop")
    with pytest.raises(DataError, match=r"no row is left, of 1.*1 over data\.seq_len = 9"):
        prepare_run(config, _plain(tmp_path), home=str(tmp_path / "home"))


def test_filtered_rows_are_counted_and_copies_are_made_of_those_that_stay(tmp_path: Path, renderer: Renderer) -> None:
    answers = [str(i) * (20 if i % 4 == 0 else 1) for i in range(1, 21)]
    config = _config(
        tmp_path, *answers, filter={"max_chars": 10}, augment={"copies": 2, "swap": 0.5}, split={"eval": 0.4}
    )
    train, held_out = (prepared := prepare_run(config, renderer, home=str(tmp_path / "home"))).train, prepared.eval
    assert held_out is not None and train.rows + held_out.rows == 20
    filtered = [sum(card.rows_filtered.values()) for card in (train, held_out)]
    assert sum(filtered) == 5 and all("data.filter.max_chars" in why for why in train.rows_filtered)
    assert train.rows_copied == 2 * (train.rows - filtered[0]) and train.examples == 3 * (train.rows - filtered[0])
    assert held_out.rows_copied == 0 and held_out.examples == held_out.rows - filtered[1]


def test_sides_of_a_split_have_every_row_once(tmp_path: Path, renderer: Renderer) -> None:
    config = _config(tmp_path, *(f"answer {i}" for i in range(40)), split={"eval": 0.3, "test": 0.2})
    prepared = prepare_run(config, renderer, home=str(tmp_path / "home"))
    assert prepared.eval is not None and prepared.test is not None
    cards = (prepared.train, prepared.eval, prepared.test)
    numbers = [load(card.digest, home=str(tmp_path / "home"), cache=tmp_path).row_numbers.tolist() for card in cards]
    assert sorted(number for side in numbers for number in side) == list(range(1, 41))


def test_several_sources_are_one_dataset_in_their_order_and_each_is_tokenised_once(
    home: str, tmp_path: Path, renderer: CountingRenderer
) -> None:
    files = [_file(tmp_path, "a", "b", name="one.jsonl"), _file(tmp_path, "c", name="two.jsonl")]
    both = prepare_run(_config(tmp_path, train=files), renderer, home=home).train
    rows = load(both.digest, home=home, cache=tmp_path / "cache")
    assert [renderer.decode(ids.tolist())[-1] for ids, _ in rows.take(range(3))] == ["a", "b", "c"]
    assert rows.row_numbers.tolist() == [1, 2, 3] and both.bounds == (0, 2, 3)
    assert both.where([1, 2, 3]) == f"[1, 2] of {files[0]}, [1] of {files[1]}"
    other_order = prepare_run(_config(tmp_path, train=files[::-1]), renderer, home=home).train
    assert other_order.digest != both.digest and renderer.rendered == 3
    assert prepare_run(_config(tmp_path, train=files), renderer, home=home).train == both


def test_small_files_of_a_directory_are_done_together_and_named_each(tmp_path: Path, renderer: Renderer) -> None:
    for number in range(3):
        _file(tmp_path / "rows", *(f"{number}{i}" for i in range(2)), name=f"part-{number}.jsonl")
    card = _prepare(str(tmp_path / "rows"), renderer, str(tmp_path / "home"))
    assert card.where([2, 3, 6]) == ", ".join(
        f"[{n}] of {tmp_path}/rows/part-{i}.jsonl" for i, n in enumerate((2, 1, 2))
    )
    assert len(list((tmp_path / "home").rglob("tokens-*.arrow"))) == 1


def test_parts_give_the_same_bytes_whoever_does_them(
    tmp_path: Path, renderer: CountingRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = _file(tmp_path, *(f"answer {i}" for i in range(2000)))
    whole = _prepare(uri, renderer, str(tmp_path / "whole"))
    monkeypatch.setattr("service.data.files.CHUNK_BYTES", 2**10)
    for module in ("records", "prepare"):
        monkeypatch.setattr(f"service.data.{module}.PIECE_BYTES", 2**12)
    cut = _prepare(uri, renderer, str(tmp_path / "cut"))
    assert cut.digest == whole.digest and len(list((tmp_path / "cut").rglob("tokens-*.arrow"))) > 5
    one, two = (
        load(whole.digest, home=str(tmp_path / home), cache=tmp_path).take(range(2000)) for home in ("whole", "cut")
    )
    assert [ids.tolist() for ids, _ in one] == [ids.tolist() for ids, _ in two]


def test_a_template_that_cannot_train_a_row_names_it(tmp_path: Path, renderer: CountingRenderer) -> None:
    endless = load_renderer(tmp_path / "tokenizer", CHATML.replace("<|im_end|>", ""))
    with pytest.raises(ModelError, match=r"rows\.jsonl: row 1: .*would never stop"):
        _prepare(_file(tmp_path, "one"), endless, str(tmp_path / "home"))


def test_an_answer_without_a_question_is_named_with_its_row(tmp_path: Path, renderer: CountingRenderer) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    with pytest.raises(DataError, match=r"row 1: messages has only an answer, wanted the user's message before it"):
        _prepare(str(file), renderer, str(tmp_path / "home"))


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
