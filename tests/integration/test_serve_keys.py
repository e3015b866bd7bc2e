"""An endpoint as it is operated: with API keys, each with its scope, and with its home on S3, where the store may go away.

The store is moto's HTTP application, really shut down and started again. The cluster's processes find it by `~/.aws/config`
of the session's private home.
"""

from __future__ import annotations

import http.client
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import serve
from service import storage
from service.base_models import resolve_base_model
from service.config import ServeConfig
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration import stoppable_endpoint, tiny
from tests.integration.serving import DEADLINE_S, HELLO, Endpoint, free_port, wait_until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
INFER, ADMIN = "infer-secret-of-the-test", "admin-secret-of-the-test"
BUCKET = "loray-serving"


@dataclass
class Served:
    """An endpoint, its store, and the prefix that it may read adapters from, where `red1` and `red2` lie."""

    endpoint: Endpoint
    store: stoppable_endpoint.Endpoint
    root: str

    def model_of(self, name: str) -> str:
        return str(self.endpoint.post(model=name, max_tokens=1).raise_for_status().json()["model"])


@pytest.fixture(scope="module")
def store(ray_environment: dict[str, str]) -> Iterator[stoppable_endpoint.Endpoint]:
    pytest.importorskip("moto.server", reason='pip install "moto[server]"')
    running = stoppable_endpoint.Endpoint()
    aws = Path(ray_environment["HOME"]) / ".aws"
    aws.mkdir(exist_ok=True)
    (aws / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {running.url}\n")
    (aws / "credentials").write_text("[default]\naws_access_key_id = loray-tests\naws_secret_access_key = loopback\n")
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"))
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", running.url)  # for this process, where others may have been used before
        yield running
    running.stop()


@pytest.fixture(scope="module")
def served(
    ray_cluster: str, store: stoppable_endpoint.Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from serve import app

    directory, prefix = tmp_path_factory.mktemp("s3"), f"s3://{BUCKET}/{uuid.uuid4().hex}"
    base, root = tiny.save_base(directory / "base"), f"{prefix}/adapters"
    settings = Settings(f"{prefix}/home", directory / "cache")
    registry = Registry(settings.home)
    draft = ManifestDraft(
        base_model="base",
        base_digest=resolve_base_model(str(base), settings.cache).digest,
        renderer_digest=load_renderer(base).digest,
        rank=8,
        alpha=16,
    )
    for seed in (1, 2):
        source = tiny.save_adapter(base, directory / f"red{seed}", seed)
        registry.publish("red", source, draft)
        for file in source.iterdir():
            storage.put_file(file, f"{root}/red{seed}/{file.name}")
    registry.set_alias("red", "production", 1)
    values: dict[str, Any] = {"model": str(base), "endpoint": "locked", "precision": "fp32", "port": free_port()}
    values |= {"engine": {"slots": 2, "max_context": 128, "lora_columns": 8, "threads": 1}}  # room for one adapter
    values |= {"adapters": ["red"], "adapter_roots": [root]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAY_API_KEYS", f"infer:{INFER},admin:{ADMIN}")
        url = app.start(ServeConfig.model_validate(values), settings)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=ADMIN, max_retries=0, timeout=DEADLINE_S)
        bearer = {"authorization": f"Bearer {ADMIN}"}
        with httpx.Client(base_url=url, timeout=DEADLINE_S, headers=bearer) as http_client, client:
            yield Served(Endpoint(url, http_client, client, registry, settings), store, root)
        app.stop("locked")


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    return served.endpoint.url


def _calls() -> list[tuple[str, str]]:
    """Every route and its method, as the gateway's source has them: Serve keeps the application to itself."""
    source = (Path(serve.__file__).parent / "gateway.py").read_text()
    found = re.findall(r'@http\.([a-z_]+)\("([^"]+)"', source)
    assert len(found) == source.count("@http.")
    return [(method.upper(), re.sub(r"\{[^}]*\}", "locked", path)) for method, path in found]


def test_every_route_but_health_wants_a_key(url: str) -> None:
    calls = _calls()
    assert len(calls) >= 11
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as http:
        for method, path in calls:
            statuses = [
                http.request(method, path, headers=headers).status_code
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {ADMIN}"})
            ]
            assert statuses == ([200] * 3 if path == "/healthz" else [401] * 3), path


def test_the_document_names_the_keys_scopes_and_the_routes_that_there_are(url: str) -> None:
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as http:
        document = http.get("/openapi.json", headers={"authorization": f"Bearer {INFER}"}).json()
    routes = re.findall(r'@http\.([a-z_]+)\("([^"]+)"', (Path(serve.__file__).parent / "gateway.py").read_text())
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert described == {(method, path.replace(":path}", "}")) for method, path in routes}
    scopes = {
        path: operation["security"]
        for path, operation in ((p, o["get"]) for p, o in document["paths"].items() if "get" in o)
    }
    assert scopes["/healthz"] == [] and scopes["/v1/models"] == [{"key": ["infer"]}]
    assert scopes["/v1/adapters"] == [{"key": ["admin"]}]


def test_a_key_does_what_its_scopes_allow(url: str) -> None:
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as http:

        def status(secret: str, method: str, path: str) -> int:
            return http.request(method, path, headers={"authorization": f"Bearer {secret}"}).status_code

        for method, path in [("GET", "/v1/adapters"), ("PUT", "/v1/adapters/x"), ("DELETE", "/v1/adapters/x")]:
            assert status(INFER, method, path) == 403
            assert status(ADMIN, method, path) not in (401, 403)
        assert status(INFER, "GET", "/v1/models") == status(ADMIN, "GET", "/v1/models") == 200


def test_openais_client_answers_with_a_key_and_names_the_error_without(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=INFER, max_retries=0, timeout=DEADLINE_S)
    assert client.chat.completions.create(model="base", messages=HELLO, max_tokens=2).choices[0].finish_reason
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="base", messages=HELLO, max_tokens=2)
    with pytest.raises(openai.PermissionDeniedError):
        client.get("/adapters", cast_to=object)


def test_an_alias_that_moves_on_s3_is_followed_without_a_put(served: Served) -> None:
    endpoint = served.endpoint
    one = endpoint.ask("red")
    assert served.model_of("red") == "red@1"
    endpoint.registry.set_alias("red", "production", 2)
    began = time.monotonic()
    wait_until(lambda: served.model_of("red") == "red@2", "the alias is followed")
    print(f"the alias on S3 was followed after {time.monotonic() - began:.2f} s")
    assert endpoint.ask("red") != one


def test_an_adapter_below_an_s3_prefix_is_served_and_its_neighbour_is_not(served: Served) -> None:
    endpoint = served.endpoint
    put = endpoint.http.put("/v1/adapters/mine?wait=resident", json={"uri": f"{served.root}/red1"})
    assert put.status_code == 200, put.text
    assert endpoint.put("known", "red@1").status_code == 200
    assert endpoint.ask("mine") == endpoint.ask("red@1") != endpoint.ask("base")
    storage.write_bytes(f"{served.root}-evil/red1/adapter_config.json", b"{}")
    for uri in (f"{served.root}-evil/red1", f"{served.root}/../home", f"s3://{BUCKET}"):
        put = endpoint.http.put("/v1/adapters/x", json={"uri": uri})
        assert put.status_code == 400, put.text
    for name in ("mine", "known"):
        assert endpoint.http.delete(f"/v1/adapters/{name}").status_code == 200


def test_while_the_store_is_away_what_is_resident_answers_and_changes_are_503(served: Served) -> None:
    endpoint, store = served.endpoint, served.store
    assert endpoint.put("known", "red@1").status_code == 200
    evicted = endpoint.ask("known")
    expected, model = endpoint.ask("red"), served.model_of("red")
    (replica,) = endpoint.http.get("/v1/adapters").json()["replicas"]
    assert endpoint.http.get("/healthz").status_code == 200
    store.stop()
    try:
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            assert endpoint.ask("red") == endpoint.ask("red@production") == expected
            seconds.append(time.monotonic() - began)
        print("pairs of answers without a store took", " ".join(f"{s:.2f}" for s in seconds), "s")
        assert served.model_of("red") == model
        assert endpoint.ask("base")
        began = time.monotonic()
        assert endpoint.ask("known") == evicted, "out of this node's cache"
        print(f"the evicted one answered after {time.monotonic() - began:.2f} s")
        for path in ("/healthz", "/metrics", "/v1/models"):
            assert endpoint.http.get(path).status_code == 200, path
        began = time.monotonic()
        refused = endpoint.http.put("/v1/adapters/other", json={"uri": f"{served.root}/red1"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert "AWS_ENDPOINT_URL" in refused.json()["error"]["message"]
        print(f"a PUT was refused after {time.monotonic() - began:.2f} s")
    finally:
        store.start()
    endpoint.registry.set_alias("red", "production", 1)
    wait_until(lambda: served.model_of("red") == "red@1", "the store is heard again")
    assert endpoint.put("other", "red@2").status_code == 200
    assert endpoint.ask("other") == endpoint.ask("red@2")
    assert list(endpoint.http.get("/v1/adapters").json()["replicas"]) == [replica], "the same replica all the time"
