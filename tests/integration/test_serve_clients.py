"""Clients that misbehave: slow ones, silent ones, those that vanish, and bodies made to break a parser. Nobody else notices."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from serve.lines import line_rows
from serve.openai_api import MAX_CHOICES
from tests.integration import tiny
from tests.integration.serving import DEADLINE_S, HELLO, Endpoint, publish, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def _connected(endpoint: Endpoint, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """A plain connection; `receive_bytes` is how much the kernel takes in for a client that does not read."""
    url = httpx.URL(endpoint.url)
    with socket.socket() as client:
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(DEADLINE_S)
        client.connect((url.host, url.port))
        yield client


def _head(length: int | None, path: str = CHAT) -> bytes:
    """The head of a POST; without a length its body comes in chunks."""
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{size}\r\n\r\n".encode()


def _request(**fields: Any) -> bytes:
    body = json.dumps({"model": "base", "messages": HELLO, "temperature": 0, **fields}).encode()
    return _head(len(body)) + body


def _count(endpoint: Endpoint, name: str, *labels: str) -> float:
    """The sum of a metric's rows that have all these labels."""
    rows = [line for line in endpoint.http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows if all(label in row for label in labels))


def _is_idle(endpoint: Endpoint) -> bool:
    return bool(endpoint.replica()["running"] == 0)


def test_a_stream_that_nobody_reads_holds_no_slot_and_is_whole_when_it_is_read(endpoint: Endpoint) -> None:
    alone = endpoint.ask("base")
    # Over a megabyte to each, more than the buffers of a connection take; 16 answers on four slots.
    request = _request(stream=True, n=4, max_tokens=200, logprobs=True, top_logprobs=20)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_connected(endpoint, receive_bytes=4096)) for _ in range(4)]
        for client in clients:
            client.sendall(request)
        assert endpoint.ask("base") == alone, "somebody else is answered meanwhile"
        wait_until(lambda: _is_idle(endpoint), "the engine is done, although nobody has read a byte")
        assert endpoint.ask("base") == alone
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            piece = clients[0].recv(2**16)
            assert piece, "the connection ended before the answer"
            received += piece
    assert len(received) > 2**20
    assert received.count(b'"finish_reason": "length"') == 4
    assert b"data: [DONE]" in received


def test_a_client_that_reads_a_byte_now_and_then_holds_up_nobody(endpoint: Endpoint) -> None:
    alone = endpoint.ask("base")
    with _connected(endpoint, receive_bytes=4096) as client:
        client.sendall(_request(stream=True, n=4, max_tokens=200, logprobs=True, top_logprobs=20))
        for _ in range(5):
            assert len(client.recv(1)) == 1
            assert endpoint.ask("base") == alone
        wait_until(lambda: _is_idle(endpoint), "the engine is done")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_what_a_vanished_client_asked_for_is_not_generated(endpoint: Endpoint, stream: bool) -> None:
    wait_until(lambda: _is_idle(endpoint), "nothing else runs")
    cancelled = _count(endpoint, "loray_requests_total", 'end="cancelled"')
    tokens = _count(endpoint, "loray_completion_tokens_total")
    with _connected(endpoint) as client:
        client.sendall(_request(stream=stream, n=128, max_tokens=200))
        if stream:
            assert client.recv(1)
        wait_until(lambda: not _is_idle(endpoint), "it runs")
    wait_until(lambda: _is_idle(endpoint), "its slots are free")
    assert _count(endpoint, "loray_requests_total", 'end="cancelled"') == cancelled + 1
    assert _count(endpoint, "loray_completion_tokens_total") - tokens < 12_800  # of 25600
    assert _count(endpoint, "loray_requests_in_flight") == 0


