"""`loray data show`: what is shown is what is trained on, and nothing in a row reaches the terminal as more than text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cli.app import main
from service.config import load_run
from service.data import shards
from service.data.prepare import prepare_run
from service.data.shown import STYLES, spans, tokens_shown, visible
from service.render import load_renderer
from tests.integration.tiny import CHATML, save_base
from tests.unit.chat_templates import FORGETS_THOUGHTS, TEMPLATES, sentencepiece, with_merges

TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def show(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """`loray data show` in an empty directory: its exit code, and what it printed."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        rendered_by = () if "--run" in arguments else ("--model", str(base))
        monkeypatch.setattr(sys, "argv", ["loray", "data", "show", *arguments, *rendered_by])
        try:
            main()
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            return exit.code, *capsys.readouterr()
        raise AssertionError("the command line always exits")

    return call


def _write(*rows: object, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return name


def test_trained_tokens_stand_out_and_special_ones_are_visible(show: Show) -> None:
    code, out, _ = show(_write({"messages": TALK[:2]}, {"messages": TALK}), "--row", "2")
    assert code == 0
    shown = out.splitlines()
    assert "⟦trained⟧ 21 of" in out and "special 8" in out
    assert "<|im_start|>assistant↵" in shown and "⟦<think>hm</think>1<|im_end|>⟧↵" in shown
    assert shown[-1] == "⟦2<|im_end|>⟧"


def test_the_mask_shown_is_the_mask_that_training_reads(show: Show, base: Path, tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"messages": [*TALK, TALK[0], {**TALK[3], "weight": 0}]}, {"messages": TALK[2:]}]
    template = tmp_path / "forgets.jinja"
    template.write_text(FORGETS_THOUGHTS)
    uri = _write(*rows)
    for train_on, number_of_examples in (("responses", 5), ("last", 2), ("all", 2)):
        used = rows if train_on == "responses" else [rows[0], rows[2]]
        _write(*used)
        run = {"model": {"id": str(base), "chat_template": str(template)}, "data": {"train": uri, "train_on": train_on}}
        Path("run.yaml").write_text(json.dumps(run))
        config = load_run("run.yaml").config
        card = prepare_run(config, load_renderer(base, FORGETS_THOUGHTS), home=str(tmp_path / "home")).train
        stored = shards.load(card.digest, home=str(tmp_path / "home"), cache=tmp_path / "cache")
        wanted = [
            (ids.tolist(), mask.astype(bool).tolist()) for ids, mask in map(stored.__getitem__, range(len(stored)))
        ]
        found = []
        for row in range(1, len(used) + 1):
            code, out, _ = show(uri, "--row", str(row), "--run", "run.yaml", "--json")
            assert code == 0
            found += [(example["ids"], example["mask"]) for example in json.loads(out)["examples"]]
        assert found == wanted and len(found) == number_of_examples


def test_a_run_files_columns_template_and_length_are_its_own(show: Show, base: Path) -> None:
    data = {
        "train": [{"uri": _write({"q": "why", "a": "so", "x": 1}), "columns": {"prompt": "q", "completion": "a"}}],
        "template": "Q: {q}!",
        "seq_len": 8,
        "over_long": "drop",
    }
    Path("run.yaml").write_text(json.dumps({"model": str(base), "data": data}))
    code, out, error = show("rows.jsonl", "--run", "run.yaml")
    assert (code, error) == (0, "")
    assert "Q: why!<|im_end|>" in out and "⟦so<|im_end|>⟧" in out
    assert "more than data.seq_len, 8: drop" in out


def test_nothing_in_a_row_is_obeyed_by_the_terminal(show: Show) -> None:
    hostile = "\x1b[2J\x1b]0;x\x07 [bold]b[/bold] \u202eevil\u2066 \x9b31m\r\x08:smile:"
    code, out, _ = show(_write({"prompt": hostile, "completion": "a\tb"}))
    assert code == 0
    assert all(char == "\n" or char.isprintable() for char in out)
    assert "[bold]b[/bold]" in out and ":smile:" in out  # of one token a character, the tokenizer knows no others


@given(st.text())
@settings(deadline=None, max_examples=200, database=None)
def test_what_is_written_out_is_printable_and_unambiguous(text: str) -> None:
    assert all(char == "\n" or char.isprintable() for char in visible(text))


@settings(deadline=None, max_examples=80, database=None)
@given(
    answer=st.text(alphabet="ab 🚀é\n'1", max_size=12),
    template=st.sampled_from(sorted(TEMPLATES.values())),
)
def test_the_green_text_is_the_trained_text(answer: str, template: str) -> None:
    renderer = with_merges(template)
    (example,) = renderer.examples([TALK[0], {"role": "assistant", "content": answer}])
    trained = [token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt]
    shown = tokens_shown(example, renderer.tokenizer, colours=True)
    green = "".join(
        shown.plain[span.start : span.end]
        for span in shown.spans
        if span.style in (STYLES[True, False], STYLES[True, True])
    )
    assert green == visible(renderer.tokenizer.decode(trained))
    assert "".join(span.text for span in spans(example, renderer.tokenizer)) == renderer.tokenizer.decode(example.ids)


def test_spaces_of_sentencepiece_tokens_are_shown() -> None:
    renderer = sentencepiece(CHATML, legacy=False)
    (example,) = renderer.examples([TALK[0], {"role": "assistant", "content": "of the work"}])
    assert "⟦of the work<|im_end|>⟧" in tokens_shown(example, renderer.tokenizer, colours=False).plain


def test_only_the_row_that_is_asked_for_must_be_sound(show: Show) -> None:
    uri = _write({"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "c", "completion": "d"})
    with Path(uri).open("a") as file:
        file.write("\n{broken\n")
    assert show(uri, "--row", "3")[0] == 0
    for row, said in (("2", "row 2: field 'completion' is missing"), ("4", "that line is empty"), ("5", "row 5")):
        code, out, error = show(uri, "--row", row)
        assert (code, out) == (2, "") and said in error
    code, _, error = show(uri, "--row", "9")
    assert code == 2 and "has no row 9: its last one is 5" in error


def test_a_model_and_a_run_are_one_too_many(show: Show, base: Path) -> None:
    code, _, error = show(_write({"prompt": "a", "completion": "b"}), "--run", "run.yaml", "--model", "x")
    assert code == 2 and "Give one of the two" in error
