"""Fixtures for tests of storage: `home` is a LORAY_HOME, once as a directory and once on a real S3 endpoint.

The endpoint is moto's HTTP application on a free loopback port, reached through the AWS_* environment as any store
is, so that subprocesses of a test reach it too. A test module takes part by `pytest_plugins = ("tests.s3_endpoint",)`.
"""

from __future__ import annotations

import http.client
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BUCKET = "loray-tests"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of a running S3 endpoint that has one bucket."""
    pytest.importorskip("moto.server", reason='pip install "moto[server]"')
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # S3 checks If-Match and writes in one step; moto's threads can interleave between its check and its write.
        with one_at_a_time:
            answer: Iterable[bytes] = app(environ, start_response)
            return answer

    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, name="s3-endpoint", daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3_home(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix on the endpoint, with the environment that leads there."""
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "loray-tests-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "only-for-the-loopback-endpoint")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["directory", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A LORAY_HOME: the test runs on a directory and on S3."""
    return str(tmp_path / "home") if request.param == "directory" else str(request.getfixturevalue("s3_home"))
