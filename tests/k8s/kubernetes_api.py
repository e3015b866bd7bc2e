"""A small part of the Kubernetes REST API over real HTTP, in memory: what `loray train --kuberay` talks to.

It keeps what is created, answers as the API server does where something exists already or is not there, and plays the operator: a
RayJob goes through `script`, a status or a failure at each look, and its head's pod has the log that was set, which may be a
stream that breaks off. A fake, because there is no cluster here; the client is the official one.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

import yaml

T = TypeVar("T")
Manifest = dict[str, Any]
Broken = Literal["closed", "silent"]  # no answer: the connection is closed, or stays open

CHUNK_BYTES = 5  # of a stream: also in the middle of a character
SILENT_S = 10.0  # as long as a client may wait: a test that would wait for ever fails


@dataclass(frozen=True)
class Stream:
    """A log as it is followed: the text, and then its end, a connection that is closed before that, or silence."""

    text: str
    then: Literal["end"] | Broken = "end"


class FakeApi:
    """`objects` by path of their collection and name; `requests` in order, as `POST /path`."""

    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {}
        self.requests: list[str] = []
        self.script: list[Manifest | int | Broken] = []  # statuses, HTTP codes and no answers; the last one stays
        self.log = ""
        self.streams: list[Stream | Broken] = []  # instead of the log, one for each request; the last one stays
        self.exit_code: int | None = None  # of the submitter; None while it runs
        self.refuse = ""  # a plural: creating one is forbidden

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Manifest) -> tuple[int, Any]:
        """Status and content: a dictionary for JSON, text, or a stream. 0 and how, where there is no answer."""
        self.requests.append(f"{method} {path}")
        if method == "POST":
            return self._create(path, body)
        if method == "DELETE":
            return (200, self.objects.pop(path)) if path in self.objects else _status(404, "not found")
        if path.endswith("/log"):
            log = _next(self.streams) if self.streams else self.log
            return (0, log) if log in ("closed", "silent") else (200, log)
        if path.endswith("/pods"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": [self._head(query["labelSelector"][0])]}
        if path not in self.objects:
            return _status(404, f"{path.rsplit('/', 1)[1]!r} not found")
        found = self.objects[path]
        if self.script:
            status = _next(self.script)
            if isinstance(status, str):
                return 0, status
            if isinstance(status, int):
                return _status(status, "it is not the run's fault")
            found["status"] = status
        return 200, found

    def _create(self, path: str, body: Manifest) -> tuple[int, Any]:
        where = f"{path}/{body['metadata']['name']}"
        if path.rsplit("/", 1)[1] == self.refuse:
            return _status(403, f"{self.refuse} is forbidden: User cannot create it")
        if where in self.objects:
            return _status(409, f"{body['metadata']['name']!r} already exists")
        body["metadata"]["uid"] = str(uuid.uuid4())
        self.objects[where] = body
        return 201, body

    def _head(self, selector: str) -> Manifest:
        labels = dict(part.split("=") for part in selector.split(","))
        state: Manifest = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        if self.exit_code is not None:
            state = {"terminated": {"exitCode": self.exit_code}}
        container = {
            "name": "ray-job-submitter",
            "state": state,
            "ready": True,
            "image": "i",
            "imageID": "i",
            "restartCount": 0,
        }
        metadata = {"name": f"{labels['ray.io/cluster']}-head", "labels": labels}
        return {"metadata": metadata, "status": {"containerStatuses": [container]}}


def _next(script: list[T]) -> T:
    return script.pop(0) if len(script) > 1 else script[0]


def _status(code: int, message: str) -> tuple[int, Manifest]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


@contextmanager
def serving(api: FakeApi, kubeconfig: Path) -> Iterator[None]:
    """The API on a port of loopback, and a kubeconfig that leads there."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            code, content = api.answer(self.command, url.path, parse_qs(url.query), body)
            if code == 0:
                self._break(content)
                return
            if isinstance(content, Stream):
                self._stream(content)
                return
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, stream: Stream) -> None:
            """In chunks, as the API server does."""
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")
            self.end_headers()
            data = stream.text.encode()
            for start in range(0, len(data), CHUNK_BYTES):
                part = data[start : start + CHUNK_BYTES]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if stream.then == "end":
                self.wfile.write(b"0\r\n\r\n")
            else:
                self._break(stream.then)

        def _break(self, how: Broken) -> None:
            self.close_connection = True
            if how == "silent":
                self.connection.settimeout(SILENT_S)
                with suppress(OSError):
                    self.rfile.read(1)  # until the client goes

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
        cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        user = {"name": "fake", "user": {"token": "t"}}
        config = {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "fake"}
        kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
