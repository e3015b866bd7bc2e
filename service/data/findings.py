"""From what was observed to findings: what is wrong, with which rows, and what to do about it.

First the marks, kinds of mistakes with the numbers of all their rows; then a finding for each, and those about the whole.
Pure; from where on something is a finding, `thresholds.py` says.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.config import DataBlock
from service.data import thresholds as at
from service.data.language import UNDETERMINED
from service.data.observed import Observed
from service.data.suspicious import printable

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: with how many rows, the numbers of the first, and what to do.

    Of the data's own text it holds names of classes and what an unreadable row's problem quotes, escaped; never a secret.
    """

    kind: str
    level: Level
    count: int  # rows, or classes
    rows: tuple[int, ...]  # empty where it is about the whole
    text: str
    fix: str

    def rows_named(self) -> str:
        """`Rows 3, 9 and 14 more. `, or nothing."""
        if not self.rows:
            return ""
        more = f" and {self.count - len(self.rows):,} more" if self.count > len(self.rows) else ""
        return f"Row{'s' if self.count > 1 else ''} {', '.join(map(str, self.rows))}{more}. "


@dataclass(frozen=True)
class Mark:
    """A kind of mistake, and the numbers of all the rows that have it."""

    kind: str
    rows: array[int]
    detail: str = ""  # an example, or how often each kind of it was


_LOOK = "Look at them: loray data show FILE --row N."
# What each kind of mark means, and its remedy.
_MEANINGS: dict[str, tuple[Level, str, str]] = {
    "unreadable": (
        "error",
        "cannot be read",
        "Mend the rows, or set them aside: loray data check FILE --quarantine OUT.",
    ),
    "empty": ("error", "an empty field", "Fill it, or remove the rows."),
    "not_rendered": ("error", "refused by the chat template", "Change the rows, or set model.chat_template."),
    "nothing_trained": (
        "error",
        "nothing to learn",
        "Remove the rows, or change data.train_on or their train or weight.",
    ),
    "over_long": (
        "error",
        "longer than data.seq_len",
        "Raise data.seq_len, or set data.over_long to drop or truncate.",
    ),
    "over_long_drop": ("warning", "longer than data.seq_len, and dropped", "Raise data.seq_len to train on them."),
    "over_long_truncate": (
        "warning",
        "longer than data.seq_len, and cut",
        "Raise data.seq_len to train on their ends.",
    ),
    "truncated_away": (
        "error",
        "nothing to learn once cut to data.seq_len",
        "Raise data.seq_len, or set data.over_long: drop.",
    ),
    "turn_order": ("warning", "turns out of order, which many templates refuse", "Join the turns, or split the row."),
    "template_marks": ("warning", "marks of a chat template, which a model takes for turns", "Remove the marks."),
    "same_answers": ("warning", "the same chosen and rejected answer", "Remove the rows: they prefer nothing."),
    "duplicate": ("warning", "an earlier row again", "Keep one of each, unless they are meant to count more."),
    "near_duplicate": ("warning", "an earlier row again, nearly word for word", "Keep one of each."),
    "leak": (
        "warning",
        "what the evaluation data asks",
        "Remove it from one side: its scores would flatter the model.",
    ),
    "near_leak": ("warning", "nearly what the evaluation data asks", "Remove it from one side if it is the same."),
    "conflicting_labels": ("warning", "the same text with another label", "Decide on one label."),
    "row_length": ("warning", "a length far from that of the others", _LOOK),
    "answer_length": ("warning", "an answer of a length far from that of the others", _LOOK),
    "language": (
        "warning",
        "another language than nearly all have",
        "Translate or remove the rows, or set data.filter.languages.",
    ),
    "secret": ("warning", "what looks like a secret", "Remove it, and revoke it: a model can repeat what it learnt."),
    "personal_data": ("warning", "what looks like personal data", "Replace it: a model can repeat what it learnt."),
    "mojibake": ("warning", "text that was decoded wrongly", "Read its source as UTF-8, or repair it with ftfy."),
    "replacement_characters": (
        "warning",
        "U+FFFD, where a character was lost",
        "Decode its source again, as what it is.",
    ),
    "control_characters": ("warning", "control characters", "Remove them."),
    "mixed_line_ends": ("warning", "line ends unlike those of the others", "Write \\n everywhere."),
}


