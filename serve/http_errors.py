"""Errors, from whatever process they come, as HTTP answers: OpenAI's shape, a status, and a log line where nobody expected it.

The statuses of loray's own errors are in `openai_answers.error_answer`; here Ray's and Starlette's join them.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.openai_answers import error_answer, error_body
from service.errors import ClusterError, LorayError, StorageError

_log = logging.getLogger(__name__)


def answer_to(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body of an error; one nobody expected is logged under the id that the body names."""
    error_id = f"err-{secrets.token_hex(6)}"
    status, body, cause = _answer(error, error_id)
    if status >= 500 and not isinstance(cause, (StorageError, ClusterError, TimeoutError)):
        _log.error("%s: unexpected error", error_id, exc_info=cause)
    return status, body


def status_of(error: BaseException) -> int:
    """The status alone, for counting."""
    return _answer(error, "")[0]


def _answer(error: BaseException, error_id: str) -> tuple[int, dict[str, Any], BaseException]:
    """Status, body, and the error itself out of Ray's wrapping."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, TaskCancelledError):  # Ray Serve cancels what nobody waits for any more
        return 400, error_body("the client went away before its request was answered.", "invalid_request_error"), error
    if isinstance(error, HTTPException):
        return error.status_code, error_body(str(error.detail), "invalid_request_error"), error
    if isinstance(error, (RayActorError, grpc.RpcError)):
        error = ClusterError("the engine is down or being replaced. Try again in some seconds.")
    return *error_answer(error, error_id), error


async def on_error(request: Request, error: Exception) -> Response:
    """The exception handler of every route."""
    status, body = answer_to(error)
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    return JSONResponse(body, status_code=status, headers={**headers, **(getattr(error, "headers", None) or {})})


_OF_RAY = (RayServeException, RayActorError, RayTaskError, TaskCancelledError)
HANDLERS: dict[Any, Any] = dict.fromkeys((LorayError, TimeoutError, *_OF_RAY, HTTPException, Exception), on_error)
