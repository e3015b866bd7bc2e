"""An endpoint with API keys: every route wants one, each with its scope; only health is told to everybody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import serve
from service.config import ServeConfig
from service.settings import Settings
from tests.integration import tiny
from tests.integration.serving import DEADLINE_S, HELLO, free_port

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
INFER, ADMIN = "infer-secret-of-the-test", "admin-secret-of-the-test"


@pytest.fixture(scope="module")
def url(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from serve import app

    base = tiny.save_base(tmp_path_factory.mktemp("models") / "base")
    engine = {"slots": 2, "max_context": 128, "lora_columns": 8, "threads": 1}
    values = {"model": str(base), "endpoint": "locked", "precision": "fp32", "port": free_port(), "engine": engine}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAY_API_KEYS", f"infer:{INFER},admin:{ADMIN}")
        home = tmp_path_factory.mktemp("home")
        yield app.start(ServeConfig.model_validate(values), Settings(str(home), Path(home) / "cache"))
        app.stop("locked")


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