def marks_of(seen: Observed, data: DataBlock) -> list[Mark]:
    """All that is wrong with single rows, by kind, in the order of _MEANINGS; of `unreadable` there is one for each problem."""
    found = [Mark("unreadable", group.rows, group.example) for group in seen.unreadable.values()]
    for kind, group in seen.marked.items():
        as_configured = f"over_long_{data.over_long}" if kind == "over_long" and data.over_long != "error" else kind
        counted = ", ".join(f"{times:,} x {what}" for what, times in group.kinds.most_common())
        found.append(Mark(as_configured, group.rows, counted or group.example))
    found += [*_duplicates(seen), *_conflicts(seen), *_outliers(seen), *_foreign(seen), *_line_ends(seen)]
    return sorted((mark for mark in found if mark.kind in _MEANINGS), key=lambda mark: [*_MEANINGS].index(mark.kind))


def findings_of(seen: Observed, marks: Iterable[Mark]) -> Iterator[Finding]:
    """Errors first."""
    found = [*_about_the_whole(seen), *map(_finding, marks), *_about_classes(seen)]
    yield from sorted(found, key=lambda finding: finding.level)


def meaning(kind: str) -> str:
    """What is said of the rows with a mark of this kind: "an earlier row again"."""
    return _MEANINGS[kind][1]


def _finding(mark: Mark) -> Finding:
    level, said, fix = _MEANINGS[mark.kind]
    detail = f": {printable(mark.detail).rstrip('.')}" if mark.detail else ""
    kind = "over_long" if mark.kind.startswith("over_long") else mark.kind
    return Finding(kind, level, len(mark.rows), tuple(mark.rows[: at.ROWS_NAMED]), f"{said}{detail}", fix)


def _duplicates(seen: Observed) -> Iterator[Mark]:
    """Rows whose identity an earlier row has."""
    identities, rows = np.frombuffer(seen.identities, np.uint64), np.frombuffer(seen.numbers, np.uint32)
    order = np.argsort(identities, kind="stable")
    repeats = np.flatnonzero(identities[order][1:] == identities[order][:-1]) + 1
    if not len(repeats):
        return
    later = np.sort(order[repeats])
    first = int(np.flatnonzero(identities == identities[later[0]])[0])
    yield _mark("duplicate", rows[later], f"row {rows[later[0]]} is row {rows[first]} again")


def _conflicts(seen: Observed) -> Iterator[Mark]:
    """Of classes: rows whose text another row has, with another class."""
    classes = seen.classes
    if not _are_classes(seen):
        return
    of, rows = np.frombuffer(classes.of, np.uint8), np.frombuffer(classes.numbers, np.uint32)
    _, which = np.unique(np.frombuffer(classes.prompts, np.uint64), return_inverse=True)
    lowest, highest = np.full(which.max() + 1, 255), np.zeros(which.max() + 1, dtype=int)
    np.minimum.at(lowest, which, of)
    np.maximum.at(highest, which, of)
    in_conflict = (lowest < highest)[which]
    if in_conflict.any():
        yield _mark("conflicting_labels", rows[in_conflict])


def _outliers(seen: Observed) -> Iterator[Mark]:
    """Rows, and answers, far from the median of the logarithms of their lengths."""
    rows = np.frombuffer(seen.numbers, np.uint32)
    for kind, lengths in (("row_length", seen.chars), ("answer_length", seen.answer_chars)):
        chars = np.frombuffer(lengths, np.uint32)
        some = chars > 0
        if some.sum() < at.MIN_ROWS_FOR_OUTLIERS:
            continue
        logs = np.log(np.maximum(chars, 1))
        median = float(np.median(logs[some]))
        deviation = at.MAD_TO_DEVIATION * float(np.median(np.abs(logs[some] - median)))
        distance = np.where(some, np.abs(logs - median), 0)
        far = distance > max(at.OUTLIER_DEVIATIONS * deviation, math.log(at.OUTLIER_FACTOR))
        if far.any():
            farthest = int(np.argmax(distance))
            shown = f"row {rows[farthest]} has {chars[farthest]:,} characters, the median is {math.exp(median):,.0f}"
            yield _mark(kind, rows[far], shown)


