"""What one pass over rows leaves in memory: some 40 bytes a row, and its number under each thing that is wrong with it.

Looks at rows one by one; what the figures of a whole corpus mean, `checkup.py` says. Of a row's text nothing stays but
hashes, short answers that may be classes, and, of the first `near_rows` rows, what `sameness.py` keeps.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from service.config import DataBlock
from service.data import suspicious
from service.data import thresholds as at
from service.data.language import UNDETERMINED, language_of
from service.data.rendered import examples_of_rows
from service.data.rows import Conversation, Labelled, Preference, Problem, Row, said, texts
from service.data.sameness import NearTexts, Parts, parts_of
from service.render import Message, Rendered, Renderer

TOGETHER = 256  # rows that are tokenised together
NO_LANGUAGE = frozenset((UNDETERMINED, "zxx"))  # zxx: no linguistic content, ISO 639-2


def _numbers() -> array[int]:
    return array("I")  # row numbers, four bytes each


@dataclass
class Marked:
    """Rows with the same thing wrong with them, each once; what the first of them says; and how often each kind of it was."""

    rows: array[int] = field(default_factory=_numbers)
    example: str = ""
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, example: str = "", kinds: Iterable[str] = ()) -> None:
        """One more. Numbers come in order."""
        self.example = self.example or example
        self.kinds.update(kinds)
        if not self.rows or self.rows[-1] != number:
            self.rows.append(number)


class Against:
    """Evaluation data: what it asks, exactly and, of its first `near_rows` rows, nearly."""

    def __init__(self, rows: Iterable[Row | Problem], near_rows: int) -> None:
        self.num_rows = 0
        self.exact: dict[int, int] = {}  # by the hash of a prompt, the number of the first row that asks it
        self.near = NearTexts()
        for row in rows:
            if isinstance(row, Problem):
                continue
            self.num_rows += 1
            parts = parts_of(row.content)
            new = parts.prompt and self.exact.setdefault(parts.prompt_hash, row.number) == row.number
            if new and self.num_rows <= near_rows:
                self.near.keep(row.number, parts.prompt)


class Classes:
    """Answers that may be classes: labels, and short answers of which there are few."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.of, self.prompts, self.numbers = array("B"), array("Q"), _numbers()
        self.labelled = False

    @property
    def too_many(self) -> bool:
        """Whether the answers are no classes. Then none is remembered."""
        return len(self.names) > at.MAX_CLASSES

    def add(self, number: int, parts: Parts, *, labelled: bool) -> None:
        """A row's answer."""
        self.labelled = self.labelled or labelled
        short = labelled or 0 < len(parts.answer) <= at.CLASS_CHARS
        index = self.names.setdefault(parts.answer, len(self.names)) if short and not self.too_many else at.MAX_CLASSES
        if index < at.MAX_CLASSES:
            self.of.append(index)
            self.prompts.append(parts.prompt_hash)
            self.numbers.append(number)
        elif self.too_many:
            del self.of[:], self.prompts[:], self.numbers[:]


