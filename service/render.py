"""Messages to token ids and back to what is trained: pure, and the same for trainer, evaluation and server.

The mask comes from the *rendered difference*: what the chat template adds when an assistant's turn is appended is what the
model is trained to write, up to and including its end-of-turn token. No template keyword is needed. A prompt is tokenised
exactly as it will be served, with as many BOS as the template gives. The digest stands in every model's manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from service.errors import DataError, ModelError

Tool = Mapping[str, Any]  # OpenAI's shape of a function
Message = dict[str, Any]  # role, content; tool_calls, tool_call_id, name; train: whether this turn is learnt
TrainOn = Literal["responses", "all", "last"]
RENDERER_VERSION = 1
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether its prediction is trained. `mask[i]` belongs to `ids[i]`, the predicted token."""

    ids: list[int]
    mask: list[bool]


Chat = tuple[Sequence[Message], Sequence[Tool]]  # a conversation and the tools that the assistant may call


class Renderer:
    """A tokenizer with its chat template and the ids that end a turn."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.digest = _digest(tokenizer, stop_ids)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids after which the model answers: all messages, then the template's opening of an assistant's turn."""
        return self._tokenised(self._text(messages, tools, opening=True))

    def examples(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), train_on: TrainOn = "responses"
    ) -> list[Example]:
        """One Example that trains every assistant turn; or one a turn, where the template rewrites earlier turns.

        Raises DataError when there is no assistant turn, or a turn has no end-of-turn token.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError("no message has the role assistant, so nothing would be trained. Add the answer.")
        rendered = [self._turn(messages[: i + 1], tools) for i in turns]
        last = rendered[-1].ids
        if all(last[: len(example.ids)] == example.ids for example in rendered):
            mask = [False] * len(last)
            for example in rendered:
                mask[: len(example.mask)] = [a or b for a, b in zip(mask, example.mask, strict=False)]
            return [Example(last, mask)]
        return rendered

    def examples_batch(
        self, chats: Sequence[Chat], train_on: TrainOn = "responses"
    ) -> list[list[Example] | DataError | ModelError]:
        """`examples` of many conversations, tokenised together; in the place of one that cannot be rendered, the error."""
        return [self._examples_or_error(chat, train_on) for chat in chats]

    def _examples_or_error(self, chat: Chat, train_on: TrainOn) -> list[Example] | DataError | ModelError:
        try:
            return self.examples(*chat, train_on)
        except (DataError, ModelError) as error:
            return error

    def text(self, text: str) -> Example:
        """Running text: the ids that the tokenizer gives with its own special tokens, then EOS; all but the first trained."""
        (example,) = self.texts([text])
        return example

    def texts(self, texts: Sequence[str]) -> list[Example]:
        """`text` of many texts, tokenised together."""
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        rows = [[*ids, eos] for ids in self.tokenizer(list(texts))["input_ids"]]
        return [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _turn(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Example:
        """The conversation up to one assistant turn, only that turn trained, cut after its end-of-turn token."""
        prompt_text = self._text(messages[:-1], tools, opening=True)
        whole_text = self._text(messages, tools, opening=False)
        if not whole_text.startswith(prompt_text):
            raise ModelError(
                "the chat template renders the answer differently from the prompt that asks for it: the prompt ends in "
                f"{prompt_text[-40:]!r}, the conversation has {whole_text[max(0, len(prompt_text) - 40) :][:60]!r}. "
                "Give a template by model.chat_template whose add_generation_prompt is a prefix of the answer."
            )
        prompt = self._tokenised(prompt_text)
        answer = self._tokenised(whole_text[len(prompt_text) :])
        ends = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if not ends:
            raise ModelError(
                f"the chat template closes no assistant turn with one of the model's end tokens {sorted(self.stop_ids)}: "
                "the tuned model would never stop. Give a template by model.chat_template that does."
            )
        answer = answer[: ends[-1] + 1]
        return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], *, opening: bool) -> str:
        from jinja2.exceptions import TemplateError

        if not messages:
            raise DataError("no message stands before the assistant's, so there is nothing to answer. Add the user's.")

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), list(tools) or None, tokenize=False, add_generation_prompt=opening
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None
        return str(text)

    def _tokenised(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


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
    stop_ids = _stop_ids(path, tokenizer)
    if not stop_ids:
        raise ModelError(
            f"neither the tokenizer nor generation_config.json in {path} names an end-of-sequence token. Set eos_token."
        )
    return Renderer(tokenizer, stop_ids)


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


def _digest(tokenizer: Any, stop_ids: frozenset[int]) -> str:
    """sha256 over all that decides which ids a conversation becomes."""
    parts = {
        "version": RENDERER_VERSION,
        "template": tokenizer.chat_template,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "stop_ids": sorted(stop_ids),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
