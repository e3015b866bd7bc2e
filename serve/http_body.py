"""The outside of a request: host, API key, body within limits, `x-loray-*` headers, query.

Knows Starlette, nothing of Ray and of models.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from serve.api_keys import ApiKey, key_for
from serve.openai_answers import ignored_header
from service.errors import RequestError

MAX_BODY_BYTES = 4 * 2**20
BODY_LIMIT_S = 60.0  # 4 MiB within it are 0.6 Mbit/s
WAITS = ("resident", "all_replicas")
_WAIT_S = 60.0
LONGEST_WAIT_S = 3600.0
# Loopback alone keeps no browser out: a web page can have its own host name resolve to 127.0.0.1 (DNS rebinding). Its
# requests carry that name. Where there are keys, a page does not have one.
_LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?", re.ASCII)
_BEARER = {"www-authenticate": "Bearer"}
# Ray Serve's proxy takes this from anybody (it is meant for a load balancer of its own): nobody would see its sender go.
_UNSEEN = "x-request-disconnect-disabled"


def allow(request: Request, keys: tuple[ApiKey, ...], scope: str | None) -> None:
    """Let a request pass, or raise: 401 without a key, 403 without the scope; without any keys 400 for a foreign Host.

    `scope` None lets everybody in who reaches the endpoint.
    """
    if _UNSEEN in request.headers:
        raise HTTPException(400, f"the header {_UNSEEN} is not taken here. Leave it out.")
    if not keys:
        if not _LOCAL_HOST.fullmatch(request.headers.get("host", "")):
            raise HTTPException(400, "Invalid host header")
        return
    if scope is None:
        return
    key = key_for(request.headers.get("authorization"), keys)
    if key is None:
        raise HTTPException(401, "no API key, or an unknown one. Send it as Authorization: Bearer KEY.", _BEARER)
    if not key.may(scope):
        raise HTTPException(403, f"API key {key.name!r} lacks the scope {scope!r}. Use one that has it.")


async def read(request: Request, limit_s: float = BODY_LIMIT_S) -> bytes:
    """The body. 415 unless it is JSON, 413 beyond MAX_BODY_BYTES, without reading further, 408 if it takes too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the body is {kind or 'of no declared type'}. Send content-type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes, the most that is taken.")
    except TimeoutError:
        raise HTTPException(408, f"the body had not arrived after {limit_s:g} s. Send it at once.") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away before its body was complete.") from None
    return bytes(body)


def ignored(request: Request, names: Sequence[str]) -> dict[str, str]:
    """The header that names what is ignored, query included; with `x-loray-strict: true` an error instead."""
    names = [*names, *(f"?{name}" for name in sorted(set(request.query_params) - {"wait", "timeout"}))]
    strict = request.headers.get("x-loray-strict", "false").strip().lower()
    if strict not in ("true", "false"):
        raise RequestError(f"x-loray-strict is {strict!r} and must be true or false.", "x-loray-strict")
    if not names:
        return {}
    if strict == "true":
        raise RequestError(
            f"unknown fields: {ignored_header(names)}. Leave them out, or leave x-loray-strict out to have them ignored.",
            names[0][:200],
        )
    return {"x-loray-ignored": ignored_header(names)}


@dataclass(frozen=True)
class Wait:
    """What `?wait=resident&timeout=60` asks for: until some live replica answers with the adapter, or `everywhere`."""

    everywhere: bool
    timeout_s: float


def wait_of(request: Request) -> Wait | None:
    """`?wait=resident` or `?wait=all_replicas`, with or without a timeout; None = not at all."""
    wait, given = request.query_params.get("wait"), request.query_params.get("timeout")
    if wait not in (None, *WAITS):
        raise RequestError(
            f"wait: {wait!r} is unknown. Write ?wait=resident or ?wait=all_replicas, or leave it out.", "wait"
        )
    if given is None:
        return Wait(wait == "all_replicas", _WAIT_S) if wait else None
    if wait is None:
        raise RequestError("timeout: nothing is waited for. Write ?wait=resident&timeout=60.", "timeout")
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= LONGEST_WAIT_S:
        raise RequestError(f"timeout: {given!r} must be seconds above 0, at most {LONGEST_WAIT_S:g}.", "timeout")
    return Wait(wait == "all_replicas", timeout_s)