class Observed:
    """All that is known of the rows. `near_rows` of them are compared nearly, with each other and with `against`."""

    def __init__(self, data: DataBlock, renderer: Renderer | None, against: Against | None, near_rows: int) -> None:
        self._data, self._renderer, self._against, self._near_rows = data, renderer, against, near_rows
        self._near, self._near_known = NearTexts(), set[int]()
        self.kinds: Counter[str] = Counter()  # of content
        self.numbers, self.chars, self.answer_chars = _numbers(), array("I"), array("I")
        self.identities = array("Q")
        self.marked: defaultdict[str, Marked] = defaultdict(Marked)
        self.unreadable: dict[str, Marked] = {}  # by the shape of what is wrong
        self.num_unreadable, self._last_unreadable = 0, 0
        self.classes = Classes()
        self.languages: defaultdict[str, array[int]] = defaultdict(_numbers)
        self.tokens = array("I")  # of each example, before it is cut or dropped
        self.supervised = 0
        self.split_by_turn = 0
        self.num_near = 0  # rows that were compared nearly

    @property
    def num_rows(self) -> int:
        """Rows that could be read."""
        return len(self.numbers)

    def look_at(self, entries: Iterable[Row | Problem]) -> None:
        """All of them, in order, once."""
        stream = iter(entries)
        while batch := list(islice(stream, TOGETHER)):
            rows = [entry for entry in batch if isinstance(entry, Row)]
            for entry in batch:
                self._problem(entry) if isinstance(entry, Problem) else self._row(entry)
            if self._renderer:
                rendered = examples_of_rows(rows, self._renderer, self._data.train_on)
                for row, examples in zip(rows, rendered, strict=True):
                    self._examples(row.number, examples)

    def _problem(self, problem: Problem) -> None:
        self.num_unreadable += problem.number != self._last_unreadable
        self._last_unreadable = problem.number
        shape = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'|\d+", "*", problem.text)
        if len(self.unreadable) >= at.MAX_KINDS_OF_PROBLEMS:
            shape = shape if shape in self.unreadable else "other"
        self.unreadable.setdefault(shape, Marked()).add(problem.number, problem.text)

    def _row(self, row: Row) -> None:
        parts = parts_of(row.content)
        index = self.num_rows
        self.kinds[type(row.content).__name__.lower()] += 1
        self.numbers.append(row.number)
        self.identities.append(parts.identity)
        self.chars.append(len(parts.prompt) + len(parts.answer))
        self.answer_chars.append(len(parts.answer))
        self.classes.add(row.number, parts, labelled=isinstance(row.content, Labelled))
        self._text(row)
        self._turns(row)
        if index < max(at.LANGUAGE_ROWS, self._near_rows) or index % at.LANGUAGE_EVERY == 0:
            self.languages[_language(row)].append(row.number)
        self._compare(row.number, parts)

    def _text(self, row: Row) -> None:
        """What its texts hold that should not be there."""
        fields = list(texts(row.content))
        whole = "\n".join([*(text for _, text in fields), *_called(row)])
        for kind, looks in (("secret", suspicious.secrets), ("personal_data", suspicious.personal)):
            if found := list(looks(whole)):
                self.marked[kind].add(row.number, kinds=found)
        for what in suspicious.broken(whole):
            self.marked[what.replace(" ", "_")].add(row.number)
        if suspicious.template_marks(whole):
            self.marked["template_marks"].add(row.number)
        if ends := suspicious.line_ends("\n\0".join(text for _, text in fields) if "\r" in whole else whole):
            self.marked[ends].add(row.number)
        if empty := _empty(row, fields):
            self.marked["empty"].add(row.number, empty)

    def _turns(self, row: Row) -> None:
        if isinstance(row.content, Preference) and _contents(row.content.chosen) == _contents(row.content.rejected):
            self.marked["same_answers"].add(row.number)
        if not isinstance(row.content, Conversation):
            return
        if wrong := _out_of_turn(row.messages):
            self.marked["turn_order"].add(row.number, wrong)
        if self._data.train_on != "all" and not any(map(_is_trained, row.messages)):
            self.marked["nothing_trained"].add(row.number, "every answer has train: false or weight: 0")

    def _compare(self, number: int, parts: Parts) -> None:
        """With the rows before, nearly, and with the evaluation data. Rows that are exactly the same are found at the end."""
        near = self.num_rows <= self._near_rows
        self.num_near += near
        if near and parts.identity not in self._near_known:
            self._near_known.add(parts.identity)
            note = parts.answer if len(parts.answer) <= at.CLASS_CHARS else ""  # another class is another row
            if (found := self._near.keep(number, parts.text, note)) is not None:
                self.marked["near_duplicate"].add(number, f"row {number} is nearly row {found}")
        if self._against is None or not parts.prompt:
            return
        if (there := self._against.exact.get(parts.prompt_hash)) is not None:
            self.marked["leak"].add(number, f"row {number} asks what row {there} asks there")
        elif near and (there := self._against.near.find(parts.prompt)) is not None:
            self.marked["near_leak"].add(number, f"row {number} asks nearly what row {there} asks there")

    def _examples(self, number: int, rendered: Rendered) -> None:
        if "nothing_trained" in self.marked and number in self.marked["nothing_trained"].rows[-TOGETHER:]:
            return  # known without rendering it
        if isinstance(rendered, Exception):
            self.marked["not_rendered"].add(number, str(rendered))
            return
        seq_len = self._data.seq_len
        longest = max(len(example.ids) for example in rendered)
        self.split_by_turn += len(rendered) > 1
        self.tokens.extend(len(example.ids) for example in rendered)
        self.supervised += sum(sum(example.mask) for example in rendered)
        if not any(any(example.mask) for example in rendered):
            self.marked["nothing_trained"].add(number, "none of its tokens is trained")
        elif longest > seq_len:
            self.marked["over_long"].add(number, f"row {number} has {longest:,}")
            if self._data.over_long == "truncate" and not any(any(example.mask[:seq_len]) for example in rendered):
                self.marked["truncated_away"].add(number)


def _called(row: Row) -> list[str]:
    """What tools were asked, as text."""
    if not isinstance(row.content, Conversation):
        return []
    return [json.dumps(turn["tool_calls"], ensure_ascii=False) for turn in row.messages if turn.get("tool_calls")]


def _language(row: Row) -> str:
    found = language_of(
        said(row.content)[: at.LANGUAGE_CHARS], confidence=at.LANGUAGE_CONFIDENCE, letter_bytes=at.LANGUAGE_LETTER_BYTES
    )
    return UNDETERMINED if found in NO_LANGUAGE else found


def _empty(row: Row, fields: Sequence[tuple[str, str]]) -> str | None:
    """The first field in which there is nothing; a tool may answer nothing, and a call needs no text."""
    silent: set[int] = set()
    if isinstance(row.content, Conversation):
        silent = {i for i, turn in enumerate(row.messages) if turn["role"] == "tool" or turn.get("tool_calls")}
    blank = (name for i, (name, text) in enumerate(fields) if i not in silent and not text.strip())
    return next((f"{name} is empty" for name in blank), None)


def _out_of_turn(messages: Sequence[Message]) -> str | None:
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        return f"messages[{roles.index('system', 1)}] is a system prompt, after the first message"
    pairs = enumerate(pairwise(roles), 1)
    return next(
        (
            f"messages[{i}] is the second of two {a} turns"
            for i, (a, b) in pairs
            if a == b and a in ("user", "assistant")
        ),
        None,
    )


def _is_trained(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("train") is not False


def _contents(turns: Sequence[Message]) -> list[str]:
    return [str(turn.get("content") or "") for turn in turns]
