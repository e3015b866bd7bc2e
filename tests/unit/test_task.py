"""The scoring of task answers, on answers such as small models really give.

Go to `service/evaluation/task.py` for the code. No model is needed here.
"""

from __future__ import annotations

import json
import random

import pytest

from service.evaluation.task import score_json

TICKET = '{"product": "lock", "order": null}'


def test_the_order_of_keys_and_white_space_do_not_matter_to_the_fields() -> None:
    scores = score_json([TICKET], ['\n{"order":null,"product":"lock"} '])
    assert (scores.valid_json, scores.exact_fields, scores.exact_match) == (1.0, 1.0, 0.0)


def test_exact_match_ignores_white_space_at_the_ends_only() -> None:
    assert score_json([TICKET, TICKET], [f"  {TICKET}\n", TICKET.replace(" ", "")]).exact_match == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        f"Here is the ticket: {TICKET}",
        f"```json\n{TICKET}\n```",
        f"{TICKET}{TICKET}",
        f"{TICKET} Have a nice day.",
        '{"product": "lock", "order": null',
        '{"product": "camera", "product": "lock", "order": null}',
        '{"product": "lock", "order": {"id": 1, "id": 2}}',
        '{"product": "lock", "order": NaN}',
        '{"product": "lock", "order": -Infinity}',
        "{'product': 'lock', 'order': None}",
        '{"product": "lock", "order": ' + "[" * 100_000,
        f"[{TICKET}]",
        "null",
        "",
    ],
)
def test_an_answer_that_is_not_one_strict_object_counts_nowhere(answer: str) -> None:
    scores = score_json([TICKET], [answer])
    assert (scores.valid_json, scores.exact_fields, scores.exact_match) == (0.0, 0.0, 0.0)
    assert scores.per_field == {"product": 0.0, "order": 0.0}


@pytest.mark.parametrize(
    ("want", "got", "equal"),
    [
        ("true", "1", False),
        ("0", "false", False),
        ('"1"', "1", False),
        ("null", '"null"', False),
        ("null", '""', False),
        ("1.0", "1", True),
        ("[true]", "[1]", False),
        ('{"a": [0]}', '{"a": [false]}', False),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("[1, 2]", "[1]", False),
        ('"\\u00e9"', '"é"', True),
    ],
)
def test_values_are_compared_as_json_compares_them(want: str, got: str, equal: bool) -> None:
    scores = score_json([f'{{"x": {want}}}'], [f'{{"x": {got}}}'])
    assert scores.exact_fields == float(equal)
    assert scores.per_field == {"x": float(equal)}
    assert scores.valid_json == 1.0


def test_an_extra_or_missing_field_spoils_the_prompt_but_not_the_other_fields() -> None:
    answers = ['{"product": "lock", "order": null, "note": "x"}', '{"product": "lock"}', TICKET]
    scores = score_json([TICKET] * 3, answers)
    assert scores.exact_fields == pytest.approx(1 / 3)
    assert scores.per_field == {"product": 1.0, "order": pytest.approx(2 / 3)}


def test_a_field_is_scored_over_the_prompts_that_have_it() -> None:
    scores = score_json(['{"a": 1}', '{"a": 1, "b": 2}'], ['{"a": 1}', '{"a": 0, "b": 2}'])
    assert scores.per_field == {"a": 0.5, "b": 1.0}
    assert scores.exact_fields == 0.5


@pytest.mark.parametrize("reference", ["The capital is Oslo.", "42", '["a"]', '{"a": NaN}'])
def test_references_that_are_no_objects_leave_only_the_exact_match(reference: str) -> None:
    scores = score_json([TICKET, reference], [TICKET, reference])
    assert scores.as_metrics() == {"eval/exact_match": 1.0}
    assert scores.exact_fields is None


def test_metric_names_are_those_that_rows_and_reports_read() -> None:
    assert score_json([TICKET], ['{"product": "lock", "order": "A-1"}']).as_metrics() == {
        "eval/exact_match": 0.0,
        "eval/valid_json": 1.0,
        "eval/exact_fields": 0.0,
        "eval/field/product": 1.0,
        "eval/field/order": 0.0,
    }


def test_nothing_to_score_or_a_missing_answer_is_refused_with_both_counts() -> None:
    with pytest.raises(ValueError, match="0 references and 0 answers"):
        score_json([], [])
    with pytest.raises(ValueError, match="2 references and 1 answers"):
        score_json([TICKET, TICKET], [TICKET])


def test_scores_are_shares_in_the_order_that_their_meanings_imply() -> None:
    rng = random.Random(0)
    values = [None, True, False, 0, 1, 1.0, "1", "x", [1], [True], {"k": 0}]
    for _ in range(200):
        tickets = [{name: rng.choice(values) for name in rng.sample("abc", 2)} for _ in range(5)]
        references = [json.dumps(ticket) for ticket in tickets]
        answers = [rng.choice([text, text[:-1], json.dumps({"a": rng.choice(values)})]) for text in references]
        scores = score_json(references, answers)
        assert scores.exact_fields is not None and scores.valid_json is not None and scores.per_field is not None
        assert 0 <= scores.exact_match <= scores.exact_fields <= scores.valid_json <= 1
        assert all(scores.exact_fields == 0 or 0 <= share <= 1 for share in scores.per_field.values())
        assert score_json(references, references).exact_fields == 1
        pairs = list(zip(references, answers, strict=True))
        rng.shuffle(pairs)
        assert score_json([r for r, _ in pairs], [a for _, a in pairs]) == scores
