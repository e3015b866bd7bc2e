"""Two replicas of one endpoint: both converge to what is wanted, and one that is killed ends no more than the streams that it
had begun."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.config import ServeConfig
from service.registry import Registry
from service.settings import Settings
from tests.integration.serving import DEADLINE_S, HELLO, Endpoint, clear, free_port, served, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
NUM_STREAMS, NUM_ANSWERS = 2, 16
STEADY_S = 4.0  # the router hears of residents once a second, through Serve's controller


@pytest.fixture(scope="module")
def pair(ray_cluster: str, base: Path, registry: Registry, settings: Settings) -> Iterator[Endpoint]:
    engine = {"slots": 4, "max_context": 256, "lora_columns": 24, "threads": 1}
    values = {"model": str(base), "endpoint": "pair", "precision": "fp32", "port": free_port(), "engine": engine}
    with served(ServeConfig.model_validate({**values, "replicas": 2}), registry, settings) as pair:
        yield pair


def _states(pair: Endpoint) -> dict[str, str]:
    """The state of red, by replica."""
    (adapter,) = (one for one in pair.http.get("/v1/adapters").json()["data"] if one["name"] == "red")
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

    conversation = _each_on_its_own(pair, names, [["blue", "red"], ["wide"]])
    before = _resident(pair)
    for _ in range(30):
        assert conversation() == before
    for name in names:
        assert pair.ask(f"{name}@1") == expected[name]
    clear(pair)
    everywhere = pair.http.put("/v1/adapters/red?wait=all_replicas", json={"model": "red@1"})
    assert everywhere.status_code == 200 and list(_states(pair).values()) == ["resident"] * 2
    clear(pair)


def _each_on_its_own(
    pair: Endpoint, names: Sequence[str], groups: list[list[str]]
) -> Callable[[], dict[str, set[str]]]:
    """Ask until these are resident apart, and the router knows; what asks each once more, and says who is where."""
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
        return sorted(map(sorted, now.values())) == groups and time.monotonic() - seen[-1][0] > STEADY_S

    wait_until(settled, "each replica has its own adapters, and the router knows")
    return conversation


def _replica_pids(cluster: str) -> dict[str, int]:
    """Of the engines, by the last part of the replica's name."""
    from ray.util.state import list_actors

    actors: Any = list_actors(address=cluster, filters=[("state", "=", "ALIVE")], detail=True)
    return {
        actor.name.rpartition("#")[2]: actor.pid
        for actor in actors
        if actor.class_name.startswith("ServeReplica:") and "Engine" in actor.class_name
    }


def test_a_killed_replica_ends_its_own_streams_only_and_its_successor_converges(
    pair: Endpoint, ray_cluster: str
) -> None:
    clear(pair)
    names = ("red", "wide")  # 8 + 24 columns: they cannot share a replica's 24
    for name in names:
        assert pair.http.put(f"/v1/adapters/{name}", json={"model": f"{name}@1"}).status_code in (200, 202)
    _each_on_its_own(pair, names, [["red"], ["wide"]])
    before = _resident(pair)
    expected = {name: pair.ask(f"{name}@1", max_tokens=200) for name in names}
    assert expected["red"] != expected["wide"]
    pids = _replica_pids(ray_cluster)
    (victim,) = (replica for replica, resident in before.items() if resident == {"red"})
    assert len(pids) == 2

    begun = threading.Event()

    def body(name: str, n: int = NUM_ANSWERS) -> Any:
        return {"model": f"{name}@1", "messages": HELLO, "max_tokens": 200, "temperature": 0, "n": n}

    def whole(n: int) -> list[str | None]:
        return [one.message.content for one in pair.client.chat.completions.create(**body("red", n)).choices]

    def stream(name: str) -> list[str] | Exception:
        texts = [""] * NUM_ANSWERS
        try:
            for chunk in pair.client.chat.completions.create(**body(name), stream=True):
                if name == "red":
                    begun.set()
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        except (openai.APIError, httpx.HTTPError) as error:
            return error
        return texts

    with ThreadPoolExecutor() as pool:
        streams = {"wide": [pool.submit(stream, "wide") for _ in range(NUM_STREAMS)]}
        wholes = [pool.submit(whole, NUM_ANSWERS)]
        time.sleep(0.3)  # it is the first in red's line, and has half of its rows to go when the next one begins
        streams["red"] = [pool.submit(stream, "red") for _ in range(NUM_STREAMS)]
        wholes.append(pool.submit(whole, 1))
        assert begun.wait(DEADLINE_S) and not wholes[0].done()
        os.kill(pids[victim.rpartition("-")[2]], signal.SIGKILL)
        ends = {name: [one.result() for one in streams[name]] for name in names}
        answers = [one.result() for one in wholes]
    cut_short = [end for end in ends["red"] if isinstance(end, Exception)]
    assert len(cut_short) == 1, "the stream that had begun cannot begin anew, and the next in line had not"
    assert all(end == [expected["red"]] * NUM_ANSWERS for end in ends["red"] if end not in cut_short)
    assert answers == [[expected["red"]] * NUM_ANSWERS, [expected["red"]]], "of these the client had nothing yet"
    assert ends["wide"] == [[expected["wide"]] * NUM_ANSWERS] * NUM_STREAMS
    counted = pair.http.get("/metrics").text
    assert "loray_requests_sent_again_total 3.0" in counted, "two whole ones, and the stream that had not begun"
    ends_of_red = re.findall(r'loray_requests_total{arm="",end="(lost|error)",model="red@1",split=""} (\S+)', counted)
    assert sorted(ends_of_red) == [("error", "1.0"), ("lost", "1.0")]
    pair.http.delete("/v1/adapters/wide").raise_for_status()
    for _ in range(8):
        assert pair.ask("red@1", max_tokens=200) == expected["red"]

    def converged() -> bool:
        states = _states(pair)
        return victim not in states and [states[new] for new in set(states) - set(before)] == ["resident"]

    wait_until(converged, "the new replica has the adapter")
    assert len(_replica_pids(ray_cluster)) == 2
