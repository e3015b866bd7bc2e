"""Filters: which rows are left out, and in which words it is said."""

from __future__ import annotations

import pytest

from service.config import FilterBlock
from service.data.filters import reason, repetition
from service.data.rows import Content, Conversation, Labelled, Row, Text

SENTENCE = "One two three four five six seven eight nine ten eleven twelve."


def _reason(content: Content | str, **options: object) -> str | None:
    row = Row(1, Text(content) if isinstance(content, str) else content)
    return reason(row, FilterBlock.model_validate(options))


def test_nothing_is_left_out_by_default() -> None:
    assert _reason("") is None and _reason("ha " * 1000) is None


def test_characters_are_those_of_all_of_a_row() -> None:
    turns = Conversation(({"role": "user", "content": "12345"}, {"role": "assistant", "content": "67890"}))
    assert _reason(turns, min_chars=10, max_chars=10) is None
    assert _reason(turns, min_chars=11) == "fewer than 11 characters (data.filter.min_chars)"
    assert (
        _reason(Labelled("12345", "yes", "678901"), max_chars=10) == "more than 10 characters (data.filter.max_chars)"
    )


def test_rows_broken_alike_share_a_reason() -> None:
    assert _reason("a" * 20, max_chars=10) == _reason("b" * 3000, max_chars=10)


def test_repetition_is_the_share_of_words_in_repeated_10_grams() -> None:
    assert repetition([SENTENCE]) == 0
    assert repetition([f"{SENTENCE} {SENTENCE}"]) == 1
    assert repetition(["x" * 9 + " " + " ".join(["abcde fgh"] * 6)]) == pytest.approx(48 / 57)
    assert repetition([SENTENCE, SENTENCE]) == 0  # an answer may quote its prompt
    assert repetition(["", "  "]) == 0
    assert repetition(["again " * 9]) == 0  # no 10-gram stands in it
    noisy = f"{SENTENCE} {SENTENCE} And so on, and on, until nobody listens any more to what is said."
    assert _reason(noisy, max_repetition=0.5) == ("over 50% in repeated 10-grams of words (data.filter.max_repetition)")
    assert _reason(noisy, max_repetition=0.9) is None


def test_other_languages_are_left_out_and_what_is_too_short_to_tell_stays() -> None:
    german = "Guten Tag, meine Bestellung ist noch nicht angekommen."
    assert _reason(german, languages=["en"]) == "in the language de (data.filter.languages)"
    assert _reason(german, languages=["en", "de"]) is None
    assert _reason("My order has not arrived yet, can you help?", languages=["en"]) is None
    assert _reason("OK", languages=["de"]) is None


def test_the_language_of_a_conversation_is_not_that_of_its_system_prompt() -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant who answers every question of our customers. " * 20},
        {"role": "user", "content": "Wo bleibt meine Bestellung, die ich vor zwei Wochen aufgegeben habe?"},
        {"role": "assistant", "content": "Sie wurde gestern verschickt und kommt voraussichtlich am Freitag an."},
    ]
    assert _reason(Conversation(tuple(turns)), languages=["de"]) is None
    assert _reason(Conversation(tuple(turns)), languages=["en"]) == "in the language de (data.filter.languages)"