def _foreign(seen: Observed) -> Iterator[Mark]:
    """Rows in other languages, where nearly all are in one."""
    known = {language: rows for language, rows in seen.languages.items() if language != UNDETERMINED}
    if not known:
        return
    most = max(known, key=lambda language: len(known[language]))
    like_it = {most}.union(*(close for close in at.CLOSE_LANGUAGES if most in close))
    others = {language: rows for language, rows in known.items() if language not in like_it}
    num_others = sum(map(len, others.values()))
    if others and num_others <= (1 - at.ONE_LANGUAGE) * sum(map(len, known.values())):
        counts = ", ".join(f"{len(rows):,} x {language}" for language, rows in others.items())
        yield _mark("language", np.sort(np.concatenate([np.asarray(rows) for rows in others.values()])), counts)


def _line_ends(seen: Observed) -> Iterator[Mark]:
    """Rows that mix \\n and \\r\\n, and the fewer ones where some rows have this and some have that."""
    ends = {kind: np.asarray(seen.marked[kind].rows) for kind in ("lf", "crlf", "mixed") if kind in seen.marked}
    both = [ends[kind] for kind in ("lf", "crlf") if kind in ends]
    wrong = [ends[kind] for kind in ("mixed",) if kind in ends] + ([min(both, key=len)] if len(both) == 2 else [])
    if wrong:
        yield _mark("mixed_line_ends", np.sort(np.concatenate(wrong)))


def _about_the_whole(seen: Observed) -> Iterator[Finding]:
    if not seen.num_rows:
        yield Finding("no_rows", "error", 0, (), "no row can be read", "Check the file and data.format.")
    elif seen.num_rows < at.MIN_ROWS:
        text = f"{seen.num_rows} {'row is' if seen.num_rows == 1 else 'rows are'} few: from {at.MIN_ROWS} on fine-tuning shows"
        yield Finding("too_few_rows", "warning", seen.num_rows, (), text, "Collect more, or write some by hand.")
    if seen.tokens and not seen.supervised:
        text = "no token of any row is trained"
        yield Finding("no_supervised_tokens", "error", seen.num_rows, (), text, "Change data.train_on.")


def _about_classes(seen: Observed) -> Iterator[Finding]:
    """Whether every class has enough rows, and not far fewer than another."""
    if not _are_classes(seen):
        return
    classes = seen.classes
    names = [printable(name, 40) for name in classes.names]
    counts = np.bincount(np.frombuffer(classes.of, np.uint8), minlength=len(names))
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if len(names) == 1:
        text = f"every answer is {names[0]!r}"
        yield Finding(
            "one_class", "warning", 1, (), text, "Add rows with other answers: this one is learnt without reading."
        )
        return
    if counts[most] > at.MAX_IMBALANCE * counts[least]:
        text = f"the class {names[most]!r} has {counts[most]:,} rows and {names[least]!r} has {counts[least]:,}"
        fix = "Add rows of the small classes, or repeat them, and judge by macro F1."
        yield Finding("class_imbalance", "warning", len(names), _first_of(seen, [least]), text, fix)
    if rare := [i for i, count in enumerate(counts) if count < at.MIN_ROWS_OF_A_CLASS]:
        shown = ", ".join(f"{names[i]!r} ({counts[i]})" for i in rare[: at.ROWS_NAMED])
        text = f"{len(rare)} of {len(names)} classes have fewer than {at.MIN_ROWS_OF_A_CLASS} rows: {shown}"
        yield Finding("rare_class", "warning", len(rare), _first_of(seen, rare), text, "Add rows, or join classes.")


def _are_classes(seen: Observed) -> bool:
    """Labels always are; other answers, when nearly all are short and each is given often."""
    classes = seen.classes
    if classes.too_many or not classes.names:
        return False
    num_rows = len(classes.numbers)
    often = num_rows >= at.MIN_ROWS_PER_CLASS * len(classes.names)
    return classes.labelled or (often and num_rows >= at.CLASS_ANSWERS * seen.num_rows)


def _first_of(seen: Observed, classes: Sequence[int]) -> tuple[int, ...]:
    chosen = np.isin(np.frombuffer(seen.classes.of, np.uint8), classes)
    return tuple(int(n) for n in np.frombuffer(seen.classes.numbers, np.uint32)[chosen][: at.ROWS_NAMED])


def _mark(kind: str, rows: npt.NDArray[np.uint32], detail: str = "") -> Mark:
    return Mark(kind, array("I", rows.astype(np.uint32).tobytes()), detail)
