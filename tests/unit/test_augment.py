"""Augmentation: copies that follow from what a row holds, change only what users say, and change as much as was asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from service.config import AugmentBlock, ReadingBlock
from service.data.augment import COPY, copies, read_synonyms
from service.data.formats import parse
from service.data.records import Record
from service.data.rows import Answer, Conversation, Extraction, Labelled, Preference, Row, Tagged, Text
from service.errors import DataError

MANY = [f"w{i}" for i in range(2000)]
TABLE = {word: (f"{word}x", f"{word}y") for word in MANY[::2]}
ALL = AugmentBlock(copies=3, synonyms="table.tsv", synonym=0.3, swap=0.2, delete=0.2, insert=0.2)


def _row(words: str, number: int = 1) -> Row:
    turns = (
        {"role": "system", "content": words},
        {"role": "user", "content": words},
        {"role": "assistant", "content": words},
        {"role": "user", "content": f"{words} again"},
        {"role": "assistant", "content": words, "train": False},
    )
    return Row(number, Conversation(turns), {"source": "mail"})


def _changed(words: list[str], num_copies: int = 16, **options: float) -> list[list[str]]:
    """The words of the copies of a user's turn."""
    table = {"synonyms": "table.tsv"} if "synonym" in options or "insert" in options else {}
    block = AugmentBlock.model_validate({"copies": num_copies, **table, **options})
    made = copies(Row(1, Labelled(" ".join(words), "yes")), block, 0, TABLE)
    assert all(isinstance(copy.content, Labelled) for copy in made)
    return [copy.content.text.split() for copy in made if isinstance(copy.content, Labelled)]


def _near(found: int, trials: int, probability: float) -> bool:
    """Within 6 standard deviations: otherwise a false alarm once in 5 x 10^8 seeds, of which these tests use one."""
    return abs(found - trials * probability) < 6 * math.sqrt(trials * probability * (1 - probability))


def test_the_same_row_has_the_same_copies_wherever_it_stands() -> None:
    row = _row("please tell me where my parcel is")
    made = copies(row, ALL, 5, TABLE)
    moved = copies(replace(row, number=77, file="b.jsonl"), ALL, 5, TABLE)
    assert [copy.content for copy in made] == [copy.content for copy in moved]
    assert len({str(copy.content) for copy in made}) == 3
    assert [copy.content for copy in copies(row, ALL, 6, TABLE)] != [copy.content for copy in made]


def test_copies_are_the_same_on_every_machine_and_version() -> None:
    block = AugmentBlock(copies=1, swap=0.3, delete=0.2, insert=0.4)
    (copy,) = copies(Row(1, Labelled("one two three four five", "n")), block, 3, {})
    assert copy.content == Labelled("one one three two five four three", "n")


def test_copies_are_marked_and_keep_the_rows_number() -> None:
    made = copies(_row("where is my parcel", number=9), ALL, 0, TABLE)
    assert [(copy.number, copy.fields) for copy in made] == [(9, {"source": "mail", COPY: i}) for i in (1, 2, 3)]


def test_only_what_users_say_is_changed() -> None:
    row = _row(" ".join(MANY[:50]))
    for copy in copies(row, ALL, 0, TABLE):
        for before, after in zip(row.messages, copy.messages, strict=True):
            assert (before == after) == (before["role"] != "user")
    words = " ".join(MANY[:50])
    turns = ({"role": "user", "content": words},)
    answers = ({"role": "assistant", "content": words},)
    (copy, *_) = copies(Row(1, Preference(turns, answers, answers)), ALL, 0, TABLE)
    assert isinstance(copy.content, Preference)
    assert copy.content.prompt != turns and copy.content.chosen == copy.content.rejected == answers
    extraction = Extraction(words, words, (Answer("w3", 6),))
    (copy, *_) = copies(Row(1, extraction), ALL, 0, TABLE)
    assert isinstance(copy.content, Extraction)
    assert copy.content == replace(extraction, question=copy.content.question) != extraction


