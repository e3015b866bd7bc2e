"""One row as training sees it: its tokens, which of them are trained, and the special ones, for a terminal or as JSON.

What is shown is what `prepare` stores: both ask `rendered.py`. Text of a data file never reaches the terminal as it is:
`visible` writes control characters out, so that a row cannot move the cursor or hide what it says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.text import Text
from tokenizers.decoders import DecodeStream

from service.config import ReadingBlock
from service.data import formats
from service.data.files import Source, open_source, read_piece
from service.data.records import Record
from service.data.rows import Problem, Row
from service.errors import NotFoundError
from service.render import Example

STYLES = {  # by (trained, special)
    (False, False): "",
    (False, True): "bold magenta",
    (True, False): "black on green",
    (True, True): "bold black on bright_green",
}
BRACKETS = ("⟦", "⟧")  # around what is trained, where there are no colours


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are alike."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Counts:
    """Tokens of an example."""

    tokens: int
    trained: int
    special: int


def find_row(uri: str, number: int, reading: ReadingBlock) -> Row:
    """One row of a data file. Raises DataError where it cannot be read, NotFoundError where there is none of that number."""
    source = open_source(uri)
    entry = _entry(source, number)
    if entry is None:
        last = max(found.number for found in read_piece(source.pieces[-1]))
        hint = f"its last one is {last}" if number > last else "that line is empty"
        raise NotFoundError(f"{uri} has no row {number}: {hint}. Give another number.")
    records = (found for found in source.records() if isinstance(found, Record))
    if isinstance(entry, Record):
        parsed = formats.parse(entry, formats.detect(records, reading, uri), reading)
    else:
        parsed = [entry]
    if isinstance(parsed, list):
        formats.raise_problems(parsed, uri)
    assert isinstance(parsed, Row), "problems were raised"
    return parsed


def _entry(source: Source, number: int) -> Record | Problem | None:
    begun = [piece for piece in source.pieces if piece.first <= number]
    return next((entry for entry in read_piece(begun[-1]) if entry.number == number), None)


def spans(example: Example, tokenizer: Any) -> list[Span]:
    """The text of an example's tokens, special tokens too. A character of several tokens stands with the last of them."""
    special = _special_ids(tokenizer)
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    pieces = [
        (stream.step(backend, token) or "", trained, token in special)
        for token, trained in zip(example.ids, example.mask, strict=True)
    ]
    grouped = groupby(pieces, key=lambda piece: piece[1:])
    return [Span("".join(text for text, *_ in group), *alike) for alike, group in grouped]


def counts(example: Example, tokenizer: Any) -> Counts:
    """How many tokens there are, and of which kind."""
    special = _special_ids(tokenizer)
    return Counts(len(example.ids), sum(example.mask), sum(token in special for token in example.ids))


def visible(text: str) -> str:
    r"""The text with what a terminal would obey, or not show, written out: ESC is \x1b, and a line ends in ↵."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char == "\n":
        return "↵\n"
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def tokens_shown(example: Example, tokenizer: Any, *, colours: bool) -> Text:
    """The example for a terminal: what is trained on green, or in brackets where there are no colours."""
    shown = Text()
    for trained, alike in groupby(spans(example, tokenizer), key=lambda span: span.trained):
        before, after = BRACKETS if trained and not colours else ("", "")
        shown.append(before)
        for span in alike:
            shown.append(visible(span.text), STYLES[span.trained, span.special] if colours else "")
        shown.append(after)
    return shown


def legend(example: Example, tokenizer: Any, *, colours: bool) -> Text:
    """What the colours mean, and how many tokens of each kind there are."""
    number = counts(example, tokenizer)
    trained, special = (" trained ", "special") if colours else ("trained".join(BRACKETS), "special")
    share = f"{number.trained:,} of {number.tokens:,} tokens ({number.trained / number.tokens:.0%})"
    styles = (STYLES[True, False], STYLES[False, True]) if colours else ("", "")
    return Text.assemble((trained, styles[0]), f" {share}   ", (special, styles[1]), f" {number.special:,}")


def as_json(example: Example, tokenizer: Any) -> dict[str, Any]:
    """The example for machines; tokens as the vocabulary writes them."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    return {"ids": example.ids, "tokens": tokens, "mask": example.mask, "counts": asdict(counts(example, tokenizer))}


def _special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no words of a text: the tokenizer's special ones, and those that were added to it."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
