"""What the start of an endpoint waits for, and what it tells at once; the hub is a real client's, of a server of our own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import pytest

from serve import patience
from serve.desired import Base, EndpointFiles
from serve.patience import may_pass, patiently
from service.base_models import resolve_base_model
from service.errors import ConfigError, LorayError, ModelError, NotFoundError, StorageError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)  # importing ray.serve 2.60


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)


class Loader:
    """Fails with these one after the other, then loads."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self, *_: Any) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "loaded"


def test_storage_that_is_away_twice_is_asked_a_third_time() -> None:
    loader = Loader(StorageError("away"), StorageError("away"))
    assert patiently(loader, "loading") == "loaded" and loader.calls == 3


@pytest.mark.parametrize("kind", [ConfigError, ModelError, NotFoundError])
def test_wrong_input_is_told_at_once(kind: type[LorayError]) -> None:
    loader = Loader(kind("wrong"))
    with pytest.raises(kind):
        patiently(loader, "loading")
    assert loader.calls == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_S", 0.01)
    with pytest.raises(StorageError, match="away"):
        patiently(Loader(*[StorageError("away")] * 10_000), "loading")


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), OSError(errno.ENETUNREACH, "no route")])
def test_a_network_that_fails_may_pass(error: OSError) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", [FileNotFoundError(), OSError(errno.ENOSPC, "full"), RuntimeError("of the engine")])
def test_what_is_broken_here_does_not(error: Exception) -> None:
    assert not may_pass(error)


@contextmanager
def _hub(status: int, **headers: str) -> Iterator[str]:
    """A hub that answers everything with this status; its URL."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelError]:
    """What fetching a model from a hub at this URL raises."""

    def refused(url: str, *, offline: bool = False) -> ModelError:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.raises(ModelError, match="could not be fetched from the hub") as caught:
            resolve_base_model("some/model", tmp_path)
        return caught.value

    return refused


def test_a_hub_that_is_away_or_busy_may_pass(refusal: Callable[..., ModelError]) -> None:
    assert may_pass(refusal("http://127.0.0.1:9"))
    with _hub(503) as url:
        assert may_pass(refusal(url))


def test_a_model_that_the_hub_does_not_have_or_a_hub_that_is_not_to_be_asked_does_not(
    refusal: Callable[..., ModelError],
) -> None:
    with _hub(404, X_Error_Code="RepoNotFound") as url:
        assert not may_pass(refusal(url))
    assert not may_pass(refusal("http://127.0.0.1:9", offline=True))


def test_an_engine_waits_for_its_base_model_and_not_for_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import replica
    from serve.adapter_uris import AdapterUris
    from service.config import EngineBlock

    loader = Loader(StorageError("away"), StorageError("away"), ConfigError("wrong"))
    monkeypatch.setattr(replica, "resolve_base_model", loader)
    base, files = Base("name", "s3://bucket/base", None, None, "d", "r"), EndpointFiles(str(tmp_path), "default")
    with pytest.raises(ConfigError):
        replica.EngineReplica(base, files, tmp_path, "fp32", EngineBlock(), AdapterUris())
    assert loader.calls == 3


def test_an_engine_waits_for_what_is_to_be_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import replica
    from serve.adapter_uris import AdapterUris
    from service.config import EngineBlock

    loader = Loader(StorageError("away"), StorageError("away"), ConfigError("wrong"))
    monkeypatch.setattr(replica, "resolve_base_model", lambda *_: Mock(digest="d"))
    monkeypatch.setattr("service.render.load_renderer", lambda *_: Mock(digest="r"))
    monkeypatch.setattr(replica, "make_engine", lambda *_: Mock(num_slots=1, max_columns=8, max_rank=8))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: Mock(replica_tag="engine#1"))
    monkeypatch.setattr("serve.adapter_sync.AdapterSync.start", loader)
    base, files = Base("name", "source", None, None, "d", "r"), EndpointFiles(str(tmp_path), "default")
    with pytest.raises(ConfigError):
        replica.EngineReplica(base, files, tmp_path, "fp32", EngineBlock(), AdapterUris())
    assert loader.calls == 3


def test_what_kuberay_builds_waits_for_storage_and_not_for_a_wrong_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import app

    loader = Loader(StorageError("away"), StorageError("away"), ConfigError("wrong"))
    monkeypatch.setattr(app, "prepare", loader)
    with pytest.raises(ConfigError):
        app.build({"model": {"id": "smollm2-135m-instruct"}})
    assert loader.calls == 3


def test_storage_that_is_away_is_not_said_to_be_a_wrong_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import app
    from serve.adapter_uris import AdapterUris
    from service.config import ServeConfig
    from service.registry import Registry

    def away(*_: Any) -> NoReturn:
        raise StorageError("away")

    monkeypatch.setattr(app, "registrable", away)
    config = ServeConfig.model_validate({"model": {"id": "smollm2-135m-instruct"}, "adapters": ["tickets@1"]})
    base = Base("name", "source", None, None, "d", "r")
    with pytest.raises(StorageError):
        app._adapters(config, base, Registry(str(tmp_path)), AdapterUris())
