"""Rows to token ids: what each kind of row is to the renderer.

A conversation goes through the model's chat template, running text stays as it is, a preference is its prompt and its
better answer. Pure; which tokens are trained, `service/render.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.config import RunConfig, read_text
from service.data.rows import Content, Conversation, Extraction, Labelled, Preference, Row, Tagged, Text
from service.errors import DataError, ModelError
from service.render import Example, Rendered, Renderer, TrainOn, load_renderer

# What is answered to a question whose context has no answer: as FLAN words SQuAD 2, arXiv:2109.01652.
UNANSWERABLE = "unanswerable"
_NO_CONVERSATION = (
    "words with tags are no conversation, and sft trains on conversations and text. "
    "Give data.columns that name a prompt and an answer, or another file."
)


def renderer_for(config: RunConfig, directory: Path) -> Renderer:
    """The renderer of a run, for a model in `directory`: its own template, or the one that the config names."""
    template = config.model.chat_template
    return load_renderer(directory, read_text(template, "model.chat_template", "Jinja") if template else None)


def examples_of(row: Row, renderer: Renderer, train_on: TrainOn = "responses") -> list[Example]:
    """The examples of a row for supervised fine-tuning. Raises DataError, ModelError."""
    (rendered,) = examples_of_rows([row], renderer, train_on)
    if isinstance(rendered, (DataError, ModelError)):
        raise rendered
    return rendered


def examples_of_rows(rows: Sequence[Row], renderer: Renderer, train_on: TrainOn = "responses") -> list[Rendered]:
    """`examples_of` many rows, tokenised together; in the place of a row that cannot be rendered stands the error."""
    rendered: list[Rendered] = [DataError(_NO_CONVERSATION)] * len(rows)
    chats = {i: chat for i, row in enumerate(rows) if (chat := conversation(row.content))}
    texts = {i: row.content.text for i, row in enumerate(rows) if isinstance(row.content, Text)}
    both = renderer.examples_batch([(chat.messages, chat.tools) for chat in chats.values()], train_on)
    for i, examples in zip(chats, both, strict=True):
        rendered[i] = examples
    for i, example in zip(texts, renderer.texts(list(texts.values())), strict=True):
        rendered[i] = [example]
    return rendered


def conversation(content: Content) -> Conversation | None:
    """What is said in a row, as turns; None for running text and for words with tags, where nobody answers.

    A preference's better answer is the one to learn; a label is the answer to its text, a span the one to its question.
    """
    if isinstance(content, Conversation):
        return content
    if isinstance(content, Preference):
        return Conversation((*content.prompt, *content.chosen))
    if isinstance(content, Labelled):
        return _question(content.text if content.pair is None else f"{content.text}\n\n{content.pair}", content.label)
    if isinstance(content, Extraction):
        answer = content.answers[0].text if content.answers else UNANSWERABLE
        return _question(f"{content.context}\n\n{content.question}", answer)
    return None


def pair_of(preference: Preference, renderer: Renderer) -> tuple[list[Example], list[Example]]:
    """The examples of the better and of the worse answer to a prompt, only the answers trained."""
    silent = tuple({**message, "train": False} for message in preference.prompt)
    answers = [((*silent, *answer), ()) for answer in (preference.chosen, preference.rejected)]
    chosen, rejected = (renderer.examples(*answer) for answer in answers)
    return chosen, rejected


@dataclass(frozen=True)
class Words:
    """Token ids of a row of words, and for each word the index of its first sub-word's id: that is where its tag belongs."""

    ids: list[int]
    starts: list[int]


def words_of(tagged: Tagged, tokenizer: Any) -> Words:
    """The words of a row as ids, special tokens included. Raises DataError that names the words without a token."""
    encoded = tokenizer(list(tagged.tokens), is_split_into_words=True)
    first: dict[int, int] = {}
    for index, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, index)
    lost = [f"{i} ({word!r})" for i, word in enumerate(tagged.tokens) if i not in first]
    if lost:
        raise DataError(
            f"the tokenizer has no token for the word(s) {', '.join(lost[:10])}, so their tags have no place."
        )
    return Words(list(encoded["input_ids"]), [first[i] for i in range(len(tagged.tokens))])


def _question(text: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": answer}))
