"""Two replicas of one endpoint: both converge to what is wanted, and one that is killed takes nobody else with it."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.config import ServeConfig
from service.registry import Registry
from service.settings import Settings
from tests.integration.serving import DEADLINE_S, HELLO, Endpoint, clear, free_port, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
NUM_STREAMS = 6
STEADY_S = 4.0  # the router hears of residents once a second, through Serve's controller


@pytest.fixture(scope="module")
def pair(ray_cluster: str, base: Path, registry: Registry, settings: Settings) -> Iterator[Endpoint]:
    from serve import app

    engine = {"slots": 4, "max_context": 256, "lora_columns": 24, "threads": 1}
    values = {"model": str(base), "endpoint": "pair", "precision": "fp32", "port": free_port(), "engine": engine}
    url = app.start(ServeConfig.model_validate({**values, "replicas": 2}), settings)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as http, client:
        yield Endpoint(url, http, client, registry, settings)
    app.stop("pair")


def _states(pair: Endpoint) -> dict[str, str]:
    """The state of the only adapter, by replica."""
    (adapter,) = pair.http.get("/v1/adapters").json()["data"]
    return {replica: report["state"] for replica, report in adapter["replicas"].items()}


def _resident(pair: Endpoint) -> dict[str, set[str]]:
    """Names of resident adapters, by replica."""
    found: dict[str, set[str]] = {}
    for adapter in pair.http.get("/v1/adapters").json()["data"]:
        for replica, report in adapter["replicas"].items():
            found.setdefault(replica, set()).update([adapter["name"]] if report["state"] == "resident" else [])
    return found


def test_requests_go_where_their_adapter_is_resident(pair: Endpoint) -> None:
    names = ("red", "blue", "wide")  # 8 + 8 + 24 columns, 24 on each replica
    for name in names:
        assert pair.http.put(f"/v1/adapters/{name}", json={"model": f"{name}@1"}).status_code in (200, 202)
    expected = {name: pair.ask(f"{name}@1") for name in names}
    assert len(set(expected.values())) == 3

    numbers = itertools.count()
    seen: list[tuple[float, dict[str, set[str]]]] = []  # since when everything has been where it is

    def conversation() -> dict[str, set[str]]:
        """Ask each of them about something new: a conversation has a replica of its own choice but for the adapter."""
        messages = [{"role": "user", "content": f"Hello number {next(numbers)}"}]
        for name in names:
            pair.ask(f"{name}@1", messages, max_tokens=2)
        return _resident(pair)

    def settled() -> bool:
        now = conversation()
        if not seen or seen[-1][1] != now:
            seen.append((time.monotonic(), now))
        each_its_own = sorted(map(sorted, now.values())) == [["blue", "red"], ["wide"]]
        return each_its_own and time.monotonic() - seen[-1][0] > STEADY_S

    wait_until(settled, "each replica has its own adapters, and the router knows")
    before = _resident(pair)
    for _ in range(30):
        assert conversation() == before
    for name in names:
        assert pair.ask(f"{name}@1") == expected[name]
    clear(pair)


def _replica_pids(cluster: str) -> list[int]:
    from ray.util.state import list_actors

    actors: Any = list_actors(address=cluster, filters=[("state", "=", "ALIVE")], detail=True)
    return [
        actor.pid for actor in actors if actor.class_name.startswith("ServeReplica:") and "Engine" in actor.class_name
    ]


def test_a_killed_replica_ends_its_own_streams_only_and_its_successor_converges(
    pair: Endpoint, ray_cluster: str
) -> None:
    clear(pair)
    put = pair.http.put("/v1/adapters/red", params={"wait": "all_replicas"}, json={"model": "red@1"})
    assert put.status_code == 200, put.text
    before = _states(pair)
    assert len(before) == 2 and set(before.values()) == {"resident"}
    expected = pair.ask("red@1", max_tokens=200)
    pids = _replica_pids(ray_cluster)
    assert len(pids) == 2

    def stream(number: int) -> str:
        body: Any = {"model": "red@1", "messages": HELLO, "max_tokens": 200, "temperature": 0, "stream": True}
        chunks = pair.client.chat.completions.create(**body)
        try:
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        except (openai.APIError, httpx.HTTPError) as error:
            return f"failed: {error}"

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        answers = [pool.submit(stream, number) for number in range(NUM_STREAMS)]
        wait_until(
            lambda: sum(r["running"] for r in pair.http.get("/v1/adapters").json()["replicas"].values()) > 1, "both run"
        )
        os.kill(pids[0], signal.SIGKILL)
        texts = [answer.result() for answer in answers]
    whole = [text for text in texts if text == expected]
    failed = [text for text in texts if text.startswith("failed: ")]
    assert whole, texts
    assert len(whole) + len(failed) == NUM_STREAMS, "no answer is cut short without an error"
    for _ in range(8):
        assert pair.ask("red@1", max_tokens=200) == expected

    def converged() -> bool:
        now = _states(pair)
        return len(set(now) - set(before)) == 1 and set(now.values()) == {"resident"}

    wait_until(converged, "the new replica has the adapter")
    assert len(_replica_pids(ray_cluster)) == 2
