"""A real S3 endpoint on loopback that can go away and come back, for tests of what happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class Endpoint:
    """An S3 endpoint that can be stopped and started; `before(method, path)` sees each request, and may keep it waiting."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self._port = 0
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import MotoRequestHandler
        from werkzeug.serving import make_server

        self._server = make_server(
            "127.0.0.1", self._port, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="stoppable-endpoint", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def stop_at(self, part: str) -> None:
        """Stop when the next request comes with `part` in its path: the caller is in the middle of it, on every machine."""

        def before(method: str, path: str) -> None:
            if part in path:
                self.before = lambda method, path: None
                self.stop()
                raise ConnectionError(f"{method} {path} is not answered any more")

        self.before = before

    def has_stopped(self) -> bool:
        return not self._thread.is_alive()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.before(environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}")
        with self._one_at_a_time:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer


@pytest.fixture
def endpoint(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """Running when the test begins, and reached by AWS_ENDPOINT_URL."""
    running = Endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    yield running
    running.before = lambda method, path: None
    running.stop()
