"""Messages to token ids and back to what is trained: pure, and the same for trainer, evaluation and server.

The mask comes from the *rendered difference*: what the chat template adds when an assistant's turn is appended is what the
model is trained to write, up to and including its end-of-turn token. No template keyword is needed. A prompt is tokenised
exactly as it will be served, with as many BOS as the template gives. The digest stands in every model's manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from service.errors import DataError, ModelError

Tool = Mapping[str, Any]  # OpenAI's shape of a function
Message = dict[str, Any]  # role, content; tool_calls, tool_call_id, name; train: whether this turn is learnt
Chat = tuple[Sequence[Message], Sequence[Tool]]  # a conversation, and the tools that the assistant may call
TrainOn = Literal["responses", "all", "last"]
T = TypeVar("T")
RENDERER_VERSION = 1
ROLES = ("system", "user", "assistant")
# A template that asks for the day gets this one, which Llama's own have where they are told none: what is trained today is
# what is served tomorrow.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
_ASKS_THE_DAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether its prediction is trained. `mask[i]` belongs to `ids[i]`, the predicted token.

    The first token is never trained, BOS or not: nothing stands before it.
    """

    ids: list[int]
    mask: list[bool]


Rendered = list[Example] | DataError | ModelError


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn as text: the prompt before it, and what the template adds for it, up to its end-of-turn token.

    The prompt is in pieces whose ids, one piece after the other, are the ids of the whole.
    """

    prompt: tuple[str, ...]
    answer: str
    trained: bool

    @property
    def whole(self) -> str:
        """Prompt and answer."""
        return "".join((*self.prompt, self.answer))


@dataclass(frozen=True)
class _Tokens:
    """The same as ids."""

    prompt: list[int]
    answer: list[int]
    trained: bool

    @property
    def whole(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer


class Renderer:
    """A tokenizer with its chat template and the ids that end a turn."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._ends = {str(tokenizer.decode([token])) for token in stop_ids} - {""}
        self._separable = _is_separable(tokenizer, stop_ids)
        self.digest = _digest(tokenizer, stop_ids, self._separable)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids after which the model answers: all messages, then the template's opening of an assistant's turn."""
        return self._tokenised([self._text(messages, tools, opening=True)])[0]

    def examples(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), train_on: TrainOn = "responses"
    ) -> list[Example]:
        """One Example that trains all that `train_on` says; or one a turn, where the template rewrites earlier turns.

        responses: every assistant turn that does not say `train: false`, each to its end-of-turn token; what stands after
        the last of them is left out. last: the last assistant turn. all: every token up to the end of the last assistant
        turn, but the first token and the assistant turns that say `train: false`; always one Example.

        Raises DataError where nothing would be trained, ModelError where the template closes a turn with no end token.
        """
        (rendered,) = self.examples_batch([(messages, tools)], train_on)
        if isinstance(rendered, (DataError, ModelError)):
            raise rendered
        return rendered

    def examples_batch(self, chats: Sequence[Chat], train_on: TrainOn = "responses") -> list[Rendered]:
        """`examples` of many conversations, tokenised together; in the place of one that cannot be rendered, the error."""
        rendered = [_attempt(self._turns, *chat, train_on) for chat in chats]
        texts = {text: None for turns in rendered if isinstance(turns, list) for text in self._texts(turns)}
        ids = dict(zip(texts, self._tokenised(list(texts)), strict=True))

        def examples(turns: list[_Turn]) -> list[Example]:
            return _examples([self._tokens(turn, ids) for turn in turns], train_on)

        return [_attempt(examples, turns) if isinstance(turns, list) else turns for turns in rendered]

    def text(self, text: str) -> Example:
        """Running text: the ids that the tokenizer gives with its own special tokens, and EOS; all but the first trained."""
        (example,) = self.texts([text])
        return example

    def texts(self, texts: Sequence[str]) -> list[Example]:
        """`text` of many texts, tokenised together. Raises ModelError where the tokenizer names no EOS."""
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                "the tokenizer names no end-of-sequence token, so a text would have no end. Set eos_token."
            )
        whole = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in self._tokenised(texts, special=True)]
        return [_masked(ids, (), others=True) for ids in whole]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _turns(self, messages: Sequence[Message], tools: Sequence[Tool], train_on: TrainOn) -> list[_Turn]:
        """The assistant's turns that decide the mask, the last of them at the end."""
        chosen = _chosen(messages, train_on)
        texts = [self._turn(messages[: i + 1], tools) for i in chosen]
        trained = [messages[i].get("train") is not False for i in chosen]
        prompts = self._pieces(texts)
        return [_Turn(prompt, answer, t) for prompt, (_, answer), t in zip(prompts, texts, trained, strict=True)]

    def _turn(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[str, str]:
        """The prompt of the last message, an assistant's, and what the template adds for it, up to its end-of-turn token."""
        prompt = self._text(messages[:-1], tools, opening=True)
        whole = self._text(messages, tools, opening=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "the chat template renders the answer differently from the prompt that asks for it: the prompt ends in "
                f"{prompt[-40:]!r}, the conversation has {whole[max(0, len(prompt) - 40) :][:60]!r}. "
                "Give a template by model.chat_template whose add_generation_prompt is a prefix of the answer."
            )
        answer = whole[len(prompt) :]
        end = max((answer.rfind(text) + len(text) for text in self._ends if text in answer), default=0)
        if not end:
            raise self._no_end()
        return prompt, answer[:end]

    def _pieces(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
        """The prompts of (prompt, answer)s, cut after each earlier turn's end token where they go on from there.

        No token reaches across such a cut, and many turns are tokenised in the time of one.
        """
        grows = all(later.startswith(prompt + answer) for (prompt, answer), (later, _) in pairwise(turns))
        if not (grows and self._separable):
            return [(prompt,) for prompt, _ in turns]
        starts = [0, *(len(prompt) + len(answer) for prompt, answer in turns[:-1])]
        before = [turns[-1][0][start:end] for start, end in pairwise(starts)]
        return [(*before[:i], prompt[starts[i] :]) for i, (prompt, _) in enumerate(turns)]

    def _texts(self, turns: Sequence[_Turn]) -> list[str]:
        """What is to be tokenised for these turns."""
        answers = (turn.answer if self._separable else turn.whole for turn in turns)
        return [*chain.from_iterable(turn.prompt for turn in turns), *answers]

    def _tokens(self, turn: _Turn, ids: Mapping[str, list[int]]) -> _Tokens:
        """A turn by the ids of `_texts`. The prompt's are as they are served; the answer's as they follow it, or apart."""
        prompt = list(chain.from_iterable(ids[piece] for piece in turn.prompt))
        if self._separable:
            answer = ids[turn.answer]
        else:
            whole = ids[turn.whole]
            follows = whole[: len(prompt)] == prompt  # not so where a token reaches from the prompt into the answer
            answer = whole[len(prompt) :] if follows else self._tokenised([turn.answer])[0]
        end = next((i for i in range(len(answer), 0, -1) if answer[i - 1] in self.stop_ids), 0)
        if not end:
            raise self._no_end()
        return _Tokens(prompt, answer[:end], turn.trained)

    def _no_end(self) -> ModelError:
        return ModelError(
            f"the chat template closes no assistant turn with one of the model's end tokens {sorted(self.stop_ids)}: "
            "the tuned model would never stop. Give a template by model.chat_template that does."
        )

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], *, opening: bool) -> str:
        from jinja2.exceptions import TemplateError

        if not messages:
            raise DataError(
                "no message stands before the assistant's, so there is nothing to answer. "
                "Add the user's, or set train: false on the assistant's."
            )
        given = [
            {key: value for key, value in message.items() if key != "train"} if "train" in message else message
            for message in messages
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                given, list(tools) or None, tokenize=False, add_generation_prompt=opening
            )
        except (TemplateError, TypeError) as error:  # a TypeError is the template's: a text where it wants a list
            raise DataError(f"the chat template refuses these messages: {str(error)!r}") from None
        return str(text)

    def _tokenised(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each text; with `special`, with the BOS and what else the tokenizer puts around a text by itself."""
        inner = self.tokenizer.backend_tokenizer
        if inner.padding:  # somebody else's last call may have left them
            inner.no_padding()
        if inner.truncation:
            inner.no_truncation()
        return [encoding.ids for encoding in inner.encode_batch_fast(list(texts), add_special_tokens=special)]


def _chosen(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Which messages decide the mask: the trained turns, or for `all` those that are not; and so does the last."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError("no message has the role assistant, so nothing would be trained. Add the answer.")
    silent = [i for i in turns if messages[i].get("train") is False]
    if train_on == "all":
        return sorted({*silent, turns[-1]})
    trained = [i for i in (turns if train_on == "responses" else turns[-1:]) if i not in silent]
    if not trained:
        which = "every assistant turn says" if train_on == "responses" else "the last assistant turn says"
        raise DataError(f"{which} train: false, so nothing would be trained. Train one, or leave the row out.")
    return trained


def _examples(turns: Sequence[_Tokens], train_on: TrainOn) -> list[Example]:
    """One Example of all turns where each goes on from the one before, else one a turn."""
    last = turns[-1].whole
    if all(last[: len(turn.prompt) + len(turn.answer)] == turn.whole for turn in turns[:-1]):
        return [_masked(last, turns, others=train_on == "all")]
    if train_on == "all":
        raise DataError(
            "the chat template rewrites earlier turns, so one that says train: false has no place in the whole. "
            "Set data.train_on: responses."
        )
    return [_masked(turn.whole, [turn], others=False) for turn in turns]


def _masked(ids: list[int], turns: Sequence[_Tokens], *, others: bool) -> Example:
    """`ids` with the answers of `turns` trained or not as they say, and all `others` so."""
    mask = [others] * len(ids)
    for turn in turns:
        start, end = len(turn.prompt), len(turn.prompt) + len(turn.answer)
        mask[start:end] = [turn.trained] * len(turn.answer)
    mask[0] = False
    return Example(ids, mask)


def _attempt(function: Callable[..., T], *arguments: Any) -> T | DataError | ModelError:
    """The result, or in its place the error of this one conversation."""
    try:
        return function(*arguments)
    except (DataError, ModelError) as error:
        return error


def load_renderer(path: Path, chat_template: str | None = None) -> Renderer:
    """The renderer of a model directory. `chat_template` is the text of a template to use instead of the model's own.

    Raises ModelError when there is no template or no end-of-turn token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {path} has no chat template. Set model.chat_template to the path of a Jinja template."
        )
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = _ASKS_THE_DAY.sub(_the_day, tokenizer.chat_template)
    stop_ids = _stop_ids(path, tokenizer)
    if not stop_ids:
        raise ModelError(
            f"neither the tokenizer nor generation_config.json in {path} names an end-of-sequence token. Set eos_token."
        )
    return Renderer(tokenizer, stop_ids)


