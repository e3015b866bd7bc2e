"""Changed copies of a training row: easy data augmentation, arXiv:1901.11196 section 2.

    copies(row, AugmentBlock(copies=2, swap=0.1), seed=0, synonyms={})  # two rows, a tenth of the prompt's words swapped

Only what the user said is changed: never an answer, a system prompt or a template's own text. Pure, and seeded by what
the row holds, so a row's copies are the same wherever it stands. Whoever splits calls this for the training side alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from service import storage
from service.config import AugmentBlock
from service.data.rows import Content, Conversation, Extraction, Labelled, Preference, Row, fingerprint
from service.errors import DataError, NotFoundError
from service.render import Message

COPY = "loray.copy"  # the field that a copy has and a row of the file has not: which copy of the row it is, from 1

Synonyms = Mapping[str, Sequence[str]]
Change = Callable[[str], str]


def copies(row: Row, block: AugmentBlock, seed: int, synonyms: Synonyms) -> list[Row]:
    """`block.copies` copies with the row's number and file, each drawn anew, and marked by the field COPY.

    In a copy each word is replaced by a synonym, where it has any, with the probability `synonym`; then each is exchanged
    with any other word of its text with `swap`; then left out with `delete`; and then, with `insert` for each that is
    left, there comes a synonym of one of them (without synonyms: one of them again) at any place. A text never loses
    its last word. Raises DataError for a row in which no user says anything.
    """
    made = []
    for number in range(1, block.copies + 1):
        draw = Random(f"{seed} {fingerprint(row.content).hex()} {number}")
        content = _changed(row, lambda text: _augmented(text, block, draw, synonyms))  # noqa: B023 - called at once
        made.append(replace(row, content=content, fields={**row.fields, COPY: number}))
    return made


def read_synonyms(uri: str) -> dict[str, tuple[str, ...]]:
    """The table of a file of lines `word<TAB>other,another`, words in small letters. Raises DataError by line."""
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except NotFoundError:
        raise DataError(f"{uri}: the table of synonyms does not exist. Check data.augment.synonyms.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: byte {error.start} is no UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    table: dict[str, tuple[str, ...]] = {}
    wrong: list[int] = []
    for number, line in enumerate(lines, 1):
        word, tab, others = line.partition("\t")
        known = tuple(other.strip() for other in others.split(",") if other.strip())
        if line.strip() and not (tab and word.strip() and known):
            wrong.append(number)
        elif line.strip():
            table[word.strip().lower()] = table.get(word.strip().lower(), ()) + known
    if wrong or not table:
        where = f"line(s) {', '.join(map(str, wrong[:20]))} are not" if wrong else "there is no line"
        raise DataError(f"{uri}: {where} word<TAB>other,another. Mend the table of data.augment.synonyms.")
    return table


def _changed(row: Row, change: Change) -> Content:
    """The row's content with `change` made to all that a user says."""
    content = row.content
    if isinstance(content, Conversation):
        return replace(content, messages=_turns(content.messages, row.fixed, change))
    if isinstance(content, Preference):
        return replace(content, prompt=_turns(content.prompt, row.fixed, change))
    if isinstance(content, Labelled):
        return replace(content, text=change(content.text), pair=content.pair and change(content.pair))
    if isinstance(content, Extraction):
        return replace(content, question=change(content.question))
    raise DataError(
        f"{f'{row.file} ' if row.file else ''}row {row.number}: data.augment changes what a user says, and all of this row "
        f"({type(content).__name__.lower()}) is what is learnt. Leave data.augment out."
    )


def _turns(messages: Sequence[Message], fixed: Sequence[str], change: Change) -> tuple[Message, ...]:
    return tuple(
        {**message, "content": _between(message["content"], fixed, change)} if message["role"] == "user" else message
        for message in messages
    )


def _between(text: str, fixed: Sequence[str], change: Change) -> str:
    """`text` with a change to each part between the texts in `fixed`, or to all of it without any."""
    filled = re.fullmatch("(.*?)".join(map(re.escape, fixed)), text, re.DOTALL) if fixed else None
    if filled is None:
        return change(text)
    parts = [change(part) for part in filled.groups()]
    return "".join(part for pair in zip(fixed, [*parts, ""], strict=True) for part in pair)


def _augmented(text: str, block: AugmentBlock, draw: Random, synonyms: Synonyms) -> str:
    """One drawing of all four, in order. The white space after a word stays in its place."""
    if not (found := re.findall(r"\S+", text)):
        return text
    gaps = re.split(r"\S+", text)
    words = [_synonym(word, draw, synonyms) if draw.random() < block.synonym else word for word in found]
    for i in range(len(words)):
        if len(words) > 1 and draw.random() < block.swap:
            j = (i + draw.randrange(1, len(words))) % len(words)
            words[i], words[j] = words[j], words[i]
    kept = [i for i in range(len(words)) if draw.random() >= block.delete] or [draw.randrange(len(words))]
    after = [(words[i], gaps[i + 1]) for i in kept]
    for word in [word for word, _ in after if draw.random() < block.insert]:
        after.insert(draw.randint(0, len(after)), (_synonym(word, draw, synonyms), " "))
    after = [(word, gap or " ") for word, gap in after[:-1]] + [(after[-1][0], gaps[-1])]
    return gaps[0] + "".join(word + gap for word, gap in after)


def _synonym(word: str, draw: Random, synonyms: Synonyms) -> str:
    """A synonym with the word's own capital and punctuation; the word itself where it has none."""
    inner = word.strip(".,;:!?\"'()[]{}")
    others = synonyms.get(inner.lower())
    if not inner or not others:
        return word
    other = draw.choice(others)
    return word.replace(inner, other.capitalize() if inner[0].isupper() else other, 1)
