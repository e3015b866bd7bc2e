"""Data files: what is read, and that every bad row is named with its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.data.formats import MAX_PROBLEMS_SHOWN, parse_rows, read_rows
from service.errors import DataError

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def _refused(*lines: str) -> str:
    with pytest.raises(DataError) as caught:
        parse_rows("\n".join(lines).encode("utf-8", "surrogatepass"), "rows.jsonl")
    return str(caught.value)


def _messages(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


def test_messages_and_prompt_with_completion_are_the_same_conversation() -> None:
    pair = json.dumps({"prompt": "u", "completion": "a"})
    first, second = parse_rows(f"{GOOD}\n{pair}\n".encode(), "x")
    assert first.messages == second.messages == (USER, ANSWER)
    assert (first.number, second.number) == (1, 2)


def test_prompt_and_reference_split_before_the_last_answer() -> None:
    row = parse_rows(
        _messages({"role": "system", "content": "s"}, USER, ANSWER, USER, {**ANSWER, "content": "b"}).encode(), "x"
    )
    assert row[0].reference() == "b"
    assert [m["content"] for m in row[0].prompt()] == ["s", "u", "a", "u"]


def test_bom_crlf_and_blank_lines_are_no_rows_and_keep_line_numbers() -> None:
    data = b"\xef\xbb\xbf\r\n" + GOOD.encode() + b"\r\n\r\n  \t\r\n" + GOOD.encode()
    assert [row.number for row in parse_rows(data, "x")] == [2, 5]


def test_line_separators_inside_a_text_do_not_split_a_row() -> None:
    text = "one\u2028two\u0085three\x0bfour"
    data = json.dumps({"prompt": text, "completion": "a"}, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    assert parse_rows(data, "x")[0].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no valid JSON"),
        ("{} {}", "no valid JSON"),
        ('{"prompt": NaN, "completion": "a"}', "NaN is no JSON number"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "a key stands twice"),
        ("[" * 100_000, "no valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "no valid JSON"),
        ("[1]", "a JSON list"),
        ('"text"', "a JSON str"),
        ("null", "a JSON NoneType"),
        ('{"text": "a"}', "no field 'messages'"),
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
        (_messages({"role": "user", "content": None}, ANSWER), "messages[0].content is null"),
        (_messages(USER, {"role": "assistant", "content": ""}), "messages[1].content is empty"),
        (_messages({**USER, "tool_calls": []}, ANSWER), "messages[0] has the field(s) ['tool_calls']"),
        (_messages(ANSWER), "row 2: "),
    ],
)
def test_a_bad_row_is_named_with_its_field(line: str, said: str) -> None:
    message = _refused(GOOD, line)
    assert said in message
    assert "rows.jsonl: 1 problem(s)" in message and "  row 2: " in message


def test_all_bad_rows_are_named_at_once() -> None:
    message = _refused("[]", GOOD, _messages({"role": "bot", "content": 3}, ANSWER), "{")
    assert "4 problem(s)" in message
    for start in ("row 1: ", "row 3: messages[0].role", "row 3: messages[0].content", "row 4: "):
        assert f"  {start}" in message


def test_of_very_many_bad_rows_the_first_are_shown_and_the_rest_counted() -> None:
    message = _refused(*["{"] * 1000)
    assert "1000 problem(s)" in message and f"... and {1000 - MAX_PROBLEMS_SHOWN} more" in message
    assert len(message.splitlines()) == MAX_PROBLEMS_SHOWN + 2


def test_a_file_that_is_missing_empty_or_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b" \n\n")
    (tmp_path / "latin1").write_bytes('{"prompt": "é", "completion": "a"}'.encode("latin-1"))
    for name, said in (("absent", "does not exist"), ("empty", "is empty"), ("latin1", "byte 12 is no UTF-8")):
        with pytest.raises(DataError, match=rf"{name}: .*{said}"):
            read_rows(str(tmp_path / name))
