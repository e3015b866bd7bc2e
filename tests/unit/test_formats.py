"""Data files: what is read, and that every bad row is named with its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.data.formats import MAX_PROBLEMS_SHOWN, read_rows
from service.data.rows import Row
from service.errors import DataError

RowsOf = Callable[[bytes], list[Row]]
Refused = Callable[..., str]
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
GOOD = json.dumps({"messages": [USER, ANSWER]})
PAIR = json.dumps({"prompt": "u", "completion": "a"})


@pytest.fixture
def rows_of(tmp_path: Path) -> RowsOf:
    """The rows of a JSONL file with these bytes."""

    def read(data: bytes) -> list[Row]:
        (tmp_path / "rows.jsonl").write_bytes(data)
        return read_rows(str(tmp_path / "rows.jsonl"))

    return read


@pytest.fixture
def refused(rows_of: RowsOf) -> Refused:
    """What is said of a JSONL file with these lines."""

    def read(*lines: str) -> str:
        with pytest.raises(DataError) as caught:
            rows_of("\n".join(lines).encode("utf-8", "surrogatepass"))
        return str(caught.value)

    return read


def _messages(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


def test_messages_and_prompt_with_completion_are_the_same_conversation(rows_of: RowsOf) -> None:
    pair = json.dumps({"prompt": "u", "completion": "a"})
    assert rows_of(GOOD.encode())[0].messages == rows_of(pair.encode())[0].messages == (USER, ANSWER)


def test_prompt_and_reference_split_before_the_last_answer(rows_of: RowsOf) -> None:
    row = rows_of(
        _messages({"role": "system", "content": "s"}, USER, ANSWER, USER, {**ANSWER, "content": "b"}).encode()
    )
    assert row[0].reference() == "b"
    assert [m["content"] for m in row[0].prompt()] == ["s", "u", "a", "u"]


def test_bom_crlf_and_blank_lines_are_no_rows_and_keep_line_numbers(rows_of: RowsOf) -> None:
    data = b"\xef\xbb\xbf\r\n" + GOOD.encode() + b"\r\n\r\n  \t\r\n" + GOOD.encode()
    assert [row.number for row in rows_of(data)] == [2, 5]


def test_line_separators_inside_a_text_do_not_split_a_row(rows_of: RowsOf) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    data = json.dumps({"prompt": text, "completion": "a"}, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    assert rows_of(data)[0].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no valid JSON"),
        ("{} {}", "no valid JSON"),
        ('{"prompt": NaN, "completion": "a"}', "NaN is no JSON number"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', 'the key "prompt" stands twice'),
        ("[" * 100_000, "more than 64 deep"),
        ('{"prompt": ' + "9" * 5000 + "}", "no valid JSON"),
        ("[1]", "a JSON list"),
        ('"text"', "a JSON str"),
        ("null", "a JSON NoneType"),
        ('{"text": "a"}', "field 'messages' is missing"),
        ('{"prompt": "a"}', "field 'completion' is missing"),
        ('{"completion": "a"}', "field 'prompt' is missing"),
        ('{"prompt": 3, "completion": "a"}', "prompt is 3, wanted text"),
        ('{"prompt": "a", "completion": "  "}', "completion is empty"),
        ('{"prompt": "\\ud800", "completion": "a"}', "prompt has a lone surrogate"),
        ('{"messages": []}', "messages is []"),
        ('{"messages": "a"}', 'messages is "a"'),
        (_messages("a"), 'messages[0] is "a"'),
        (_messages(USER), "the last message has the role 'user', wanted assistant"),
        (_messages(USER, ANSWER, USER), "the last message has the role 'user', wanted assistant"),
        (_messages({"role": "bot", "content": "a"}, ANSWER), 'messages[0].role is "bot"'),
        (_messages({"content": "a"}, ANSWER), "messages[0].role is null"),
        (_messages({"role": ["user"], "content": "a"}, ANSWER), 'messages[0].role is ["user"]'),
        (_messages({"role": "user"}, ANSWER), "messages[0].content is missing"),
        (_messages({"role": "user", "content": None}, ANSWER), "messages[0].content is missing"),
        (_messages(USER, {"role": "assistant", "content": ""}), "messages[1].content is empty"),
        (_messages({**USER, "mood": "sad"}, ANSWER), "messages[0] has the field(s) ['mood']"),
        (_messages(ANSWER), "row 2: "),
    ],
)
def test_a_bad_row_is_named_with_its_field(refused: Refused, line: str, said: str) -> None:
    message = refused(PAIR if '"prompt"' in line or '"completion"' in line else GOOD, line)
    assert said in message
    assert "rows.jsonl: 1 problem(s)" in message and "  row 2: " in message


def test_all_bad_rows_are_named_at_once(refused: Refused) -> None:
    message = refused("[]", GOOD, _messages({"role": "bot", "content": 3}, ANSWER), "{")
    assert "4 problem(s)" in message
    for start in ("row 1: ", "row 3: messages[0].role", "row 3: messages[0].content", "row 4: "):
        assert f"  {start}" in message


def test_of_very_many_bad_rows_the_first_are_shown_and_the_rest_counted(refused: Refused) -> None:
    message = refused(*["{"] * 1000)
    assert "1000 problem(s)" in message and f"... and {1000 - MAX_PROBLEMS_SHOWN} more" in message
    assert len(message.splitlines()) == MAX_PROBLEMS_SHOWN + 2


def test_a_file_that_is_missing_empty_or_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b" \n\n")
    (tmp_path / "latin1").write_bytes('{"prompt": "é", "completion": "a"}'.encode("latin-1"))
    for name, said in (
        ("absent", "does not exist"),
        ("empty", "is empty"),
        ("latin1", "byte 12 of the row is no UTF-8"),
    ):
        with pytest.raises(DataError, match=rf"(?s){name}: .*{said}"):
            read_rows(str(tmp_path / name))