def test_a_full_line_is_429_with_the_adapters_name_and_only_for_it(loaded: Endpoint) -> None:
    refused = _count(loaded, "loray_refused_requests_total", 'status="429"')
    with _connected(loaded) as client:
        client.sendall(_request(model="red", stream=True, n=MAX_CHOICES, max_tokens=200))
        assert client.recv(1)
        for stream in (False, True):
            answer = loaded.post(model="red", stream=stream, max_tokens=1)
            assert answer.status_code == 429, answer.text
            assert answer.headers["retry-after"] == "1"
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "rate_limit_error" and error["message"].startswith("red@1 is busy")
        with pytest.raises(openai.RateLimitError):
            loaded.ask("red@1")
        assert loaded.ask("blue", max_tokens=1) and loaded.ask("base", max_tokens=1)
        assert _count(loaded, "loray_refused_requests_total", 'status="429"') == refused + 3
    wait_until(lambda: loaded.post(model="red", max_tokens=1).status_code == 200, "its line is empty again")


def test_a_hundred_requests_in_line_delay_another_adapters_by_its_turn(loaded: Endpoint) -> None:
    """Counted in answers, not in seconds: two turns of the slots, one to wait for and one for the answer itself, are 8."""

    def answered() -> float:
        return _count(loaded, "loray_requests_total", 'model="red@1"', 'end="ok"')

    slots = loaded.replica()["slots"]
    with contextlib.ExitStack() as stack:
        for client in [stack.enter_context(_connected(loaded)) for _ in range(line_rows(slots))]:
            client.sendall(_request(model="red", max_tokens=200))
        wait_until(lambda: loaded.replica()["waiting"] >= 100, "red has a long line")
        before = answered()
        assert loaded.post(model="blue", max_tokens=200).status_code == 200
        overtook = answered() - before
        assert loaded.replica()["waiting"] > 40, "blue has overtaken most of the line"
    assert overtook <= 6 * slots, "three times its due, for what ends while the gateway is asked"
    wait_until(lambda: _is_idle(loaded), "what nobody waits for any more is gone")


def test_nobody_can_ask_not_to_be_watched(endpoint: Endpoint) -> None:
    answer = endpoint.http.get("/v1/models", headers={"x-request-disconnect-disabled": "?1"})
    assert answer.status_code == 400 and "x-request-disconnect-disabled" in answer.text


def test_bodies_that_never_come_hold_up_nobody(endpoint: Endpoint) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(40):
            client = stack.enter_context(_connected(endpoint))
            client.sendall(_head(1000) + b'{"model": ' if number % 2 else _head(None))
        assert endpoint.ask("base", max_tokens=2)
        assert endpoint.http.get("/healthz").status_code == 200
    # That they went away was their mistake, not the server's.
    assert _count(endpoint, "loray_refused_requests_total", 'status="500"') == 0
    assert _count(endpoint, "loray_requests_in_flight") == 0


def test_a_body_that_comes_byte_by_byte_is_answered(endpoint: Endpoint) -> None:
    with _connected(endpoint) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in _request(max_tokens=2):
            client.sendall(bytes([byte]))
        assert client.recv(2**16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_without_end_is_answered_before_its_end(endpoint: Endpoint) -> None:
    with _connected(endpoint) as client:
        client.sendall(_head(None))
        chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        with contextlib.suppress(ConnectionError):  # the server may hang up on it
            for _ in range(80):  # 5 MiB of 4, and never the last one
                client.sendall(chunk)
        assert client.recv(2**16).startswith(b"HTTP/1.1 413 ")
    assert endpoint.ask("base", max_tokens=1)


DEEP = 500
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"model": "base", "messages": [{"role": "us',
    "a list": b"[]",
    "invalid UTF-8": b'{"model": "base\xff\xfe"}',
    "UTF-16": '{"model": "base"}'.encode("utf-16"),
    "NaN": b'{"model": "base", "temperature": NaN}',
    "1e999": b'{"model": "base", "messages": [], "temperature": 1e999}',
    "a huge integer": b'{"model": "base", "seed": ' + b"9" * 100_000 + b"}",
    "an integer beyond 64 bits": b'{"model": "base", "messages": [], "max_tokens": 18446744073709551616}',
    "a key twice": b'{"model": "base", "model": "red"}',
    "lists in lists": b'{"model": "base", "stop": ' + b"[" * 200_000,
    "objects in objects": b'{"model":' * 100_000,
    "a deep value": b'{"model": "base", "messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "half a surrogate pair": b'{"model": "\\ud800", "messages": []}',
    "a schema in schemas": json.dumps(
        {
            "model": "base",
            "messages": HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "@"}},
        }
    )
    .replace('"@"', '{"not":' * DEEP + '{"type": "x"}' + "}" * DEEP)
    .encode(),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("PUT", "/v1/adapters/red"),
        ("PUT", "/v1/endpoints/test/splits/support"),
    ],
)
def test_a_body_made_to_break_a_parser_is_the_clients_error(
    endpoint: Endpoint, method: str, path: str, body: bytes
) -> None:
    answer = endpoint.http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text  # 404: no more is looked at than a model that is not there
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) < 2000


