"""An endpoint deployed by a Serve config file, as operators do it, whose number of replicas follows the load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from service.registry import Registry
from service.settings import Settings
from tests.integration.serving import DEADLINE_S, Endpoint, free_port, wait_until
from tests.integration.waiting import wait_until as wait_longer

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
ROOT = Path(__file__).resolve().parents[2]
SCALING_S = 180.0  # Serve looks at the load every 10 s and averages over 30


@pytest.fixture(scope="module")
def deployed(
    ray_dashboard: str, base: Path, registry: Registry, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "loray-elastic",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {
                    "model": str(base),
                    "endpoint": "elastic",
                    "precision": "fp32",
                    "adapters": ["red@1"],
                    "engine": {"slots": 2, "max_context": 256, "lora_columns": 24, "threads": 1},
                    "replicas": {"min": 1, "max": 2, "upscale_delay_s": 1, "downscale_delay_s": 5},
                },
                "runtime_env": {"env_vars": {"LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache)}},
            }
        ],
    }
    file = tmp_path_factory.mktemp("deploy") / "endpoint.yaml"
    file.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).parent / "serve")
    command = [serve, "deploy", str(file), "--address", ray_dashboard]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
    try:
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as http, client:
            wait_longer(lambda: _answers(http), f"the endpoint at {url} answers", SCALING_S)
            yield Endpoint(url, http, client, registry, settings)
    finally:
        command = [serve, "shutdown", "--yes", "--address", ray_dashboard]
        subprocess.run(command, env=dict(os.environ), cwd=ROOT, capture_output=True, timeout=120, check=True)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def _states(deployed: Endpoint) -> list[str]:
    """The only adapter's state, on every live replica."""
    (adapter,) = deployed.http.get("/v1/adapters").json()["data"]
    return [report["state"] for report in adapter["replicas"].values()]


def test_replicas_come_and_go_with_the_load_and_no_request_notices(deployed: Endpoint) -> None:
    wait_until(lambda: _states(deployed) == ["resident"], "red is resident on the only replica")
    expected = deployed.ask("red@1", max_tokens=100)
    assert expected != deployed.ask("base", max_tokens=100)
    busy, done = threading.Event(), threading.Event()

    def client(until: threading.Event) -> int:
        answered = 0
        while not until.is_set():
            assert deployed.ask("red@1", max_tokens=100) == expected
            answered += 1
        return answered

    with ThreadPoolExecutor(8) as pool:
        quiet = pool.submit(client, done)  # is there when the second replica goes
        clients = [pool.submit(client, busy) for _ in range(7)]
        try:
            wait_longer(lambda: _states(deployed) == ["resident"] * 2, "a second replica has red", SCALING_S)
            busy.set()
            wait_longer(lambda: len(_states(deployed)) == 1, "one replica is left", SCALING_S)
        finally:
            busy.set()
            done.set()
        assert all(one.result() > 0 for one in (quiet, *clients))
    assert deployed.ask("red@1", max_tokens=100) == expected
