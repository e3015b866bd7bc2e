"""From the engine's chunks to the body of an answer, whole or as a stream of events. Touches no names and no adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from serve.http_errors import answer_to
from serve.openai_answers import DONE, Answer, Usage, event
from serve.openai_api import ChatRequest
from service.errors import ClusterError
from service.inference.engine import Chunk


async def completion(stream: Any, answer: Answer, num_prompt_tokens: int) -> dict[str, Any]:
    """The body of a whole answer. The request is cancelled in the engine if the caller goes away."""
    texts, num_tokens, reason = [], 0, "stop"
    try:
        async for chunk in stream:
            _check_whole(chunk)
            texts.append(chunk.text)
            num_tokens += chunk.num_tokens
            reason = chunk.finish_reason or reason
    finally:
        stream.cancel()
    return answer.completion("".join(texts), reason, Usage(num_prompt_tokens, num_tokens))


async def events(stream: Any, chat: ChatRequest, answer: Answer, num_prompt_tokens: int) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer: role, contents, finish reason, usage if asked for, [DONE]."""
    num_tokens = 0
    try:
        yield answer.chunk({"role": "assistant", "content": ""}, with_usage=chat.include_usage)
        async for chunk in stream:
            _check_whole(chunk)
            num_tokens += chunk.num_tokens
            if chunk.text:
                yield answer.chunk({"content": chunk.text}, with_usage=chat.include_usage)
            if chunk.finish_reason:
                yield answer.chunk({}, chunk.finish_reason, with_usage=chat.include_usage)
        if chat.include_usage:
            yield answer.usage_chunk(Usage(num_prompt_tokens, num_tokens))
        yield DONE
    except Exception as error:
        yield event(answer_to(error)[1])
    finally:
        stream.cancel()


def _check_whole(chunk: Chunk) -> None:
    if chunk.finish_reason == "cancelled":
        raise ClusterError("the engine was stopped before the answer was complete. Send the request again.")
    if chunk.finish_reason == "error":
        raise RuntimeError(chunk.error)
