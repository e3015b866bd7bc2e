"""One row of data as a value: what every format is read into, and what the renderer, the checkup and the splits look at.

    Row(7, Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},)))

Pure: how rows come out of files is in `files.py` and `formats.py`, how they become tokens in `service/render.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.render import Message


@dataclass(frozen=True)
class Conversation:
    """Turns, and the tools that the assistant may call (OpenAI's shape of a function). What is trained, the renderer says."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """Running text, all of it learnt."""

    text: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and its class."""

    text: str
    label: str
    pair: str | None = None


@dataclass(frozen=True)
class Tagged:
    """Words, and a tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A span of a context: `context[start:start + len(text)] == text`."""

    text: str
    start: int


@dataclass(frozen=True)
class Extraction:
    """A question about a context, and the spans that answer it; none: it has no answer there."""

    context: str
    question: str
    answers: tuple[Answer, ...]


Content = Conversation | Text | Preference | Labelled | Tagged | Extraction


@dataclass(frozen=True)
class Row:
    """One row: its number in its source, from 1; what it holds; and its other columns, for splits, curricula and filters."""

    number: int
    content: Content
    fields: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""  # of a source of several files, the one it stands in, and `number` counts through all of them
    fixed: tuple[str, ...] = ()  # of a user's turn made by a prompt template, the template's text between its columns

    def value(self, name: str) -> Any:
        """What a user calls the row's field `name`: another column, or the label of a labelled text; None without one."""
        known = {"label": self.content.label} if isinstance(self.content, Labelled) else {}
        return self.fields.get(name, known.get(name))

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of a conversation. Only of a conversation."""
        assert isinstance(self.content, Conversation), "only a conversation has turns"
        return self.content.messages

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """What the assistant of a conversation may call. Only of a conversation."""
        assert isinstance(self.content, Conversation), "only a conversation has tools"
        return self.content.tools

    def prompt(self) -> tuple[Message, ...]:
        """All messages before the last assistant's turn."""
        return self.messages[: self._last_answer()]

    def reference(self) -> str:
        """The last assistant's turn: what a perfect model would answer to `prompt()`."""
        return str(self.messages[self._last_answer()]["content"])

    def _last_answer(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class Problem:
    """Why a row could not be read, in place of the Row: a line for a user, with the field, the value and the remedy."""

    number: int
    text: str
    file: str = ""
    line: bytes = field(default=b"", repr=False, compare=False)  # what stands there, where it is text that is no row


def said(content: Content) -> str:
    """What is asked and answered, whose language is the row's: system prompts are often the same, and in English."""
    if isinstance(content, Conversation):
        return "\n".join(str(turn.get("content") or "") for turn in content.messages if turn["role"] != "system")
    return "\n".join(text for _, text in texts(content))


def texts(content: Content) -> Iterator[tuple[str, str]]:
    """Every text of a row with the name of its field, as a user knows it: `messages[1].content`."""
    if isinstance(content, Conversation):
        for index, message in enumerate(content.messages):
            yield f"messages[{index}].content", str(message.get("content") or "")
    elif isinstance(content, Text):
        yield "text", content.text
    elif isinstance(content, Preference):
        for name, turns in (("prompt", content.prompt), ("chosen", content.chosen), ("rejected", content.rejected)):
            yield name, "\n".join(str(turn.get("content") or "") for turn in turns)
    elif isinstance(content, Labelled):
        yield "text", content.text
        if content.pair is not None:
            yield "pair", content.pair
    elif isinstance(content, Tagged):
        yield "tokens", " ".join(content.tokens)
    else:
        yield "context", content.context
        yield "question", content.question


def fingerprint(content: Content) -> bytes:
    """Eight bytes that equal contents share, wherever they stand; of 10^7 different ones two are the same once in 10^5 times."""
    text = json.dumps([type(content).__name__, vars(content)], default=vars, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
