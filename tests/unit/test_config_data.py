"""What a run file may say of its data and of folds and seeds: what each choice rules out is told under its own key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.run_files import load, problems

MODEL = "model: base\n"
MIXED = "train: [{uri: a.jsonl, weight: 3.0}, b.jsonl]"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "data: {train: a, eval: b, split: {eval: 0.1}}",
            "data.split.eval: 0.1, and data.eval names a file of such rows.",
        ),
        (
            "data: {train: a, test: b, split: {test: 0.1}}",
            "data.split.test: 0.1, and data.test names a file of such rows.",
        ),
        ("data: {train: a, split: {group: g}}", "data.split.group: nothing is divided. Set data.split.eval"),
        ("data: {train: a, split: {eval: 0.5, test: 0.5}}", "eval 0.5 and test 0.5 leave no row to train on"),
        ("data: {train: a, split: {eval: 0.1, group: g, stratify: s}}", "group and stratify cannot both be kept"),
        (f"data: {{{MIXED}}}", "data.train: a source has a weight, and data.mix.by is proportional."),
        (
            f"data: {{{MIXED}, mix: {{by: weights, cap: 9}}}}",
            "data.mix.cap: 9 counts rows, and data.mix.by is weights.",
        ),
        ("data: {train: a, mix: {temperature: 2.0}}", "data.mix.temperature: 2.0, and data.mix.by is proportional."),
        ("data: {train: a, filter: {min_chars: 9, max_chars: 3}}", "min_chars 9 is more than max_chars 3"),
        ("data: {train: a, filter: {languages: [English]}}", "data.filter.languages.0: "),
        ("data: {train: a, augment: {copies: 2}}", "copies 2 and the shares go together"),
        ("data: {train: a, augment: {swap: 0.1}}", "copies 0 and the shares go together"),
        ("data: {train: a, augment: {copies: 1, synonym: 0.1}}", "synonym 0.1 needs a table"),
        ("data: {train: a, augment: {copies: 1, swap: 0.1, synonyms: t}}", "synonyms is a table that only"),
        (
            "data: {train: a, eval: b}\nrun: {folds: 5}",
            "data.eval: 'b', and with run.folds each fold is evaluated on in turn.",
        ),
        ("data: {train: a, split: {eval: 0.1}}\nrun: {folds: 5}", "data.split.eval: 0.1, and with run.folds each fold"),
        ("data: {train: a}\nrun: {folds: 5, seeds: 2}", "folds 5 and seeds 2 cannot both be more than 1"),
        ("data: {train: a}\nrun: {folds: 5, fold: 6}", "fold 6 is none of the folds, 1 to 5"),
        (
            "data: {train: a}\nrun: {folds: 5}\npublish: p",
            "publish: with run.folds: 5 every training has seen only a part",
        ),
        (
            "data: {train: a}\nrun: {seeds: 3}\npublish: p",
            "publish: with run.seeds: 3 the one of lowest eval/loss is published",
        ),
        ("data: {train: a}\nevaluate: {at_start: true}", "evaluate.at_start: there are no rows to evaluate on."),
    ],
)
def test_what_cannot_go_together_is_one_problem_with_its_remedy(tmp_path: Path, lines: str, said: str) -> None:
    message = problems(tmp_path, f"{MODEL}{lines}\n")
    assert "1 problem." in message and f"{said}" in message


@pytest.mark.parametrize(
    "lines",
    [
        "data: {train: a, split: {eval: 0.1, test: 0.1}}\nevaluate: {at_start: true, every: {steps: 5}}\nstop: {patience: 2}",
        "data: {train: a, eval: b, test: c}\nrun: {seeds: 3}\npublish: p",
        "data: {train: a, split: {stratify: kind}}\nrun: {folds: 5}\nevaluate: {every: {steps: 2}}",
        "data: {train: a, split: {test: 0.1}}\nrun: {folds: 5, fold: 5}\npublish: p",
        f"data: {{{MIXED}, mix: {{by: weights}}}}",
        "data: {train: [a, b], mix: {by: temperature, temperature: 2.0, cap: 100}}",
        "data: {train: a, augment: {copies: 1, synonyms: t, synonym: 0.1, insert: 0.1}}",
        "data: {train: a, filter: {languages: [en, de], min_chars: 3, max_chars: 3, max_repetition: 0.2}}",
    ],
)
def test_what_goes_together_is_taken(tmp_path: Path, lines: str) -> None:
    load(tmp_path, f"{MODEL}{lines}\n")


def test_what_a_source_leaves_open_is_as_data_has_it(tmp_path: Path) -> None:
    text = f"{MODEL}data: {{train: [a, {{uri: b, format: qa, weight: 2.0}}], format: text, columns: {{text: body}}, mix: {{by: weights}}}}\n"
    first, second = load(tmp_path, text).config.data.sources
    assert (first.uri, first.format, first.weight, first.columns) == ("a", "text", 1.0, {"text": "body"})
    assert (second.uri, second.format, second.weight, second.columns) == ("b", "qa", 2.0, {"text": "body"})
