"""From parts to bodies and events: texts, log-probabilities where they belong, tokens counted once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from serve.openai_answers import Answer
from serve.openai_api import Ask, parse_text
from serve.parts import Part, Scored, Started

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # importing ray.serve 2.60
ASK = parse_text(json.dumps({"model": "m", "prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 2}).encode())
ANSWER = Answer("cmpl-1", 5, "m", "d", is_chat=False)
SCORES = (Scored("He", None), Scored("llo", -1.0), Scored(" you", -2.0))
PARTS = [Part(0, "Hello"), Part(0, " you", 1, scored=SCORES), Part(0, "!", 1, "length", scored=(Scored("!", -3.0),))]


class Stream:
    """Parts that are there already."""

    def __init__(self, *parts: Part) -> None:
        self.parts, self.cancelled = parts, False

    async def __aiter__(self) -> AsyncIterator[Part]:
        for part in self.parts:
            yield part

    def cancel(self) -> None:
        self.cancelled = True


def _whole(ask: Ask, started: Started, *parts: Part) -> dict[str, Any]:
    from serve.chunks import completion

    return asyncio.run(completion(Stream(*parts), ask, ANSWER, started))


def _streamed(ask: Ask, started: Started, *parts: Part) -> list[dict[str, Any]]:
    from serve.chunks import events

    async def read() -> list[str]:
        return [one async for one in events(Stream(*parts), replace(ask, stream=True), ANSWER, started)]

    found = [line.removeprefix("data: ").strip() for line in asyncio.run(read())]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def test_an_echoed_prompt_has_the_same_offsets_streamed_and_whole() -> None:
    started = Started("m", "d", 2)
    choice = _whole(ASK, started, *PARTS)["choices"][0]
    assert choice["text"] == "Hello you!" and choice["logprobs"]["text_offset"] == [0, 2, 5, 9]
    streamed = [event["choices"][0] for event in _streamed(ASK, started, *PARTS)]
    assert "".join(one["text"] for one in streamed) == "Hello you!"
    offsets = [offset for one in streamed if one["logprobs"] for offset in one["logprobs"]["text_offset"]]
    assert offsets == [0, 2, 5, 9]
    assert [one["finish_reason"] for one in streamed if one["finish_reason"]] == ["length"]


def test_a_prompts_cached_tokens_are_counted_once_however_many_answers_it_gets() -> None:
    ask = replace(ASK, prompts=("one", "two"), n=3, echo=False)
    parts = [Part(choice, "x", 1, "stop", num_cached_tokens=0 if choice % 3 == 0 else 32) for choice in range(6)]
    usage = _whole(ask, Started("m", "d", 150), *parts)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (150, 6)


def test_an_answer_that_failed_is_an_error_and_never_a_short_answer() -> None:
    failed = Part(0, "", 0, "error", "the engine failed")
    with pytest.raises(RuntimeError, match="the engine failed"):
        _whole(ASK, Started("m", "d", 2), PARTS[0], failed)

    from serve.chunks import events

    async def read() -> list[str]:
        return [one async for one in events(Stream(PARTS[0], failed), ASK, ANSWER, Started("m", "d", 2))]

    last = asyncio.run(read())[-1]
    assert "[DONE]" not in last and json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_caller_that_has_gone_before_the_first_event_cancels_its_request() -> None:
    from serve.chunks import Events

    stream = Stream(*PARTS)
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        await asyncio.sleep(0.01)

    response = Events(stream, replace(ASK, stream=True), ANSWER, Started("m", "d", 2), {})
    asyncio.run(response({"type": "http"}, receive, send))
    assert sent == ["http.response.start"] and stream.cancelled
