"""What goes back over HTTP, in OpenAI's shapes: completions, stream chunks, model lists, and every error.

Pure. `error_answer` is the one place where an error of `service/errors.py` becomes a status; `gateway.py` only sends it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from serve.parts import Scored
from serve.routing import UnknownModelError
from service.errors import (
    BusyError,
    ClusterError,
    ConfigError,
    ConflictError,
    LorayError,
    ModelError,
    NotFoundError,
    RequestError,
    StorageError,
)

DONE = "data: [DONE]\n\n"

# A ModelError is the caller's choice of adapter, not a body we cannot parse, which would speak for 422. It is 400 all the
# same: OpenAI answers every refused request with 400, and its clients have one exception (BadRequestError) for it.
_STATUSES: tuple[tuple[type[BaseException], int, str], ...] = (
    (RequestError, 400, "invalid_request_error"),
    (ConfigError, 400, "invalid_request_error"),
    (ModelError, 400, "invalid_request_error"),
    (NotFoundError, 404, "not_found_error"),
    (ConflictError, 409, "conflict_error"),
    (BusyError, 429, "rate_limit_error"),
    (StorageError, 503, "service_unavailable_error"),
    (ClusterError, 503, "service_unavailable_error"),
    (TimeoutError, 504, "timeout_error"),
)


@dataclass(frozen=True)
class Usage:
    """Token counts of one request; `num_cached_tokens` of the prompts' were not computed again."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(frozen=True)
class Answer:
    """Who answers one request: what every body about it carries. `model` is the real one, `digest` its identity."""

    id: str
    created: int
    model: str
    digest: str
    is_chat: bool = True
    split: str | None = None
    arm: str | None = None

    def headers(self) -> dict[str, str]:
        """Who answers, for those who do not read bodies."""
        arm = {} if self.arm is None else {"x-loray-split": str(self.split), "x-loray-arm": self.arm}
        return {"x-loray-model": quote(self.model, safe="@/:"), **arm}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """All answers, not streamed, made by `choice`."""
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": choices,
            "usage": usage.body(),
        }

    def choice(self, index: int, text: str, finish_reason: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        """One answer; `scored` None where no log-probabilities were asked for."""
        if self.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = None if scored is None else _chat_logprobs(scored)
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
        logprobs = None if scored is None else _text_logprobs(scored, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk(
        self,
        index: int,
        text: str | None,
        finish_reason: str | None = None,
        *,
        role: bool = False,
        scored: Sequence[Scored] = (),
        offset: int = 0,
        with_usage: bool = False,
    ) -> str:
        """One server-sent event, `offset` characters into the answer. With include_usage all but the last say `usage: null`."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        if self.is_chat:
            choice["delta"] = ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})
            choice["logprobs"] = _chat_logprobs(scored) if scored else None
        else:
            choice["text"] = text or ""
            choice["logprobs"] = _text_logprobs(scored, offset) if scored else None
        usage = {"usage": None} if with_usage else {}
        return event({**self._head(self._chunk_kind), "choices": [choice], **usage})

    def usage_chunk(self, usage: Usage) -> str:
        """The event before [DONE] that include_usage asks for: no choices, the counts."""
        return event({**self._head(self._chunk_kind), "choices": [], "usage": usage.body()})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "loray": {"model_digest": self.digest}
            | ({} if self.arm is None else {"split": self.split, "arm": self.arm}),
        }


def _chat_logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [{**entry(s.text, s.logprob), "top_logprobs": [entry(*one) for one in s.top]} for s in scored]
    return {"content": content, "refusal": None}


def _text_logprobs(scored: Sequence[Scored], offset: int) -> dict[str, Any]:
    """The older shape. Two tokens of the same text are one key of `top_logprobs`: the likelier one's."""
    offsets = []
    for one in scored:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in scored],
        "token_logprobs": [one.logprob for one in scored],
        "top_logprobs": [None if one.logprob is None else dict(reversed(one.top)) for one in scored],
        "text_offset": offsets,
    }


def event(body: dict[str, Any]) -> str:
    """`body` as a server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def models_body(names: Sequence[tuple[str, str]], created: int) -> dict[str, Any]:
    """OpenAI's model list, of (name, digest)."""
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "loray", "loray": {"model_digest": digest}}
        for name, digest in names
    ]
    return {"object": "list", "data": data}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape. A client's own words may be in it: half a surrogate pair is written out."""

    def writable(text: str | None) -> str | None:
        return None if text is None else text.encode("utf-8", "backslashreplace").decode()

    return {"error": {"message": writable(message), "type": kind, "param": writable(param), "code": code}}


def error_answer(error: BaseException, error_id: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. One that is not ours answers 500 with `error_id`, under which it is logged."""
    for known, status, kind in _STATUSES:
        if isinstance(error, known):
            param = error.param if isinstance(error, RequestError) else None
            if isinstance(error, UnknownModelError):
                return status, error_body(str(error), kind, "model", "model_not_found")
            return status, error_body(str(error), kind, param)
    if isinstance(error, LorayError):
        return 500, error_body(str(error), "server_error", code=error_id)
    message = f"An error inside the server, logged there under {error_id}. Report it with this id."
    return 500, error_body(message, "server_error", code=error_id)


def ignored_header(names: Sequence[str]) -> str:
    """The value of `x-loray-ignored`: names as printable ASCII, at most 1000 characters."""
    text = ", ".join(json.dumps(name)[1:-1] for name in names[:600])  # more than 1000 characters, whatever they are
    return text if len(text) <= 1000 else f"{text[:980]}... ({len(names)})"