def test_names_that_look_like_headers_end_in_no_header(endpoint: Endpoint) -> None:
    evil = "x\r\nset-cookie: a=b\r\n\r\n<html>"
    answers = [
        endpoint.post(max_tokens=1, user=evil, **{evil: 1}),
        endpoint.post(model=evil),
        endpoint.http.post(CHAT, params={evil: "1"}, json={"model": "base", "messages": HELLO, "max_tokens": 1}),
        endpoint.http.get("/v1/resolve", params={"model": evil}),
        endpoint.http.put(f"/v1/adapters/{httpx.QueryParams(x=evil)}", json={"model": "nobody@1"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 200, 404, 404]
    for answer in answers:
        assert "set-cookie" not in answer.headers
        assert answer.headers["content-type"] == "application/json"
    assert answers[0].headers["x-loray-ignored"] == json.dumps(evil)[1:-1]


def test_an_answer_that_the_model_breaks_off_is_500_with_an_id_and_others_go_on(
    endpoint: Endpoint, base: Path, tmp_path: Path
) -> None:
    """An adapter whose training diverged: its numbers overflow in the engine's step."""
    before = endpoint.ask("base")
    wild = tiny.save_adapter(base, tmp_path / "wild", 8)
    tensors = load_file(wild / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, wild / "adapter_model.safetensors")
    publish(endpoint, "wild", wild)
    assert endpoint.put("wild", "wild@1").status_code == 200
    answer = endpoint.post(model="wild", max_tokens=5)
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["type"] == "server_error" and error["code"].startswith("err-") and error["code"] in error["message"]
    streamed = endpoint.post(model="wild", max_tokens=5, stream=True).text
    assert '"server_error"' in streamed and "[DONE]" not in streamed
    assert endpoint.ask("base") == before
    wait_until(lambda: _is_idle(endpoint), "nothing of it is left")
    endpoint.http.delete("/v1/adapters/wild").raise_for_status()


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "manifest.json", "."])
def test_an_adapter_whose_files_are_gone_is_refused_and_others_go_on(
    endpoint: Endpoint, base: Path, tmp_path: Path, lost: str
) -> None:
    before = endpoint.ask("base")
    family = f"lost{len(lost)}"
    digest = publish(endpoint, family, tiny.save_adapter(base, tmp_path / family, 20 + len(lost)))
    stored = Path(endpoint.settings.home) / "models" / "default" / family / "1"
    assert stored.is_dir(), digest
    if lost == ".":
        shutil.rmtree(stored)
    else:
        (stored / lost).unlink()
    answer = endpoint.put(family, f"{family}@1")
    assert answer.status_code in (400, 404), answer.text
    assert family in answer.json()["error"]["message"]
    assert family not in endpoint.names()
    assert endpoint.ask("base") == before
