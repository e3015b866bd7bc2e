"""Prompts to ids: what cannot fit is refused before it is read, and a short prompt does not wait for a long one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.prompts import LONG_CHARS, Prompts
from service.errors import RequestError
from service.render import Message, Renderer, Tool
from tests.integration import tiny

CONTEXT = 50_000  # tokens
DEADLINE_S = 20.0


class Gated(Renderer):
    """Reads a long conversation only when the test lets it."""

    gate = threading.Event()
    num_read = 0

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        Gated.num_read += 1
        assert len(messages[0]["content"]) <= LONG_CHARS or self.gate.wait(DEADLINE_S)
        return super().prompt_ids(messages, tools)


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    Gated.gate.clear()
    Gated.num_read = 0
    tokenizer = tiny.save_tokenizer(tmp_path)
    short, long = (Gated(tokenizer, frozenset({tokenizer.eos_token_id})) for _ in range(2))
    return Prompts(short, long, CONTEXT)


def _conversation(num_chars: int) -> tuple[Message, ...]:
    return ({"role": "user", "content": "a" * num_chars},)


def test_a_short_prompt_is_read_while_long_ones_are(prompts: Prompts) -> None:
    async def body() -> None:
        long = [asyncio.create_task(prompts.ids(_conversation(LONG_CHARS + 1), "messages")) for _ in range(4)]
        async with asyncio.timeout(DEADLINE_S):
            short = await prompts.ids(_conversation(3), "messages")
        assert not any(task.done() for task in long)
        Gated.gate.set()
        lengths = [len(ids) for ids in await asyncio.gather(*long)]
        assert lengths == [len(short) - 3 + LONG_CHARS + 1] * 4

    asyncio.run(body())


def test_more_characters_than_the_context_can_hold_are_refused_unread(prompts: Prompts) -> None:
    longest = len("<|im_start|>")
    assert prompts._longest_token == longest
    for prompt in ("a" * (CONTEXT * longest + 1), _conversation(CONTEXT * longest + 1)):
        with pytest.raises(
            RequestError, match=f"{CONTEXT * longest + 1} characters are more than the {CONTEXT} tokens"
        ):
            asyncio.run(prompts.ids(prompt, "prompt"))
    assert Gated.num_read == 0


def test_token_ids_are_taken_as_they_are(prompts: Prompts) -> None:
    assert asyncio.run(prompts.ids((5, 6, 7), "prompt")) == (5, 6, 7)
