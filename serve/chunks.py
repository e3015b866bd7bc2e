"""From the engine's parts to the body of an answer, whole or as a stream of events. Touches no names and no adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.http_errors import answer_to
from serve.openai_answers import DONE, Answer, Usage, event
from serve.openai_api import Ask
from serve.parts import Counts, Part, Started
from service.errors import WorkerLostError


async def completion(stream: Any, ask: Ask, answer: Answer, started: Started) -> dict[str, Any]:
    """The body of all answers. The request is cancelled in the engine if the caller goes away."""
    found: dict[int, Part] = {}
    counts = Counts(started, ask.n)
    try:
        async for part in stream:
            _check_whole(part)
            counts.add(part)
            found[part.choice] = found[part.choice].joined(part) if part.choice in found else part
    finally:
        stream.cancel()
    scores = ask.sampling.logprobs is not None
    choices = [
        answer.choice(index, part.text, part.finish_reason or "stop", part.scored if scores else None)
        for index, part in sorted(found.items())
    ]
    return answer.whole(choices, _usage(counts))


async def events(stream: Any, ask: Ask, answer: Answer, started: Started) -> AsyncIterator[str]:
    """The server-sent events of streamed answers: roles, contents, finish reasons, usage if asked for, [DONE]."""
    counts, usage = Counts(started, ask.n), ask.include_usage
    offsets = dict.fromkeys(range(ask.n * len(ask.prompts)), 0)  # characters of each answer that have gone out
    try:
        if ask.is_chat:
            for index in offsets:
                yield answer.chunk(index, "", role=True, with_usage=usage)
        async for part in stream:
            _check_whole(part)
            counts.add(part)
            index, scored = part.choice, part.scored if ask.sampling.logprobs is not None else ()
            if part.text or scored:
                yield answer.chunk(index, part.text, scored=scored, offset=offsets[index], with_usage=usage)
                offsets[index] += sum(len(one.text) for one in scored)  # an echoed prompt comes before its scores
            if part.finish_reason:
                yield answer.chunk(index, None, part.finish_reason, with_usage=usage)
        if usage:
            yield answer.usage_chunk(_usage(counts))
        yield DONE
    except Exception as error:
        yield event(answer_to(error)[1])


class Events(StreamingResponse):
    """The response that sends them. The request is cancelled in the engine if the caller goes away, before the first one is
    due, too: that is why it is done here and not in the generator, which may never begin."""

    def __init__(self, stream: Any, ask: Ask, answer: Answer, started: Started, headers: Mapping[str, str]) -> None:
        body = events(stream, ask, answer, started)
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


def _usage(counts: Counts) -> Usage:
    return Usage(counts.num_prompt_tokens, counts.num_tokens, counts.num_cached_tokens)


def _check_whole(part: Part) -> None:
    if part.finish_reason == "cancelled":
        raise WorkerLostError("the engine was stopped before the answer was complete. Send the request again.")
    if part.finish_reason == "error":
        raise RuntimeError(part.error)
