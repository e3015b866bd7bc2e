"""From records to rows: which format a source has, and what each of its records says, or why it says nothing.

    format      needs                                     takes too
    messages    messages                                  tools
    sharegpt    conversations                             system, tools
    prompt      prompt, completion (texts or messages)    system, tools
    alpaca      instruction, output                       input, system

`data.columns` says which column is which field, other columns become `Row.fields`. `data.template` is the text of the
user's turn in prompt and alpaca.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from service.config import Format, ReadingBlock
from service.data.files import Source, open_source
from service.data.records import Record
from service.data.rows import Content, Conversation, Problem, Row
from service.data.turns import conversation, read_text, read_turns, shown, system_turn
from service.errors import DataError

MAX_PROBLEMS_SHOWN = 20
DETECTED = ReadingBlock()
SAMPLE_RECORDS = 64  # by which a format is detected

Fields = Mapping[str, Any]  # by our names


@dataclass(frozen=True)
class _Shape:
    """A format: one of these sets of fields is needed, these are taken too; and how they become a row's content."""

    needs: tuple[tuple[str, ...], ...]
    takes: tuple[str, ...]
    read: Callable[[Fields, list[str]], Content]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(field for fields in (*self.needs, self.takes) for field in fields)

    def fits(self, columns: Iterable[str]) -> bool:
        return any(set(fields) <= set(columns) for fields in self.needs)


def read_rows(uri: str, reading: ReadingBlock = DETECTED) -> list[Row]:
    """All rows of a file of conversations. Raises DataError that lists the bad ones, by row and field."""
    found = list(read_source(open_source(uri), reading))
    raise_problems([entry for entry in found if isinstance(entry, Problem)], uri)
    rows = [entry for entry in found if isinstance(entry, Row)]
    if others := [row for row in rows if not isinstance(row.content, Conversation)]:
        kind = type(others[0].content).__name__.lower()
        raise DataError(
            f"{uri}: row {others[0].number} is a {kind}, wanted conversations: messages, or prompt and completion."
        )
    return rows


def raise_problems(problems: list[Problem], name: str) -> None:
    """DataError with the first of them, a line each; nothing where there are none."""
    if not problems:
        return
    lines = [f"  row {problem.number}{_in(problem.file)}: {problem.text}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    more = len(problems) - len(lines)
    tail = [f"  ... and {more} more"] if more > 0 else []
    raise DataError("\n".join([f"{name}: {len(problems)} problem(s). Mend these rows.", *lines, *tail]))


def read_source(source: Source, reading: ReadingBlock = DETECTED) -> Iterator[Row | Problem]:
    """The rows of a source, streamed, with a Problem for each thing that is wrong. Raises DataError where none has a format."""
    if not any(isinstance(entry, Record) for entry in source.records()):
        return (entry for entry in source.records() if isinstance(entry, Problem))
    return _parsed(source.records(), detect(_readable(source), reading, source.uri), reading)


def detect(records: Iterable[Record], reading: ReadingBlock, name: str) -> Format:
    """The format that `reading` names, or the one that the first records have. Raises DataError where they have none, or two."""
    sample = [_fields(record.values, reading.columns) for record in islice(records, SAMPLE_RECORDS)]
    columns = list(dict.fromkeys(column for fields in sample for column in fields))
    wanted: Iterable[Format] = _SHAPES if reading.format == "auto" else (reading.format,)
    fitting = [shape for shape in wanted if any(_SHAPES[shape].fits(fields) for fields in sample)]
    if not fitting:
        needs = [f"  {shape}: {_needed(_SHAPES[shape])}" for shape in wanted]
        raise DataError(
            "\n".join(
                [f"{name}: no format has the columns {columns[:20]}. Name them by data.columns. Needed are:", *needs]
            )
        )
    if len(fitting) > 1:
        raise DataError(f"{name}: the rows fit the formats {' and '.join(fitting)}. Set data.format to one of them.")
    return fitting[0]


def parse(record: Record, shape: Format, reading: ReadingBlock) -> Row | list[Problem]:
    """What a record says in this format, or all that is wrong with it."""
    problems: list[str] = []
    own = _SHAPES[shape].fields
    fields = {key: value for key, value in _fields(record.values, reading.columns).items() if key in own}
    if not _SHAPES[shape].fits(fields):
        missing = [field for field in _SHAPES[shape].needs[0] if field not in fields]
        problems += [f"field '{field}' is missing. The row has {sorted(record.values)[:8]}." for field in missing]
    else:
        content = _SHAPES[shape].read(fields, problems)
    if problems:
        return [Problem(record.number, text, record.file) for text in problems]
    theirs = {reading.columns.get(field, field) for field in own}
    others = {key: value for key, value in record.values.items() if key not in theirs}
    return Row(record.number, content, others, record.file)


def _readable(source: Source) -> Iterator[Record]:
    return (entry for entry in source.records() if isinstance(entry, Record))


def _parsed(records: Iterable[Record | Problem], shape: Format, reading: ReadingBlock) -> Iterator[Row | Problem]:
    for record in records:
        if isinstance(record, Problem):
            yield record
        elif isinstance(row := parse(record, shape, reading), Row):
            yield row
        else:
            yield from row


def _fields(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record by our names."""
    theirs = set(columns.values())
    renamed = {ours: values[column] for ours, column in columns.items() if column in values}
    return {**{key: value for key, value in values.items() if key not in theirs}, **renamed}


def _needed(shape: _Shape) -> str:
    return " or ".join(" and ".join(fields) for fields in shape.needs)


def _in(file: str) -> str:
    return f" ({file})" if file else ""


def _messages(fields: Fields, problems: list[str]) -> Content:
    return conversation(fields["messages"], "messages", problems, tools=fields.get("tools"))


def _sharegpt(fields: Fields, problems: list[str]) -> Content:
    system, tools = fields.get("system"), fields.get("tools")
    return conversation(fields["conversations"], "conversations", problems, system=system, tools=tools)


def _prompt(fields: Fields, problems: list[str]) -> Content:
    asked = _turns_or_text(fields["prompt"], "prompt", "user", problems)
    answered = _turns_or_text(fields["completion"], "completion", "assistant", problems)
    return Conversation((*system_turn(fields.get("system"), problems), *asked, *answered))


def _turns_or_text(value: Any, field: str, role: str, problems: list[str]) -> tuple[dict[str, Any], ...]:
    if isinstance(value, list):
        return read_turns(value, field, problems)
    return ({"role": role, "content": read_text(value, field, problems)},)


def _alpaca(fields: Fields, problems: list[str]) -> Content:
    instruction = read_text(fields["instruction"], "instruction", problems)
    given = fields.get("input")
    if given is not None and not isinstance(given, str):
        problems.append(f"input is {shown(given)}, wanted text.")
    asked = f"{instruction}\n\n{given}" if given else instruction
    output = read_text(fields["output"], "output", problems)
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": output})
    return Conversation((*system_turn(fields.get("system"), problems), *turns))


_SHAPES: dict[Format, _Shape] = {
    "messages": _Shape((("messages",),), ("tools",), _messages),
    "sharegpt": _Shape((("conversations",),), ("system", "tools"), _sharegpt),
    "prompt": _Shape((("prompt", "completion"),), ("system",), _prompt),
    "alpaca": _Shape((("instruction", "output"),), ("input", "system"), _alpaca),
}
