"""Prompts to token ids on a replica: a short one never waits for a long one, and one that cannot fit is refused unread.

A tokenizer is not to be used by two threads at once: there are two of them, one for prompts of more than LONG_CHARS. A
megabyte was seen to take about a second.
"""

from __future__ import annotations

import asyncio
from typing import Any

from serve.openai_api import Prompt
from service.errors import DataError, RequestError
from service.render import Renderer

LONG_CHARS = 32_768


class Prompts:
    """The prompts of one replica, whose model has a context of `max_context` tokens. Belongs to one event loop."""

    def __init__(self, short: Renderer, long: Renderer, max_context: int) -> None:
        self._short, self._long = short, long
        self._reading = {id(renderer): asyncio.Lock() for renderer in (self._short, self._long)}
        self._max_context = max_context
        self._longest_token = max(map(len, self._short.tokenizer.get_vocab()))  # characters; of bytes at least as many

    async def ids(self, prompt: Prompt, field: str) -> tuple[int, ...]:
        """A conversation through the template; a text with the special tokens its tokenizer adds; token ids as they are.

        RequestError: there are more characters than any text of `max_context` tokens has, or the template refuses it.
        """
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return prompt
        num_chars = _num_chars(prompt)
        most = self._max_context * self._longest_token
        if num_chars > most:
            raise RequestError(
                f"{field}: {num_chars} characters are more than the {self._max_context} tokens of this endpoint's context "
                f"can hold, which is {most} at most, the answer included. Shorten it.",
                field,
            )
        renderer = self._long if num_chars > LONG_CHARS else self._short
        try:
            async with self._reading[id(renderer)]:
                return await asyncio.to_thread(_ids, renderer, prompt)
        except DataError as error:
            raise RequestError(f"{field}: {error}", field) from None


def _ids(renderer: Renderer, prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(renderer.tokenizer(prompt)["input_ids"])
    return tuple(renderer.prompt_ids(prompt))


def _num_chars(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
