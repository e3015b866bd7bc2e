"""`loray serve` as its own process, ended by a signal while it answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from service.config import EngineBlock, ServeConfig
from service.settings import Settings
from tests.integration.serving import DEADLINE_S, HELLO
from tests.integration.waiting import wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0  # a process that imports everything, on a busy machine
NUM_ANSWERS = 48  # twelve turns of four slots


def _says(word: str, server: subprocess.Popen[bytes], log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    return word in log.read_text()


@pytest.mark.long
def test_sigterm_lets_a_stream_end_and_then_exits_with_zero(
    ray_cluster: str, config: ServeConfig, settings: Settings, tmp_path: Path
) -> None:
    from serve import app

    file, log, url = tmp_path / "serve.yaml", tmp_path / "log", f"http://127.0.0.1:{config.port}"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_none=True)))
    roots = {"LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache), "RAY_ADDRESS": ray_cluster}
    command = [sys.executable, "-m", "service.cli.app", "serve", str(file)]
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=ROOT, env=os.environ | roots, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: _says("Serving", server, log), "it serves", START_S)
        body = {"model": "base", "messages": HELLO, "max_tokens": 200, "temperature": 0, "n": NUM_ANSWERS}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=DEADLINE_S
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: _says("Stopping", server, log), "the server was told", DEADLINE_S)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert sum('"finish_reason": "length"' in event for event in events) == NUM_ANSWERS
        assert server.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
            app.stop(config.endpoint)  # or nobody else could serve on this cluster
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(("slots", "max_context", "turns"), [(16, 2048, 32), (4, 256, 32), (1, 512, 128)])
def test_an_endpoint_that_ends_waits_for_a_full_line_of_answers_as_long_as_the_context(
    slots: int, max_context: int, turns: int
) -> None:
    """At ten tokens a second. One slot: a line is never shorter than the 128 answers that one request may ask for."""
    from serve.app import drain_s

    engine = EngineBlock(slots=slots, max_context=max_context)
    assert drain_s(engine) == pytest.approx(turns * max_context / 10)
