"""Reading a body, whoever sends it: one that never ends is given up, and so is a client that goes away in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve import http_body


def _request(*messages: dict[str, Any], kind: bytes = b"application/json") -> Request:
    """A request whose server has these messages for it, and then none."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    return Request({"type": "http", "headers": [(b"content-type", kind)]}, receive)


def _piece(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_a_body_in_pieces_is_read_whole() -> None:
    request = _request(_piece(b'{"a"', more=True), _piece(b": 1}", more=False))
    assert asyncio.run(http_body.read(request)) == b'{"a": 1}'


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (_request(), 408),
        (_request(_piece(b"{", more=True)), 408),
        (_request(_piece(b"{", more=True), {"type": "http.disconnect"}), 400),
        (_request(_piece(b" " * http_body.MAX_BODY_BYTES, more=True), _piece(b" ", more=True)), 413),
        (_request(kind=b"text/plain"), 415),
        (_request(kind=b""), 415),
    ],
)
def test_what_is_no_whole_body_has_its_status(request_: Request, status: int) -> None:
    with pytest.raises(HTTPException) as caught:
        asyncio.run(http_body.read(request_, limit_s=0.1))
    assert caught.value.status_code == status
