"""What makes two rows the same: exactly, but for case and white space, or nearly, by MinHash over shingles of characters.

The one place that knows rensa. Deterministic: the seed is fixed. From where two texts are near, `thresholds.py` says.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rensa import RMinHash, RMinHashDeduplicator

from service.data import thresholds as at
from service.data.rows import Content, Conversation, Extraction, Labelled, Preference, Tagged, Text
from service.render import Message

_SEED = 1


def normalised(text: str) -> str:
    """What counts of a text when it is compared: without case, and with one space for any white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Parts:
    """A row as it is compared: what is asked, what is answered, and what else makes it another row (system, tools)."""

    prompt: str
    answer: str
    rest: str

    @property
    def identity(self) -> int:
        """64 bits that rows share which are the same; of 10^7 different ones two share them once in 370 000 times."""
        return _hash(f"{self.rest}\0{self.prompt}\0{self.answer}")

    @property
    def prompt_hash(self) -> int:
        """64 bits that rows share which ask the same."""
        return _hash(self.prompt)

    @property
    def text(self) -> str:
        """All that two near duplicates have nearly alike. A system prompt that all rows share is no likeness."""
        return f"{self.prompt} {self.answer}"


def parts_of(content: Content) -> Parts:
    """The parts of a row, normalised. Running text is all prompt: it is what must not stand in the evaluation data too."""
    if isinstance(content, Conversation):
        last = max((i for i, turn in enumerate(content.messages) if turn["role"] == "assistant"), default=-1)
        asked = [turn for turn in content.messages[:last] if turn["role"] != "system"]
        system = [turn for turn in content.messages if turn["role"] == "system"]
        rest = _joined(system) + (json.dumps(content.tools, sort_keys=True, default=dict) if content.tools else "")
        return Parts(_joined(asked), _joined(content.messages[last : last + 1]), rest)
    if isinstance(content, Preference):
        answers = f"{_joined(content.chosen)}\0{_joined(content.rejected)}"
        return Parts(_joined([turn for turn in content.prompt if turn["role"] != "system"]), answers, "")
    if isinstance(content, Text):
        return Parts(normalised(content.text), "", "")
    if isinstance(content, Labelled):
        return Parts(normalised(f"{content.text}\n{content.pair or ''}"), normalised(content.label), "")
    if isinstance(content, Tagged):
        return Parts(normalised(" ".join(content.tokens)), " ".join(content.tags), "")
    assert isinstance(content, Extraction)
    answers = "\0".join(answer.text for answer in content.answers)
    return Parts(normalised(f"{content.context}\n{content.question}"), normalised(answers), "")


class NearTexts:
    """Texts by number, each with a note of what else must be equal. About 3.7 kB a text."""

    def __init__(self) -> None:
        self._index = RMinHashDeduplicator(at.NEAR, at.NUM_PERM, use_lsh=True, num_bands=at.NUM_BANDS, seed=_SEED)
        self._kept: dict[str, tuple[int, int, str]] = {}  # by its number: number, length, note

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, text: str, note: str = "") -> int | None:
        """The number of a kept text that is nearly this one, the first of them; None without any."""
        return self._found(_signature(text), len(text), note)

    def keep(self, number: int, text: str, note: str = "") -> int | None:
        """`find`, and where there is none the text is kept."""
        signature = _signature(text)
        found = self._found(signature, len(text), note)
        if found is None:
            self._index.add(str(number), signature)
            self._kept[str(number)] = (number, len(text), note)
        return found

    def _found(self, signature: RMinHash, length: int, note: str) -> int | None:
        candidates = (self._kept[key] for key in self._index.get_duplicates(signature))
        near = [n for n, size, other in candidates if other == note and at.NEAR * size <= length <= size / at.NEAR]
        return min(near, default=None)


def _joined(turns: Sequence[Message]) -> str:
    """Turns as one text; a turn's role is part of it where there is more than one."""
    told = [normalised(f"{turn.get('content') or ''}{_calls(turn)}") for turn in turns]
    if len(told) < 2:
        return "".join(told)
    return "\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, told, strict=True))


def _calls(turn: Message) -> str:
    calls = turn.get("tool_calls")
    return " " + json.dumps(calls, sort_keys=True, ensure_ascii=False) if calls else ""


def _signature(text: str) -> RMinHash:
    head = text[: at.NEAR_CHARS]
    signature = RMinHash(at.NUM_PERM, _SEED)
    signature.update({head[i : i + at.SHINGLE_CHARS] for i in range(max(1, len(head) - at.SHINGLE_CHARS + 1))})
    return signature


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
