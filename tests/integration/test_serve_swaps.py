"""A hundred loads, unloads and moves of an alias under sixteen streams: nobody else's answer fails or differs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.config import ServeConfig
from service.registry import Registry
from service.settings import Settings
from tests.integration import tiny
from tests.integration.serving import Endpoint, free_port, publish, served, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
SURVIVORS = ("red@1", "red@2", "blue@1", "green@1")
NUM_STREAMS, NUM_ROUNDS = 16, 20  # five changes a round


@pytest.fixture(scope="module")
def swapped(
    ray_cluster: str, base: Path, registry: Registry, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """The survivors resident, with room for three more adapters; spare@1, moving@1 and moving@2 are in the registry."""
    engine = {"slots": NUM_STREAMS, "max_context": 256, "lora_columns": 7 * 8, "threads": 1}
    values = {"model": str(base), "endpoint": "swapped", "precision": "fp32", "port": free_port(), "engine": engine}
    with served(ServeConfig.model_validate(values), registry, settings) as endpoint:
        for seed, family in enumerate(("green", "spare", "moving", "moving"), start=30):
            publish(endpoint, family, tiny.save_adapter(base, tmp_path_factory.mktemp(family) / "adapter", seed))
        for model in SURVIVORS:
            assert endpoint.put(model.replace("@", "-"), model).status_code == 200
        yield endpoint


def test_a_hundred_swaps_fail_no_request_and_change_no_answer_of_the_others(swapped: Endpoint) -> None:
    def answer(number: int) -> str:
        """One stream: four to each survivor, each about something else."""
        message = {"role": "user", "content": f"Question {number}"}
        return swapped.stream(SURVIVORS[number % len(SURVIVORS)], [message], max_tokens=200)

    def ask(model: str) -> tuple[str, str]:
        body: Any = swapped.post(model=model, max_tokens=24, temperature=0).raise_for_status().json()
        return body["model"], body["choices"][0]["message"]["content"]

    ended = threading.Event()

    def go_on(number: int) -> list[str]:
        answers = []
        while not ended.is_set():
            answers.append(answer(number))
        return answers

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        undisturbed = list(pool.map(answer, range(NUM_STREAMS)))
    assert len(set(undisturbed)) == NUM_STREAMS, "adapters and questions make a difference, else nothing is proved"
    swapped.registry.set_alias("moving", "production", 1)
    swapped.http.put(
        "/v1/adapters/moving", params={"wait": "resident"}, json={"model": "moving@production"}
    ).raise_for_status()
    spare, moving = set(), {1: set[str](), 2: set[str]()}
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(go_on, number) for number in range(NUM_STREAMS)]
        try:
            for number in range(NUM_ROUNDS):
                for _ in range(2):
                    swapped.http.put("/v1/adapters/spare", json={"model": "spare@1"}).raise_for_status()
                    spare.add(ask("spare"))  # loads it
                    swapped.http.delete("/v1/adapters/spare").raise_for_status()
                version = 2 - number % 2
                swapped.registry.set_alias("moving", "production", version)
                wait_until(lambda version=version: ask("moving")[0] == f"moving@{version}", "the alias is followed")  # type: ignore[misc]
                moving[version].add(ask("moving")[1])
        finally:
            ended.set()
        answers = [stream.result() for stream in streams]
    assert all(set(seen) == {alone} for seen, alone in zip(answers, undisturbed, strict=True))
    assert {model for model, _ in spare} == {"spare@1"} and len(spare) == 1
    assert all(len(texts) == 1 for texts in moving.values()) and moving[1] != moving[2]