@pytest.mark.parametrize("given", ["", "w1 w2\nw3 w4 w5 w6 w7 w8"])
@pytest.mark.parametrize("template", ["alpaca", "Do {{this}}: {instruction}\nWith {{that}}: {input}.", "{instruction}"])
def test_the_text_of_a_template_is_never_changed(template: str, given: str) -> None:
    asked = " ".join(MANY[:40])
    record = Record(1, {"instruction": asked, "input": given, "output": "Done."})
    row = parse(record, "alpaca", ReadingBlock(template=template))
    assert isinstance(row, Row)
    before = str(row.messages[0]["content"])
    for copy in copies(row, ALL, 0, TABLE):
        said = str(copy.messages[0]["content"])
        start, end = before.index(asked), before.index(asked) + len(asked)
        assert said[:start] == before[:start] and said != before
        after = before[end:].replace(given, "\0", 1).split("\0") if given else [before[end:]]
        assert all(part in said for part in after) and said.endswith(after[-1])


@pytest.mark.parametrize("content", [Text("all of it is learnt"), Tagged(("Anna", "sings"), ("PER", "O"))])
def test_rows_in_which_no_user_speaks_are_refused_by_number(content: Text | Tagged) -> None:
    with pytest.raises(DataError, match=r"a\.txt row 4: data\.augment changes what a user says"):
        copies(Row(4, content, file="a.txt"), ALL, 0, TABLE)


def test_words_that_have_synonyms_are_replaced_with_their_share() -> None:
    made = _changed(MANY, synonym=0.3)
    changed = [(i, word) for words in made for i, word in enumerate(words) if word != MANY[i]]
    assert all(word in TABLE[MANY[i]] for i, word in changed)
    assert _near(len(changed), 16 * len(TABLE), 0.3)
    assert _near(sum(word.endswith("x") for _, word in changed), len(changed), 0.5)


def test_words_are_left_out_with_their_share_and_never_all() -> None:
    made = _changed(MANY, delete=0.2)
    assert _near(sum(map(len, made)), 16 * len(MANY), 0.8)
    assert all(words == sorted(words, key=MANY.index) for words in made)
    assert all(len(words) == 1 for words in _changed(["alone"], delete=0.99))


def test_words_are_inserted_with_their_share() -> None:
    made = _changed(MANY, insert=0.1)
    inserted = [word for words in made for word in words if word.endswith(("x", "y"))]
    assert _near(sum(map(len, made)) - 16 * len(MANY), 16 * len(MANY), 0.1)
    assert _near(len(inserted), 16 * len(TABLE), 0.1)  # the other half has no synonyms, and is repeated


def test_words_change_places_with_their_share() -> None:
    """A word stays where neither it (1 - p) nor any other (1 - p / n)^n has chosen it."""
    made = _changed(MANY, swap=0.1)
    assert all(sorted(words) == sorted(MANY) for words in made)
    moved = sum(a != b for words in made for a, b in zip(words, MANY, strict=True))
    assert _near(moved, 16 * len(MANY), 1 - 0.9 * math.exp(-0.1))


def test_a_synonym_keeps_the_capital_and_the_punctuation() -> None:
    block = AugmentBlock(copies=1, synonyms="table.tsv", synonym=0.999999)
    (copy,) = copies(Row(1, Labelled("  (Good),\n\tgood: ... ", "n")), block, 0, {"good": ("fine",)})
    assert copy.content == Labelled("  (Fine),\n\tfine: ... ", "n")


def test_a_table_of_synonyms_is_read_and_its_wrong_lines_named(tmp_path: Path) -> None:
    file = tmp_path / "table.tsv"
    file.write_text("Good\tfine, very well\n\nbad\tpoor\ngood\tdecent\n")
    assert read_synonyms(str(file)) == {"good": ("fine", "very well", "decent"), "bad": ("poor",)}
    file.write_text("good\tfine\nbad poor\nugly\t ,\n")
    with pytest.raises(DataError, match=r"line\(s\) 2, 3 are not word<TAB>other,another"):
        read_synonyms(str(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="there is no line word<TAB>"):
        read_synonyms(str(file))
    with pytest.raises(DataError, match=r"none\.tsv: the table of synonyms does not exist"):
        read_synonyms(str(tmp_path / "none.tsv"))
