"""`loray data check` from outside: the card in its three shapes, the exit codes, good rows and bad ones apart."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from service.config import DataBlock
from service.data import card
from service.data.checkup import check
from service.data.rows import Conversation, Labelled, Problem, Row
from service.render import load_renderer
from tests.integration.tiny import save_tokenizer
from tests.unit import corpora
from tests.unit.console import Loray, home, loray

__all__ = ["home", "loray"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
TICKETS = ROOT / "jobs/recipes/data/tickets.train.jsonl"


def _file(directory: Path, lines: list[bytes], name: str = "rows.jsonl") -> Path:
    file = directory / name
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def _clean(number: int, seed: int = 1) -> list[bytes]:
    return [json.dumps(row).encode() for row in corpora.clean(number, seed)]


def test_clean_data_exits_with_0_even_when_strict(loray: Loray) -> None:
    code, out, _ = loray("data", "check", str(TICKETS), "--against", str(TICKETS).replace("train", "eval"), "--strict")
    assert code == 0 and "Nothing is wrong" in out


def test_a_warning_exits_with_1_only_when_strict_and_an_error_always(loray: Loray, tmp_path: Path) -> None:
    lines = _clean(60)
    warned = _file(tmp_path, [*lines, lines[0]], "warned.jsonl")
    wrong = _file(tmp_path, [*lines, b"{"], "wrong.jsonl")
    assert loray("data", "check", str(warned))[0] == 0 and loray("data", "check", str(warned), "--strict")[0] == 1
    assert loray("data", "check", str(wrong))[0] == 1


def test_wrong_usage_and_a_file_that_is_none_exit_with_2(loray: Loray, tmp_path: Path) -> None:
    assert loray("data", "check")[0] == 2
    assert loray("data", "check", str(TICKETS), "--colour")[0] == 2
    code, out, err = loray("data", "check", str(tmp_path / "absent.jsonl"))
    assert code == 2 and "absent.jsonl" in err and out == ""


def test_the_json_card_is_the_whole_output(loray: Loray, tmp_path: Path) -> None:
    lines = _clean(60)
    code, out, _ = loray("data", "check", str(_file(tmp_path, [*lines, lines[3]])), "--json")
    (finding,) = json.loads(out)["findings"]
    assert code == 0 and finding["kind"] == "duplicate" and finding["rows"] == [61] and finding["fix"]


def test_good_and_bad_rows_lie_apart_and_none_is_lost(loray: Loray, tmp_path: Path) -> None:
    lines = _clean(60)
    unreadable = b'{"messages": caf\xe9'
    wrong = b'{"messages": [{"role": "bot"}], "id": 7}'  # an unknown role, and no content
    given = [*lines[:10], unreadable, *lines[10:20], b"", wrong, *lines[20:], lines[5]]
    out = tmp_path / "apart"
    code, printed, _ = loray("data", "check", str(_file(tmp_path, given)), "--quarantine", str(out))
    assert code == 1 and "60 good rows" in printed and "3 bad ones" in printed
    assert (out / "good.jsonl").read_text().splitlines() == [line.decode() for line in lines]
    bad = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    assert [row["row"] for row in bad] == [11, 23, 64]
    assert bad[0]["line"] == '{"messages": caf\\xe9' and "no UTF-8" in bad[0]["reasons"][0]
    assert bad[1]["record"] == json.loads(wrong) and len(bad[1]["reasons"]) == 2
    assert bad[2]["record"] == json.loads(lines[5]) and bad[2]["reasons"][0].startswith("duplicate: ")
    assert loray("data", "check", str(out / "good.jsonl"), "--strict")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["bad.jsonl", "good.jsonl"]
    code, _, said = loray("data", "check", str(_file(tmp_path, lines)), "--quarantine", str(out))
    assert code == 2 and "bad.jsonl is there already" in said
    assert len((out / "bad.jsonl").read_text().splitlines()) == 3, "what was set aside before is not written over"


def test_the_markdown_card_has_the_findings_and_no_markup_of_the_data(loray: Loray, tmp_path: Path) -> None:
    bad = b'{"messages": [{"role": "<b>|`x", "content": "y"}]}'
    card_file = tmp_path / "cards" / "card.md"
    loray("data", "check", str(_file(tmp_path, [*_clean(60), bad])), "--markdown", str(card_file))
    text = card_file.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| error")]
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows) and "\\<b\\>" in text and "| 61 |" in text


def test_no_control_character_and_no_markup_of_the_data_reaches_the_terminal() -> None:
    problems = [Problem(1, "field '\x1b[31m\x07[bold red]' is missing.\r\n")]
    rows = [Row(n, Labelled("text " * n, "\x1b]0;title\x07[/]" if n % 2 else "\u202eevil")) for n in range(2, 60)]
    console = Console(width=100, record=True, file=io.StringIO())
    checkup = check([*problems, *rows], renderer=None, data=DataBlock(train="x"), name="\x1b[2J.jsonl")
    console.print(card.table(checkup))
    shown = console.export_text() + card.markdown(checkup)
    assert all(char.isprintable() or char == "\n" for char in shown) and "[bold red]" in shown


def test_the_bins_of_the_histogram_hold_every_example(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    rows = [Row(i, Conversation(tuple(row["messages"]))) for i, row in enumerate(corpora.clean(60, 2), 1)]
    renderer = load_renderer(tmp_path)
    for some in (rows, rows[:1]):
        checkup = check(some, renderer=renderer, data=DataBlock(train="x", seq_len=4000))
        assert checkup.tokens is not None and sum(checkup.tokens.counts) == checkup.tokens.examples == len(some)
        assert "tokens" in card.markdown(checkup)
