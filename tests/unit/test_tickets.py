"""The demo data is what its script says, its two splits share no wording, and counting words does not solve it.

Go to `jobs/recipes/make_tickets.py` for the tables.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.recipes import make_tickets
from jobs.recipes.make_tickets import DATA, FIELDS, NUM_ROWS, PROBLEMS, PRODUCTS, SEVERITIES, make_rows, wordings

FILES = ("tickets.train.jsonl", "tickets.eval.jsonl", "tickets.base-prompt.jsonl")
TABLES = {"product": PRODUCTS, "category": PROBLEMS, "severity": SEVERITIES}
PAIRS = {
    name: getattr(make_tickets, name) for name in ("OTHER_PRODUCT", "ORDERS", "OTHER_NUMBERS", "NAMES", "SIGNATURES")
}
ORDER = re.compile(r"\b[A-Z]-\d{5}\b")


def committed(split: str) -> list[list[dict[str, str]]]:
    lines = (DATA / f"tickets.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def tickets(split: str) -> list[dict[str, Any]]:
    return [json.loads(turns[2]["content"]) for turns in committed(split)]


def test_the_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    assert [path.name for path in make_tickets.write(tmp_path)] == list(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run make_tickets again"


def test_another_seed_gives_other_rows() -> None:
    assert make_rows("eval", seed=1) != make_rows("eval", seed=0)


@pytest.mark.parametrize("split", NUM_ROWS)
def test_every_row_is_a_system_user_assistant_conversation_with_a_complete_ticket(split: str) -> None:
    rows = committed(split)
    assert len(rows) == NUM_ROWS[split]
    assert all([turn["role"] for turn in turns] == ["system", "user", "assistant"] for turns in rows)
    assert {turns[0]["content"] for turns in rows} == {make_tickets.SYSTEM_PROMPT}
    assert all(tuple(ticket) == FIELDS for ticket in tickets(split))


@pytest.mark.parametrize("split", NUM_ROWS)
def test_every_label_appears_and_none_is_rare(split: str) -> None:
    for field, table in TABLES.items():
        values = [ticket[field] for ticket in tickets(split)]
        assert set(values) == set(table)
        assert min(map(values.count, table)) >= 0.5 * len(values) / len(table), f"{split} {field}"
    without = [ticket["order"] for ticket in tickets(split)].count(None)
    assert 0.2 <= without / NUM_ROWS[split] <= 0.5


@pytest.mark.parametrize("split", NUM_ROWS)
def test_an_order_number_is_copied_from_the_message(split: str) -> None:
    for turns, ticket in zip(committed(split), tickets(split), strict=True):
        assert ticket["order"] is None or ticket["order"] in turns[1]["content"]


def test_some_messages_carry_a_number_that_only_looks_like_an_order() -> None:
    decoys = [turns[1] for turns, ticket in zip(committed("eval"), tickets("eval"), strict=True) if not ticket["order"]]
    assert sum(bool(ORDER.search(turn["content"])) for turn in decoys) >= 4


def test_the_splits_share_no_wording_name_or_number() -> None:
    cells = [cell for table in (*TABLES.values(), make_tickets.FINE) for cell in table.values()] + list(PAIRS.values())
    trained = {phrase.lower() for cell in cells for phrase in wordings(cell[0])}
    held_out = {phrase.lower() for cell in cells for phrase in wordings(cell[1])}
    assert not trained & held_out
    assert not set(make_tickets.PREFIXES[0]) & set(make_tickets.PREFIXES[1])
    numbers = {split: set(ORDER.findall(json.dumps(committed(split)))) for split in NUM_ROWS}
    digits = {split: {number[2:] for number in found} for split, found in numbers.items()}
    assert numbers["train"] and numbers["eval"] and not digits["train"] & digits["eval"]


def test_no_wording_for_evaluation_can_be_read_in_a_training_message() -> None:
    text = "\n".join(turns[1]["content"] for turns in committed("train")).lower()
    cells = itertools.chain(PRODUCTS.values(), SEVERITIES.values(), make_tickets.FINE.values(), [PAIRS["NAMES"]])
    for phrase in itertools.chain.from_iterable(wordings(cell[1]) for cell in cells):
        assert not re.search(rf"\b{re.escape(phrase.lower())}\b", text), phrase


def test_no_wording_stands_for_two_values() -> None:
    for field, table in TABLES.items():
        phrases = [phrase.lower() for cell in table.values() for side in cell for phrase in wordings(side)]
        assert len(phrases) == len(set(phrases)), f"{field} has a wording twice"


@pytest.mark.parametrize("split", NUM_ROWS)
def test_no_message_is_long(split: str) -> None:
    lengths = [len(turns[1]["content"].split()) for turns in committed(split)]
    assert max(lengths) <= 55
    assert sum(lengths) / len(lengths) <= 32


def test_messages_are_unique() -> None:
    texts = [turns[1]["content"] for split in NUM_ROWS for turns in committed(split)]
    assert len(texts) == len(set(texts))


def test_the_base_prompt_names_every_field_and_every_value() -> None:
    prompt = make_tickets.base_prompt()[0]["content"]
    for name in (*FIELDS, *itertools.chain.from_iterable(TABLES.values())):
        assert f'"{name}"' in prompt


def test_counting_words_gets_most_prompts_wrong() -> None:
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn: pip install scikit-learn")
    scores = make_tickets.baseline()
    assert scores["all fields"] <= 0.6
    assert min(scores.values()) == scores["all fields"] > 0.1, "a baseline that learns nothing proves nothing"
