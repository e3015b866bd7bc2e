"""From records to rows: which format a source has, and what each of its records says, or why it says nothing.

    format      needs                                               takes too
    messages    messages                                            tools
    sharegpt    conversations                                       system, tools
    prompt      prompt, completion (texts or lists of messages)     system, tools
    alpaca      instruction, output                                 input, system
    preference  chosen, rejected (texts or lists of messages)       prompt (unless both begin with it), system
    qa          context, question, answers or answer                answer_start
    tags        tokens, tags or ner_tags
    labelled    label; text, sentence, sentence1 and sentence2,
                or premise and hypothesis
    text        text

A source that could be text and another format is the other one. One that fits two others is an error that says what to
set, `data.format`. `data.columns` says which column is which field; columns that no field needs are `Row.fields`.
`data.template` is the text of the user's turn, in prompt and alpaca, in the place of prompt, or of instruction and input.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from service.config import Format, ReadingBlock
from service.data import contents, templates
from service.data.contents import Fields
from service.data.files import Source, open_source
from service.data.records import Record
from service.data.rows import Content, Conversation, Problem, Row
from service.errors import DataError

MAX_PROBLEMS_SHOWN = 20
SAMPLE_RECORDS = 1000  # by which a format is detected; of each only the columns are kept
DETECTED = ReadingBlock()


@dataclass(frozen=True)
class _Shape:
    """A format: one of these sets of fields is needed, these are taken too; and how they become a row's content.

    `asked`: the fields that a template takes the place of, the first of them for good.
    """

    needs: tuple[tuple[str, ...], ...]
    takes: tuple[str, ...]
    read: Callable[[Fields, list[str]], Content]
    asked: tuple[str, ...] = ()

    @cached_property
    def fields(self) -> frozenset[str]:
        return frozenset(field for fields in (*self.needs, self.takes) for field in fields)

    def lacks(self, there: Container[str]) -> list[str]:
        """The fields that are missing, of the set of which the fewest are."""
        return min(([field for field in fields if field not in there] for fields in self.needs), key=len)


_SHAPES: dict[Format, _Shape] = {
    "messages": _Shape((("messages",),), ("tools",), contents.messages),
    "sharegpt": _Shape((("conversations",),), ("system", "tools"), contents.sharegpt),
    "prompt": _Shape((("prompt", "completion"),), ("system", "tools"), contents.prompt, asked=("prompt",)),
    "alpaca": _Shape(
        (("instruction", "output"),), ("input", "system"), contents.alpaca, asked=("instruction", "input")
    ),
    "preference": _Shape((("chosen", "rejected"),), ("prompt", "system"), contents.preference),
    "qa": _Shape(
        (("context", "question", "answers"), ("context", "question", "answer")), ("answer_start",), contents.qa
    ),
    "tags": _Shape(tuple(("tokens", name) for name in contents.TAGS), (), contents.tags),
    "labelled": _Shape(
        tuple(tuple(name for name in (*pair, "label") if name) for pair in contents.PAIRS), (), contents.labelled
    ),
    "text": _Shape((("text",),), (), contents.text),
}


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
    """The format that `reading` names, or the one that the first records have: never "auto". `name` is for messages.

    Raises DataError where no record has it, where they fit several, and for columns or a template that do not go with them.
    """
    possible = _possible(reading, name)
    rows: list[set[str]] = []  # of each record the columns that have a value, by our names
    seen: dict[str, None] = {}
    for record in islice(records, SAMPLE_RECORDS):
        seen.update(dict.fromkeys(record.values))
        # A table has every column in every row, and null where there is nothing.
        rows.append({key for key, value in _fields(record.values, reading.columns).items() if value is not None})
    if absent := sorted(set(reading.columns.values()) - set(seen)):
        raise DataError(f"{name}: data.columns names {absent}, and the columns are {list(seen)[:20]}.")
    shape = _only(_fitting(rows, possible, reading), possible, list(seen), name)
    if strange := sorted(set(reading.columns) - _SHAPES[shape].fields):
        fields = ", ".join(sorted(_SHAPES[shape].fields))
        raise DataError(f"{name}: data.columns has {strange}, and the format {shape} has the fields {fields}.")
    if reading.template is not None:
        templates.check(reading.template, set(seen).union(*rows), name)
    return shape


def parse(record: Record, shape: Format, reading: ReadingBlock) -> Row | list[Problem]:
    """What a record says in this format, or all that is wrong with it."""
    form, problems = _SHAPES[shape], list[str]()
    own = form.fields
    every = _fields(record.values, reading.columns)
    fields = {key: value for key, value in every.items() if key in own}
    fixed: tuple[str, ...] = ()
    if reading.template is not None:
        fixed = templates.fixed(reading.template, {**record.values, **fields})
        asked = templates.fill(reading.template, {**record.values, **fields}, problems)
        fields = {key: value for key, value in fields.items() if key not in form.asked}
        fields[form.asked[0]] = asked
    if missing := form.lacks(fields):
        columns = sorted(record.values)[:8]
        problems += [f"field '{field}' is missing. The row has the columns {columns}." for field in missing]
    content = None if problems else form.read(fields, problems)
    if problems or content is None:
        return [Problem(record.number, text, record.file) for text in problems]
    theirs = {reading.columns.get(field, field) for field in own}
    others = {key: value for key, value in record.values.items() if key not in theirs}
    return Row(record.number, content, others, record.file, fixed)


def _possible(reading: ReadingBlock, name: str) -> tuple[Format, ...]:
    """The formats that `reading` leaves open."""
    named = tuple(_SHAPES) if reading.format == "auto" else (reading.format,)
    if reading.template is None:
        return named
    taking = ("alpaca",) if reading.template == templates.ALPACA else ("prompt", "alpaca")
    if not set(taking) & set(named):
        raise DataError(f"{name}: data.template is for the format {' or '.join(taking)}, not for {reading.format}.")
    return tuple(shape for shape in named if shape in taking)


def _fitting(rows: list[set[str]], possible: Iterable[Format], reading: ReadingBlock) -> list[Format]:
    """The formats that some of the rows have; not text, where another one is among them."""
    found = []
    for shape in possible:
        asked = _SHAPES[shape].asked if reading.template is not None else ()
        if any(not _SHAPES[shape].lacks(row.union(asked)) for row in rows):
            found.append(shape)
    return [shape for shape in found if shape != "text" or len(found) == 1]


def _only(found: list[Format], possible: tuple[Format, ...], seen: list[str], name: str) -> Format:
    """The format. Raises DataError that says what to set where there is none, or more than one."""
    if len(found) == 1:
        return found[0]
    if found:
        formats = " and ".join(found)
        raise DataError(
            f"{name}: the rows fit the formats {formats}. Set data.format to one of them, or split the file."
        )
    needs = [f"  {shape}: {' or '.join(' and '.join(fields) for fields in _SHAPES[shape].needs)}" for shape in possible]
    what = f"not the format {possible[0]}" if len(possible) == 1 else "no format"
    heading = f"{name}: the columns {seen[:20]} fit {what}. Say which is which by data.columns. Needed are:"
    raise DataError("\n".join([heading, *needs]))


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


def _in(file: str) -> str:
    return f" ({file})" if file else ""
