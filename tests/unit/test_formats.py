"""Formats: one record of each becomes the expected row, and every bad one is named with its field and the remedy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.config import Format, ReadingBlock
from service.data.files import Record, open_source
from service.data.formats import MAX_PROBLEMS_SHOWN, detect, parse, read_rows, read_source
from service.data.rows import (
    Answer,
    Content,
    Conversation,
    Extraction,
    Labelled,
    Preference,
    Problem,
    Row,
    Tagged,
    Text,
)
from service.errors import DataError

SYSTEM, USER, ANSWER = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
OPENAI_CALL = {**CALL, "function": {"name": "weather", "arguments": '{"town": "Bonn"}'}}
CALLED = (
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    ANSWER,
)
SQUAD = {"context": "Bonn lies on the Rhine.", "question": "Where?"}
RHINE = Extraction("Bonn lies on the Rhine.", "Where?", (Answer("the Rhine", 13),))


def _pair(prompt: str = "u", completion: str = "a") -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}))


def _said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


EXAMPLES: list[tuple[Format, dict[str, Any], Content]] = [
    ("messages", {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, Conversation((SYSTEM, USER, ANSWER, USER, ANSWER))),
    ("messages", {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]}, Conversation((SYSTEM, USER, ANSWER))),
    ("messages", {"messages": json.dumps([USER, ANSWER]), "text": "rendered"}, Conversation((USER, ANSWER))),
    (
        "messages",
        {"messages": [USER, {**ANSWER, "weight": 0}, {**USER, "weight": 0}, {**ANSWER, "weight": 1.0}, USER,
                      {**ANSWER, "train": False}, USER, {**ANSWER, "train": True, "weight": 1}]},
        Conversation((USER, {**ANSWER, "train": False}, USER, {**ANSWER, "train": True}, USER,
                      {**ANSWER, "train": False}, USER, {**ANSWER, "train": True})),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, ANSWER]},
        Conversation(({"role": "user", "content": "a b"}, ANSWER)),
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}, CALLED[2], ANSWER],
         "tools": [TOOL]},
        Conversation(CALLED, (TOOL,)),
    ),
    ("messages", {"messages": list(CALLED), "tools": json.dumps([WEATHER])}, Conversation(CALLED, (TOOL,))),
    ("sharegpt", {"conversations": [_said("human", "u"), _said("gpt", "a")], "system": "s"}, Conversation((SYSTEM, USER, ANSWER))),
    ("sharegpt", {"conversations": [_said("system", "s"), _said("user", "u"), _said("assistant", "a")]},
     Conversation((SYSTEM, USER, ANSWER))),
    (
        "sharegpt",
        {"conversations": [_said("human", "u"), _said("function_call", json.dumps(CALL["function"])),
                           _said("observation", "rain"), {**_said("gpt", "a"), "weight": 1}],
         "tools": json.dumps([WEATHER])},
        Conversation(
            (USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL["function"]}]},
             {"role": "tool", "content": "rain"}, {**ANSWER, "train": True}), (TOOL,)),
    ),
    ("sharegpt", {"conversations": [USER, ANSWER]}, Conversation((USER, ANSWER))),
    ("prompt", {"prompt": "u", "completion": "a"}, _pair()),
    ("prompt", {"prompt": "u", "completion": "a", "system": "s"}, Conversation((SYSTEM, USER, ANSWER))),
    ("prompt", {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]},
     Conversation((SYSTEM, USER, ANSWER, USER, ANSWER))),
    ("prompt", {"prompt": [SYSTEM, USER], "completion": "a"}, Conversation((SYSTEM, USER, ANSWER))),
    ("alpaca", {"instruction": "i", "output": "a"}, _pair("i")),
    ("alpaca", {"instruction": "i", "input": "", "output": "a", "text": "rendered"}, _pair("i")),
    ("alpaca", {"instruction": "i", "input": "x", "output": "a"}, _pair("i\n\nx")),
    ("alpaca", {"instruction": "u", "input": None, "output": "a", "system": "s"}, Conversation((SYSTEM, USER, ANSWER))),
    ("text", {"text": " running\n"}, Text(" running\n")),
    ("preference", {"prompt": "u", "chosen": "a", "rejected": "b"},
     Preference((USER,), (ANSWER,), ({**ANSWER, "content": "b"},))),
    ("preference", {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
     Preference((SYSTEM, USER), (ANSWER,), ({**ANSWER, "content": "b"},))),
    ("preference", {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, {**ANSWER, "content": "b"}]},
     Preference((SYSTEM, USER), (ANSWER,), ({**ANSWER, "content": "b"},))),
    ("preference", {"prompt": "u", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, {**ANSWER, "content": "b"}]},
     Preference((SYSTEM, USER), (ANSWER,), ({**ANSWER, "content": "b"},))),
    ("preference", {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, {**ANSWER, "content": "b"}]},
     Preference((USER, ANSWER, USER), (ANSWER,), ({**ANSWER, "content": "b"},))),
    ("labelled", {"text": "t", "label": "yes"}, Labelled("t", "yes")),
    ("labelled", {"sentence": "t", "label": 3}, Labelled("t", "3")),
    ("labelled", {"sentence1": "t", "sentence2": "u", "label": True}, Labelled("t", "true", "u")),
    ("labelled", {"premise": "t", "hypothesis": "u", "label": "0"}, Labelled("t", "0", "u")),
    ("tags", {"tokens": ["Bonn", "lies"], "tags": ["B-LOC", "O"]}, Tagged(("Bonn", "lies"), ("B-LOC", "O"))),
    ("tags", {"tokens": '["Bonn"]', "ner_tags": "[3]"}, Tagged(("Bonn",), ("3",))),
    ("qa", {**SQUAD, "answers": {"text": ["the Rhine", "the Rhine"], "answer_start": [13, 13]}}, RHINE),
    ("qa", {**SQUAD, "answers": {"text": [], "answer_start": []}}, Extraction(SQUAD["context"], SQUAD["question"], ())),
    ("qa", {**SQUAD, "answers": [{"text": "the Rhine", "answer_start": 13}, "Bonn"]},
     Extraction(SQUAD["context"], SQUAD["question"], (Answer("the Rhine", 13), Answer("Bonn", 0)))),
    ("qa", {**SQUAD, "answer": "the Rhine", "answer_start": "13"}, RHINE),
    ("qa", {**SQUAD, "answer": "the Rhine"}, RHINE),
    ("qa", {**SQUAD, "answer": ""}, Extraction(SQUAD["context"], SQUAD["question"], ())),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "values", "content"), EXAMPLES)
def test_a_record_of_each_format_is_detected_and_becomes_its_row(
    shape: Format, values: dict[str, Any], content: Content
) -> None:
    others: dict[str, Any] = {"id": 3, "score": None}
    record = Record(7, {**values, **others}, "part.jsonl")
    if "rendered" in values.values():
        others["text"] = "rendered"
    assert detect([record], ReadingBlock(), "x") == shape
    assert detect([record], ReadingBlock(format=shape), "x") == shape
    assert parse(record, shape, ReadingBlock()) == Row(7, content, others, "part.jsonl")


def _parsed(values: dict[str, Any], **reading: Any) -> Row:
    block, record = ReadingBlock(**reading), Record(1, values)
    row = parse(record, detect([record], block, "x"), block)
    assert isinstance(row, Row), row
    return row


def _refused(values: dict[str, Any], **reading: Any) -> str:
    with pytest.raises(DataError) as caught:
        detect([Record(1, values)], ReadingBlock(**reading), "x.jsonl")
    assert str(caught.value).startswith(("x.jsonl: ", "data.template: "))
    return str(caught.value)


def test_columns_say_which_column_is_which_field_and_the_others_stay() -> None:
    row = _parsed(
        {"question": "u", "reply": "a", "text": "t", "n": 1}, columns={"prompt": "question", "completion": "reply"}
    )
    assert row == Row(1, _pair(), {"text": "t", "n": 1})
    row = _parsed({"body": "u", "text": "title"}, columns={"text": "body"})
    assert row == Row(1, Text("u"), {"text": "title"})


def test_a_template_is_the_users_turn() -> None:
    values = {"title": "T", "n": 3, "tags": ["ä"], "completion": "a"}
    row = _parsed(values, template="{title} has {{braces}}, {n} and {tags}.")
    assert row.content == _pair('T has {braces}, 3 and ["ä"].')
    assert row.fields == {"title": "T", "n": 3, "tags": ["ä"]}
    assert _parsed(
        {"q": "x", "output": "a"}, template="Ask: {instruction}!", columns={"instruction": "q"}
    ).content == _pair("Ask: x!")


def test_the_alpaca_template_is_stanfords() -> None:
    with_input = _parsed({"instruction": "Add.", "input": "1 2", "output": "3"}, template="alpaca").content
    assert with_input == _pair(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:",
        "3",
    )
    without = _parsed(
        {"ask": "Count.", "input": "", "output": "1"}, template="alpaca", columns={"instruction": "ask"}
    ).content
    assert without == _pair(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Response:",
        "1",
    )


@pytest.mark.parametrize(
    ("values", "reading", "said"),
    [
        ({"a": 1, "b": 2}, {}, "the columns ['a', 'b'] fit no format"),
        ({"a": 1}, {}, "  preference: chosen and rejected\n  qa: context and question and answers or context"),
        ({"prompt": "u"}, {}, "  prompt: prompt and completion"),
        ({"text": "t"}, {"format": "alpaca"}, "the columns ['text'] fit not the format alpaca"),
        ({"messages": [], "chosen": [], "rejected": []}, {}, "fit the formats messages and preference. Set data.format"),
        ({"messages": None, "text": None}, {}, "fit no format"),
        ({"text": "t"}, {"columns": {"text": "body"}}, "data.columns names ['body'], and the columns are ['text']"),
        ({"text": "t", "l": 1}, {"columns": {"lable": "l"}}, "data.columns has ['lable'], and the format text has the fields text"),
        ({"completion": "a"}, {"template": "{x} {y"}, "data.template: expected '}' before end of string"),
        ({"completion": "a"}, {"template": "}"}, "Double a brace to mean itself"),
        ({"completion": "a", "x": 1}, {"template": "{x:>3}"}, "{x:>3} is no column's name"),
        ({"completion": "a", "x": 1}, {"template": "{}"}, "{} is no column's name"),
        ({"completion": "a", "x": 1}, {"template": "{x} {y}"}, "data.template names ['y'], and the columns are ['completion', 'x']"),
        ({"output": "a"}, {"template": "alpaca"}, "data.template names ['instruction']"),
        ({"messages": []}, {"template": "{x}", "format": "messages"}, "is for the format prompt or alpaca, not for messages"),
        ({"text": "a"}, {"template": "{text}"}, "  prompt: prompt and completion"),
    ],
)  # fmt: skip
def test_a_source_without_a_format_is_told_what_to_set(
    values: dict[str, Any], reading: dict[str, Any], said: str
) -> None:
    assert said in _refused(values, **reading)


def test_rows_of_two_formats_are_ambiguous_and_naming_one_makes_the_others_problems(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"prompt": "u", "completion": "a"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = open_source(str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match="fit the formats messages and prompt"):
        read_source(source)
    first, second = read_source(source, ReadingBlock(format="messages"))
    assert isinstance(first, Row) and isinstance(second, Problem)
    assert second.text == "field 'messages' is missing. The row has the columns ['completion', 'prompt']."


BAD: list[tuple[Format, dict[str, Any], list[str]]] = [
    ("messages", {"messages": []}, ["messages is [], wanted a list"]),
    ("messages", {"messages": "a"}, ['messages is "a", wanted a list']),
    ("messages", {"messages": ["a", ANSWER]}, ['messages[0] is "a", wanted an object']),
    ("messages", {"messages": [USER]}, ["the last message has the role 'user', wanted assistant"]),
    ("messages", {"messages": [ANSWER]}, ["messages has only an answer"]),
    ("messages", {"messages": [ANSWER, USER, ANSWER]}, ["messages[0] is an answer"]),
    ("messages", {"messages": [{"role": "bot", "content": 3}, {"role": "assistant"}]},
     ['messages[0].role is "bot", wanted one of system, developer', "messages[0].content is 3", "messages[1].content is missing"]),
    ("messages", {"messages": [{"role": ["user"], "content": " "}, ANSWER]},
     ['messages[0].role is ["user"]', "messages[0].content is empty"]),
    ("messages", {"messages": [{"content": "a"}, {**ANSWER, "content": ""}]},
     ["messages[0].role is null", "messages[1].content is empty"]),
    ("messages", {"messages": [{**USER, "mood": "sad"}, ANSWER]}, ["messages[0] has the field(s) ['mood'], which are not trained"]),
    ("messages", {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]}, ["messages[0].content is [{"]),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0.5}]},
     ["messages[1].weight is 0.5, wanted 0 or 1: a turn is learnt or it is not"]),
    ("messages", {"messages": [USER, {**ANSWER, "weight": "1"}]}, ['messages[1].weight is "1"']),
    ("messages", {"messages": [USER, {**ANSWER, "train": 1}]}, ["messages[1].train is 1, wanted true or false"]),
    ("messages", {"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}, ["Keep one of the two"]),
    ("messages", {"messages": [{**USER, "train": True}, ANSWER]}, ["only an assistant's turn is trained"]),
    ("messages", {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, ["no tool was called before it"]),
    ("messages", {"messages": [*CALLED[:2], {**CALLED[2], "tool_call_id": "c9"}, ANSWER]},
     ["messages[2].tool_call_id is \"c9\", wanted one of ['c1']"]),
    ("messages", {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, ["only an assistant calls tools"]),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"arguments": "{"}}]}]},
     ["messages[1].tool_calls[0].function.name is null", 'function.arguments is "{", wanted a JSON object']),
    ("messages", {"messages": [USER, ANSWER], "tools": ["weather"]}, ['tools[0] is "weather", wanted an object']),
    ("sharegpt", {"conversations": [_said("alien", "x"), {"from": "gpt"}]},
     ['conversations[0].from is "alien"', "conversations[1].value is missing"]),
    ("sharegpt", {"conversations": [_said("human", "u"), _said("function_call", "no JSON"), _said("gpt", "a")]},
     ["conversations[1].tool_calls[0] is"]),
    ("prompt", {"prompt": 3, "completion": "  "}, ["prompt is 3, wanted text", "completion is empty"]),
    ("prompt", {"prompt": "u"}, ["field 'completion' is missing"]),
    ("prompt", {"prompt": "\ud800", "completion": "a"}, ["prompt has a lone surrogate"]),
    ("prompt", {"prompt": [USER], "completion": [USER]}, ["completion begins with the role 'user'", "the last message"]),
    ("prompt", {"prompt": [ANSWER, USER], "completion": "a"}, ["prompt[0] is an answer"]),
    ("alpaca", {"instruction": None, "input": 3, "output": ""}, ["instruction is null", "input is 3", "output is empty"]),
    ("text", {"text": "\n"}, ["text is empty"]),
    ("preference", {"prompt": "u", "chosen": "a", "rejected": "a"}, ["chosen and rejected are the same"]),
    ("preference", {"chosen": "a", "rejected": "b"}, ["prompt is missing"]),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "x"}, ANSWER]}, ["prompt is missing"]),
    ("preference", {"prompt": "x", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
     ["prompt is not how both chosen and rejected begin"]),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER]}, ["rejected has no answer of its own"]),
    ("preference", {"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, ["the prompt ends with an answer"]),
    ("labelled", {"text": "", "label": 1.5}, ["text is empty", "label is 1.5, wanted a class"]),
    ("labelled", {"text": "t", "label": None}, ["label is null"]),
    ("labelled", {"text": "t"}, ["field 'label' is missing"]),
    ("tags", {"tokens": ["a", ""], "tags": ["O"]}, ["tokens has 2 words and tags has 1 tags", "tokens[1] is empty"]),
    ("tags", {"tokens": [], "tags": []}, ["tokens is []"]),
    ("qa", {**SQUAD, "answers": {"text": ["Rhine"], "answer_start": [0]}},
     ['answers.text[0] is "Rhine", and the context has "Bonn " at 0']),
    ("qa", {**SQUAD, "answers": {"text": ["Rhine"], "answer_start": []}}, ["1 texts and 0 answer_starts"]),
    ("qa", {**SQUAD, "answers": ["n"]}, ['answers[0], "n", stands 4 times in the context']),
    ("qa", {**SQUAD, "answer": "Köln"}, ["stands 0 times in the context"]),
    ("qa", {**SQUAD, "answer": "Bonn", "answer_start": "first"}, ['the answer_start of answer is "first"']),
    ("qa", {**SQUAD, "answer": "Bonn", "answer_start": -4}, ["at -4"]),
    ("qa", {**SQUAD, "answers": 3}, ["answers is 3, wanted lists"]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "values", "said"), BAD)
def test_all_that_is_wrong_with_a_record_is_named_at_once(
    shape: Format, values: dict[str, Any], said: list[str]
) -> None:
    found = parse(Record(7, values, "part.csv"), shape, ReadingBlock())
    assert isinstance(found, list), found
    assert len(found) == len(said) and all(text in problem.text for text, problem in zip(said, found, strict=True)), (
        found
    )
    assert {(problem.number, problem.file) for problem in found} == {(7, "part.csv")}


def test_a_row_without_a_column_of_the_template_is_named() -> None:
    block = ReadingBlock(template="{x}{y}")
    found = parse(Record(1, {"x": None, "completion": "a"}), "prompt", block)
    assert isinstance(found, list)
    assert [problem.text for problem in found] == [
        f"column '{name}' has no value, and data.template names it." for name in "xy"
    ]


def test_the_same_rows_come_out_of_a_table_as_out_of_json_lines(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**ANSWER, "content": f"ä {i}"}], "id": str(i)} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerows([["messages", "id"], *([json.dumps(row["messages"]), row["id"]] for row in rows)])
    read = [list(read_source(open_source(str(tmp_path / name)))) for name in ("x.jsonl", "x.parquet", "x.csv")]
    assert read[0] == read[1] == read[2] and len(read[0]) == 5
    assert read[0][4] == Row(5, Conversation((USER, {**ANSWER, "content": "ä 4"})), {"id": "4"})


def _written(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "rows.jsonl")


def test_prompt_and_reference_split_before_the_last_answer(tmp_path: Path) -> None:
    messages = [SYSTEM, USER, ANSWER, USER, {**ANSWER, "content": "b"}]
    (row,) = read_rows(_written(tmp_path, json.dumps({"messages": messages})))
    assert row.reference() == "b"
    assert [message["content"] for message in row.prompt()] == ["s", "u", "a", "u"]


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    line = json.dumps({"prompt": text, "completion": "a"}, ensure_ascii=False).replace("\x0b", "\\u000b")
    assert read_rows(_written(tmp_path, line))[0].messages[0]["content"] == text


def test_all_bad_rows_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    good = json.dumps({"messages": [USER, ANSWER]})
    bad = json.dumps({"messages": [{"role": "bot", "content": 3}, ANSWER]})
    with pytest.raises(DataError) as caught:
        read_rows(_written(tmp_path, "[]", good, bad, "{"))
    assert "rows.jsonl: 4 problem(s). Mend these rows." in str(caught.value)
    for start in ("row 1: ", "row 3: messages[0].role", "row 3: messages[0].content", "row 4: "):
        assert f"  {start}" in str(caught.value)


def test_of_very_many_bad_rows_the_first_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(_written(tmp_path, *["{"] * 1000))
    assert "1000 problem(s)" in str(caught.value)
    assert f"... and {1000 - MAX_PROBLEMS_SHOWN} more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == MAX_PROBLEMS_SHOWN + 2


def test_who_wants_conversations_is_told_what_else_a_file_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1 is a labelled, wanted conversations"):
        read_rows(_written(tmp_path, json.dumps({"text": "t", "label": "l"})))
