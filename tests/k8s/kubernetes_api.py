"""A small part of the Kubernetes REST API over real HTTP, in memory: what `loray train --kuberay` talks to.

It keeps what is created, answers as the API server does where something exists already or is not there, and plays the operator: a
RayJob goes through `script`, a status at each look, and its head's pod has the log that was set. A fake, because there is no
cluster here; the client is the official one.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Manifest = dict[str, Any]


class FakeApi:
    """`objects` by path of their collection and name; `requests` in order, as `POST /path`."""

    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {}
        self.requests: list[str] = []
        self.script: list[Manifest] = []
        self.log = ""
        self.refuse = ""  # a plural: creating one is forbidden

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Manifest) -> tuple[int, Any]:
        """Status and content: a dictionary for JSON, or text."""
        self.requests.append(f"{method} {path}")
        if method == "POST":
            return self._create(path, body)
        if method == "DELETE":
            return (200, self.objects.pop(path)) if path in self.objects else _status(404, "not found")
        if path.endswith("/log"):
            return (200, self.log)
        if path.endswith("/pods"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": [self._head(query["labelSelector"][0])]}
        if path not in self.objects:
            return _status(404, f"{path.rsplit('/', 1)[1]!r} not found")
        found = self.objects[path]
        if self.script:
            found["status"] = self.script.pop(0) if len(self.script) > 1 else self.script[0]
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
        state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
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
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

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
