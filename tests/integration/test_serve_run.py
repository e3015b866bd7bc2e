"""`serve run serve.app:build`, as users of Ray Serve type it: it answers, and never to the world without keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.integration import tiny
from tests.integration.serving import DEADLINE_S, HELLO, free_port, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
]
ROOT = Path(__file__).resolve().parents[2]
SERVE = str(Path(sys.executable).parent / "serve")


@contextmanager
def running(cluster: str, dashboard: str, host: str, port: int) -> Iterator[dict[str, str]]:
    """Ray Serve without an application; the environment of who runs one on it."""
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    start = [SERVE, "start", "--http-host", host, "--http-port", str(port)]
    subprocess.run(start, env=environment, cwd=ROOT, capture_output=True, timeout=DEADLINE_S, check=True)
    try:
        yield environment
    finally:
        stop = [SERVE, "shutdown", "--yes", "--address", dashboard]
        subprocess.run(stop, env=dict(os.environ), cwd=ROOT, capture_output=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context as long as the default: `serve run` takes plain values only."""
    return tiny.save_base(tmp_path_factory.mktemp("base"), max_position_embeddings=2048)


def command(base: Path) -> list[str]:
    return [SERVE, "run", "serve.app:build", f"model={base}", "endpoint=typed", "precision=fp32"]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_serve_run_answers(
    ray_cluster: str, ray_dashboard: str, base: Path, settings: Settings, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(ray_cluster, ray_dashboard, "127.0.0.1", port) as environment:
        environment |= {"LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache)}
        log = tmp_path / "serve-run.log"
        with log.open("w") as file:
            driver = subprocess.Popen(command(base), env=environment, cwd=ROOT, stdout=file, stderr=file)
        try:
            wait_until(lambda: driver.poll() is not None or answers(url), "it answers")
            assert driver.poll() is None, log.read_text()[-3000:]
            body = {"model": base.name, "messages": HELLO, "max_tokens": 2}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
        finally:
            driver.terminate()
            driver.wait(DEADLINE_S)


def test_serve_run_refuses_a_serve_that_the_world_can_reach_where_there_are_no_keys(
    ray_cluster: str, ray_dashboard: str, base: Path, settings: Settings
) -> None:
    port = free_port()
    with running(ray_cluster, ray_dashboard, "0.0.0.0", port) as environment:  # noqa: S104
        environment |= {"LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache)}
        done = subprocess.run(
            command(base), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode != 0
        assert "Ray Serve listens on 0.0.0.0 in this cluster, and there are no API keys" in done.stdout + done.stderr
        assert not answers(f"http://127.0.0.1:{port}")