def _the_day(asked: re.Match[str]) -> str:
    return json.dumps(_TODAY.strftime(asked["format"]))


def _stop_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's EOS and all that generation_config.json lists: chat models often end a turn with another one."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    file = path / "generation_config.json"
    if file.is_file():
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file} is no JSON object: {error}. Save it again, or remove it.") from error
        ids.update(named if isinstance(named, list) else [named] if named is not None else [])
    return frozenset(ids)


def _is_separable(tokenizer: Any, stop_ids: frozenset[int]) -> bool:
    """Whether a text's ids are those of its parts, when it is cut before a word, or after a token that ends a turn.

    Tokenizers made of SentencePiece models often put a space before every text, and then they are not; some end tokens
    take in the space that follows.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if not stop_ids <= set(tokenizer.added_tokens_decoder):
        return False  # an end token that is an ordinary word may be part of a longer one
    ends = [str(tokenizer.decode([token])) for token in stop_ids]
    cuts = [("\n", "word"), ("word", " word"), *((end, text) for end in ends for text in ("word", "\nword", " word"))]
    return all(ids(before + after) == ids(before) + ids(after) for before, after in cuts)


def _digest(tokenizer: Any, stop_ids: frozenset[int], separable: bool) -> str:
    """sha256 over all that decides which ids a conversation becomes."""
    parts = {
        "version": RENDERER_VERSION,
        "template": tokenizer.chat_template,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "stop_ids": sorted(stop_ids),
    } | ({} if separable else {"answers": "in their place"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
