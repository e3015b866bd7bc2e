"""The checkup: each planted defect is found with its row, and none is invented."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.config import DataBlock, ReadingBlock
from service.data.checkup import Checkup, check, refuse
from service.data.files import open_source
from service.data.formats import read_source
from service.data.rows import Conversation, Labelled, Preference, Problem, Row, Text
from service.errors import DataError
from service.render import Renderer, load_renderer
from tests.integration.tiny import save_tokenizer
from tests.unit import corpora

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 2500
DATA = DataBlock(train="rows.jsonl", seq_len=SEQ_LEN)
ALL = 10**6


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return load_renderer(directory)


def _written(directory: Path, lines: Sequence[bytes]) -> str:
    file = directory / "rows.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    return str(file)


def _read(uri: str) -> list[Row | Problem]:
    return list(read_source(open_source(uri), ReadingBlock()))


def _rows(contents: Sequence[Any]) -> list[Row]:
    return [Row(number, content) for number, content in enumerate(contents, 1)]


def _conversations(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return _rows([Conversation(tuple(row["messages"])) for row in rows])


def _labelled(counts: dict[str, int], seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    labels = [label for label, count in counts.items() for _ in range(count)]
    return _rows([Labelled(corpora.text(draw, 20), label) for label in labels])


def _kinds(checkup: Checkup) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.rows for finding in checkup.findings}


def test_every_planted_defect_is_found_with_its_row_and_nothing_else(tmp_path: Path, renderer: Renderer) -> None:
    rows, evaluation = corpora.clean(500, seed=1), corpora.clean(20, seed=2)
    defects = corpora.defects(3, seq_len=SEQ_LEN, evaluation=evaluation, earlier=rows)
    lines = [json.dumps(row).encode() for row in rows]
    planted: set[tuple[str, int]] = set()
    for number, defect in enumerate(defects):
        row = 40 + 10 * number
        lines[row - 1] = defect.line
        planted.add((defect.kind, row))
    assert len(defects) >= 20 and max(row for _, row in planted) <= len(lines)
    checkup = check(
        _read(_written(tmp_path, lines)),
        renderer=renderer,
        data=DATA,
        against=_conversations(evaluation),
        near_rows=ALL,
    )
    found = {(mark.kind, number) for mark in checkup.marks for number in mark.rows}
    (far_too_long,) = (row for kind, row in planted if kind == "row_length")
    assert found - planted == {("over_long", far_too_long)}
    assert planted - found == set()
    assert checkup.unreadable == sum(kind == "unreadable" for kind, _ in planted)


def test_nothing_is_invented_on_clean_data(renderer: Renderer) -> None:
    rows, evaluation = corpora.clean(2000, seed=4), corpora.clean(300, seed=5)
    checkup = check(_conversations(rows), renderer=None, data=DATA, against=_conversations(evaluation), near_rows=ALL)
    assert checkup.findings == () and checkup.near_rows == 2000


def test_nothing_is_invented_on_the_tickets(renderer: Renderer) -> None:
    train, evaluation = (_read(str(ROOT / f"jobs/recipes/data/tickets.{side}.jsonl")) for side in ("train", "eval"))
    data = DataBlock(train="tickets")
    assert check(train, renderer=renderer, data=data, against=evaluation, near_rows=ALL).findings == ()
    assert check(evaluation, renderer=renderer, data=data, near_rows=ALL).findings == ()


def test_errors_refuse_training_all_at_once_with_rows_and_remedies(renderer: Renderer) -> None:
    rows = _conversations(corpora.clean(60, seed=6))
    problems = [Problem(61, 'messages[0].role is "bot", wanted one of user.'), Problem(62, "no valid JSON: x.")]
    short = DataBlock(train="x", seq_len=700)
    checkup = check([*rows, *problems], renderer=renderer, data=short, name="x.jsonl")
    with pytest.raises(DataError) as raised:
        refuse(checkup)
    message = str(raised.value)
    assert "x.jsonl: 3 errors" in message and "Row 61." in message and "Row 62." in message
    assert "data.over_long to drop or truncate" in message and "--quarantine" in message
    refuse(check(rows, renderer=None, data=short))


def test_rows_with_the_same_problem_are_one_finding_and_a_row_with_two_is_one_row() -> None:
    same = [Problem(number, f'messages[{number}].role is "b{number}", wanted user.') for number in range(1, 31)]
    checkup = check([*same, Problem(30, "messages[9].content is empty.")], renderer=None, data=DATA)
    by_count = {finding.count: finding for finding in checkup.findings if finding.kind == "unreadable"}
    assert sorted(by_count) == [1, 30] and by_count[30].rows == tuple(range(1, 11))
    assert checkup.unreadable == 30 and 'is "b1"' in by_count[30].text


@pytest.mark.parametrize(("policy", "level"), [("error", "error"), ("drop", "warning"), ("truncate", "warning")])
def test_what_over_long_rows_are_follows_from_the_policy(renderer: Renderer, policy: Any, level: str) -> None:
    rows = _conversations([corpora.clean(1, seed=7)[0] for _ in range(1)])
    data = DataBlock(train="x", seq_len=300, over_long=policy)
    (finding,) = (f for f in check(rows, renderer=renderer, data=data).findings if f.kind == "over_long")
    assert finding.level == level and finding.rows == (1,)


def test_a_row_whose_answer_is_all_cut_off_is_an_error(renderer: Renderer) -> None:
    turns = ({"role": "user", "content": "why " * 40}, {"role": "assistant", "content": "So."})
    data = DataBlock(train="x", seq_len=64, over_long="truncate")
    checkup = check(_rows([Conversation(turns)]), renderer=renderer, data=data)
    assert [finding.kind for finding in checkup.errors] == ["truncated_away"]


def test_tokens_are_counted_as_the_renderer_gives_them(renderer: Renderer) -> None:
    rows = _conversations(corpora.clean(100, seed=8))
    tokens = check(rows, renderer=renderer, data=DATA).tokens
    examples = [example for row in rows for example in renderer.examples(row.messages)]
    assert tokens is not None and tokens.examples == sum(tokens.counts) == len(examples)
    assert tokens.total == sum(len(example.ids) for example in examples)
    assert tokens.supervised == sum(sum(example.mask) for example in examples)
    assert tokens.longest == max(len(example.ids) for example in examples) == tokens.edges[-1] - 1


def test_data_without_a_trained_token_is_an_error(renderer: Renderer) -> None:
    turns = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello.", "train": False})
    for found in (check(_rows([Conversation(turns)]), renderer=one, data=DATA) for one in (None, renderer)):
        assert "nothing_trained" in _kinds(found) and found.errors


def test_an_empty_file_and_few_rows_are_told() -> None:
    assert [finding.kind for finding in check([], renderer=None, data=DATA).errors] == ["no_rows"]
    few = check(_conversations(corpora.clean(49, seed=9)), renderer=None, data=DATA)
    assert _kinds(few) == {"too_few_rows": ()} and not few.errors


def test_classes_out_of_balance_and_too_small_are_told_with_rows_of_the_small_ones() -> None:
    even = check(_labelled({"yes": 100, "no": 60, "maybe": 40}), renderer=None, data=DATA)
    assert even.findings == ()
    uneven = check(_labelled({"yes": 300, "no": 20, "maybe": 3}), renderer=None, data=DATA)
    assert _kinds(uneven) == {"class_imbalance": (321, 322, 323), "rare_class": (321, 322, 323)}
    only = check(_labelled({"yes": 100}), renderer=None, data=DATA)
    assert _kinds(only) == {"one_class": ()}


def test_short_answers_of_few_kinds_are_classes_and_long_or_many_are_not() -> None:
    draw = random.Random(10)

    def answered(answers: Sequence[str]) -> list[Row]:
        return _conversations(
            [
                {"messages": [{"role": "user", "content": corpora.text(draw, 20)}, {"role": "assistant", "content": a}]}
                for a in answers
            ]
        )

    classes = check(answered(["spam"] * 190 + ["ham"] * 10), renderer=None, data=DATA)
    assert _kinds(classes) == {"class_imbalance": tuple(range(191, 201))}
    names = check(answered([f"name {number % 150}" for number in range(1500)]), renderer=None, data=DATA)
    assert names.findings == ()


def test_the_same_text_with_two_labels_is_told_for_both_rows() -> None:
    rows = _labelled({"yes": 60, "no": 60})
    again = [Row(121, Labelled(rows[0].content.text, "no")), Row(122, Labelled(rows[1].content.text, "yes"))]  # type: ignore[union-attr]
    kinds = _kinds(check([*rows, *again], renderer=None, data=DATA))
    assert kinds == {"conflicting_labels": (1, 121), "duplicate": (122,)}


def test_a_contrast_of_short_answers_is_no_near_duplicate() -> None:
    draw = random.Random(11)
    text = corpora.text(draw, 60)
    pair = [Labelled(f"{text} It was good.", "yes"), Labelled(f"{text} It was bad.", "no")]
    same = [Labelled(f"{text} It was good.", "yes"), Labelled(f"{text} It was bad.", "yes")]
    assert "near_duplicate" not in _kinds(check(_rows(pair), renderer=None, data=DATA, near_rows=ALL))
    assert _kinds(check(_rows(same), renderer=None, data=DATA, near_rows=ALL))["near_duplicate"] == (2,)


def test_a_preference_between_equal_answers_is_told() -> None:
    ask = ({"role": "user", "content": "Why?"},)
    yes, no = ({"role": "assistant", "content": "Yes."},), ({"role": "assistant", "content": "No."},)
    checkup = check(_rows([Preference(ask, yes, no), Preference(ask, yes, yes)]), renderer=None, data=DATA)
    assert _kinds(checkup)["same_answers"] == (2,)


def test_a_corpus_in_two_languages_is_no_finding_but_is_on_the_card() -> None:
    draw = random.Random(12)
    german = "Der Zug nach {} fährt heute {} Minuten später ab, weil die Strecke hinter dem Bahnhof gesperrt ist."
    contents = [Text(corpora.text(draw, 40)) for _ in range(70)]
    contents += [Text(german.format(corpora.text(draw, 3), draw.random())) for _ in range(30)]
    checkup = check(_rows(contents), renderer=None, data=DATA)
    assert checkup.findings == () and checkup.languages["en"] == 70 and checkup.languages["de"] == 30


def test_line_ends_that_all_rows_share_are_no_finding_and_the_fewer_ones_are() -> None:
    draw = random.Random(13)
    lines = [Text("\r\n".join(corpora.text(draw, 20).split())) for _ in range(60)]
    assert check(_rows(lines), renderer=None, data=DATA).findings == ()
    other = Text("\n".join(corpora.text(draw, 20).split()))
    assert _kinds(check(_rows([*lines, other]), renderer=None, data=DATA)) == {"mixed_line_ends": (61,)}


def test_the_order_of_the_rows_changes_no_count() -> None:
    rows = _conversations([*corpora.clean(200, seed=14), *corpora.clean(20, seed=14)])
    backwards = [Row(number, row.content) for number, row in enumerate(reversed(rows), 1)]
    one, other = (check(some, renderer=None, data=DATA, near_rows=ALL) for some in (rows, backwards))
    assert (
        [(f.kind, f.count) for f in one.findings] == [(f.kind, f.count) for f in other.findings] == [("duplicate", 20)]
    )


def test_a_stored_card_is_read_back_and_stays_small() -> None:
    rows = _conversations([*corpora.clean(300, seed=15), *corpora.clean(300, seed=15)])
    checkup = check(rows, renderer=None, data=DATA)
    stored = json.dumps(checkup.as_json())
    assert Checkup.from_json(json.loads(stored)) == checkup and len(stored) < 4000


def test_near_duplicates_are_looked_for_in_so_many_rows_and_the_card_says_so() -> None:
    rows = corpora.clean(100, seed=16)
    near = [
        {"messages": [{**turn, "content": turn["content"] + " so"} for turn in row["messages"]]} for row in rows[:2]
    ]
    both = _conversations([near[0], *rows, near[1]])
    checkup = check(both, renderer=None, data=DATA, near_rows=50)
    assert checkup.near_rows == 50 and _kinds(checkup) == {"near_duplicate": (2,)}
