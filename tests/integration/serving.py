"""What tests ask of a running endpoint, and how they wait. The fixtures are in `serving_fixtures.py`."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from service.config import ServeConfig
from service.domain import ModelRef
from service.registry import ManifestDraft, Registry
from service.settings import Settings
from tests.integration import waiting

DEADLINE_S = 60.0
HELLO: Any = [{"role": "user", "content": "Hello there"}]


@dataclass
class Endpoint:
    """A running server and the registry behind it."""

    url: str
    http: httpx.Client
    client: openai.OpenAI
    registry: Registry
    settings: Settings

    def ask(self, model: str, messages: Any = HELLO, **options: Any) -> str:
        options = {"max_tokens": 24, "temperature": 0, **options}
        answer = self.client.chat.completions.create(model=model, messages=messages, **options)
        return answer.choices[0].message.content or ""

    def stream(self, model: str, messages: Any = HELLO, **options: Any) -> str:
        options = {"max_tokens": 24, "temperature": 0, **options}
        stream = self.client.chat.completions.create(model=model, messages=messages, stream=True, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    def put(self, name: str, model: str) -> httpx.Response:
        return self.http.put(f"/v1/adapters/{name}", params={"wait": "resident"}, json={"model": model})

    def post(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": "base", "messages": HELLO, **fields})

    def replica(self) -> dict[str, Any]:
        replicas = self.http.get("/v1/adapters").json()["replicas"]
        return dict(next(iter(replicas.values())))

    def names(self) -> list[str | None]:
        return [adapter["name"] for adapter in self.http.get("/v1/adapters").json()["data"]]


@contextmanager
def served(config: ServeConfig, registry: Registry, settings: Settings) -> Iterator[Endpoint]:
    """An endpoint of this config on the session's Ray cluster, with clients; gone afterwards, however the test ended."""
    from serve import app

    url = app.start(config, settings)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as http, client:
            yield Endpoint(url, http, client, registry, settings)
    finally:
        app.stop(config.endpoint)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    waiting.wait_until(condition, what, DEADLINE_S)


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections: none takes it meanwhile."""
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports of 100 are taken")


def clear(endpoint: Endpoint) -> None:
    for name in endpoint.names():
        if name is not None:
            endpoint.http.delete(f"/v1/adapters/{name}").raise_for_status()
    wait_until(lambda: endpoint.names() == [], "all adapters are gone")


def publish(endpoint: Endpoint, family: str, directory: Path) -> str:
    """As the fixtures' red@1: for this base and its template."""
    like = endpoint.registry.manifest(ModelRef.parse("red@1"))
    kept = {"base_model", "base_digest", "renderer_digest", "rank", "alpha"}
    draft = ManifestDraft.model_validate(like.model_dump(include=kept))
    return endpoint.registry.publish(family, directory, draft).digest
