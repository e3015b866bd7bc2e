"""Adapters of a running endpoint: put, swapped, evicted, deleted and refused while requests flow."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.desired import EndpointFiles
from serve.registration import register
from serve.routing import Registered
from service.config import ServeConfig
from service.domain import ModelRef
from service.registry import Registry
from service.settings import Settings
from tests.integration.serving import HELLO, Endpoint, clear, wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]


def test_base_and_adapters_in_one_batch_answer_as_each_does_alone(loaded: Endpoint) -> None:
    models = ["base", "red", "blue@1"]
    questions = [[{"role": "user", "content": f"Question {i}"}] for i in range(4)]
    jobs = [(model, question) for question in questions for model in models]
    alone = [loaded.ask(model, question) for model, question in jobs]
    for i in range(0, len(alone), 3):
        assert len(set(alone[i : i + 3])) == 3, "base and adapters answer differently, else the test proves nothing"
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: loaded.stream(*job), jobs))
    assert together == alone


def test_the_body_names_the_version_that_answered(loaded: Endpoint) -> None:
    body = loaded.post(model="red", max_tokens=1).json()
    assert body["model"] == "red@1"
    assert body["loray"]["model_digest"] == loaded.registry.manifest(ModelRef.parse("red@1")).digest
    names = [model.id for model in loaded.client.models.list()]
    assert names == ["base", "blue", "red", "blue@1", "red@1"]


def test_an_alias_is_followed_and_its_version_must_be_registered(loaded: Endpoint) -> None:
    loaded.registry.set_alias("blue", "production", 1)
    wait_until(lambda: loaded.post(model="blue@production", max_tokens=1).status_code == 200, "the alias is known")
    loaded.registry.set_alias("red", "canary", 2)
    response = loaded.post(model="red@canary", max_tokens=1)
    assert response.status_code == 404
    assert "red@1" in response.json()["error"]["message"]


def test_a_swap_under_load_finishes_each_answer_on_the_version_it_started_with(loaded: Endpoint) -> None:
    one = loaded.ask("red", max_tokens=60)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(loaded.post, model="red", max_tokens=60, temperature=0) for _ in range(8)]
        answers[0].result()  # the first one is answered, the next are under way
        assert loaded.put("red", "red@2").status_code == 200
        answers += [pool.submit(loaded.post, model="red", max_tokens=60, temperature=0) for _ in range(4)]
        bodies = [answer.result().json() for answer in answers]
    two = loaded.ask("red@2", max_tokens=60)
    assert one != two
    for body in bodies:
        assert body["choices"][0]["message"]["content"] == {"red@1": one, "red@2": two}[body["model"]]
    assert "red@1" in {body["model"] for body in bodies[:8]}
    assert {body["model"] for body in bodies[-4:]} == {"red@2"}
    wait_until(lambda: loaded.replica()["free_columns"] == 8, "the old version has given its columns back")


def test_a_deleted_adapter_is_unknown_at_once_and_frees_its_columns(loaded: Endpoint) -> None:
    assert loaded.http.delete("/v1/adapters/red").json()["deleted"] is True
    response = loaded.post(model="red", max_tokens=1)
    assert response.status_code == 404
    assert "blue" in response.json()["error"]["message"]
    assert loaded.http.delete("/v1/adapters/red").status_code == 404
    wait_until(lambda: loaded.replica()["free_columns"] == 16, "red's 8 of 24 columns are free")


def test_short_columns_evict_the_idle_and_requests_bring_the_evicted_back(loaded: Endpoint) -> None:
    before = loaded.ask("red")
    assert loaded.put("wide", "wide@1").status_code == 200
    states = {a["name"]: a["state"] for a in loaded.http.get("/v1/adapters").json()["data"]}
    assert states == {"wide": "resident", "red": "cached", "blue": "cached"}
    assert loaded.ask("red") == before


def test_without_room_a_put_says_pending_and_keeps_the_registration(endpoint: Endpoint) -> None:
    endpoint.put("wide", "wide@1")
    answered = threading.Event()

    def keep_busy() -> None:
        while not answered.is_set():
            endpoint.post(model="wide", max_tokens=100).raise_for_status()

    # Twelve callers on four slots: there are always some in line, so wide is in use until the PUT is answered.
    with ThreadPoolExecutor(12) as pool:
        callers = [pool.submit(keep_busy) for _ in range(12)]
        try:
            wait_until(lambda: endpoint.replica()["running"] > 8, "wide is in use")
            response = endpoint.http.put("/v1/adapters/red?wait=resident&timeout=2", json={"model": "red@1"})
        finally:
            answered.set()
        for caller in callers:
            caller.result()
    assert response.status_code == 504
    assert "needs 8 columns, 0 free" in response.json()["error"]["message"]
    assert endpoint.names() == ["red", "wide"]
    wait_until(lambda: endpoint.post(model="red", max_tokens=1).status_code == 200, "red has found room")
    clear(endpoint)


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("foreign@1", 400, "ffffffffffff"),
        ("template@1", 400, "eeeeeeeeeeee"),
        ("dora@1", 400, "dora"),
        ("red@9", 404, "red@"),
        ("nobody@1", 404, "red"),
        ("red", 404, "production"),
        ("../red@1", 400, "no valid name"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_and_not_registered(
    endpoint: Endpoint, model: str, status: int, said: str
) -> None:
    response = endpoint.put("x", model)
    assert response.status_code == status, response.text
    assert said in response.json()["error"]["message"].lower()
    assert "x" not in endpoint.names()
    assert endpoint.ask("base", max_tokens=1)
    wait_until(lambda: endpoint.names() == [], "nothing of it is left")


def test_the_bases_own_name_and_malformed_names_are_no_adapter_names(endpoint: Endpoint) -> None:
    assert endpoint.put("base", "red@1").status_code == 409
    assert endpoint.put("UPPER", "red@1").status_code == 400
    assert endpoint.put("blue@1", "red@1").status_code == 400


@pytest.mark.parametrize("query", ["wait=soon", "timeout=5", "wait=resident&timeout=nan", "wait=resident&timeout=-1"])
def test_a_wait_that_makes_no_sense_is_400_and_registers_nothing(endpoint: Endpoint, query: str) -> None:
    response = endpoint.http.put(f"/v1/adapters/red?{query}", json={"model": "red@1"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in ("wait", "timeout")
    assert endpoint.names() == []


def test_unknown_parts_of_a_put_are_named(endpoint: Endpoint) -> None:
    response = endpoint.http.put("/v1/adapters/red?now=1", json={"model": "red@1", "colour": "red"})
    assert response.status_code in (200, 202)
    assert response.headers["x-loray-ignored"] == "colour, ?now"
    clear(endpoint)


def test_the_serve_files_adapters_have_a_label_each_and_nothing_is_written_by_looking(
    config: ServeConfig, registry: Registry, settings: Settings
) -> None:
    from serve.app import prepare

    registry.set_alias("blue", "production", 1)
    registry.set_alias("red", "production", 1)
    registry.set_alias("red", "canary", 2)
    values = {
        **config.model_dump(by_alias=True),
        "endpoint": "other",
        "adapters": ("red@production", "red@canary", "blue"),
    }
    prepared = prepare(ServeConfig.model_validate(values), settings)
    models = {label: entry.model for label, entry in prepared.adapters.items()}
    assert models == {"red@1": "red@1", "red@2": "red@2", "blue": "blue@1"}
    assert prepared.adapters["blue"].digest == registry.manifest(ModelRef.parse("blue@1")).digest
    assert prepared.files.read().epoch == 0


def test_a_registration_taken_back_leaves_what_was_there_and_what_others_wrote_since(tmp_path: Path) -> None:
    files = EndpointFiles(str(tmp_path), "e")
    one, two, other = (Registered(model=f"red@{n}", digest=f"d{n}") for n in (1, 2, 3))
    register(files, {"kept": one, "swapped": one})
    registration = register(files, {"swapped": two, "new": two, "taken": two})
    register(files, {"taken": other})
    registration.take_back()
    adapters = files.read().adapters
    assert {label: entry.model for label, entry in adapters.items()} == {
        "kept": "red@1",
        "swapped": "red@1",
        "taken": "red@3",
    }
    assert files.read().epoch == 4


def test_a_split_divides_traffic_by_key_and_every_answer_says_its_arm(loaded: Endpoint) -> None:
    url = "/v1/endpoints/test/splits/support"
    arms = {"control": {"model": "red@1", "weight": 50}, "candidate": {"model": "blue@1", "weight": 50}}
    put = loaded.http.put(url, json={"arms": arms, "salt": "a"})
    assert put.status_code == 200, put.text
    try:
        alone = {"control": loaded.ask("red@1"), "candidate": loaded.ask("blue@1")}
        seen: dict[str, str] = {}
        for number in range(12):
            headers = {"x-loray-key": f"user-{number}"}
            body = {"model": "support", "messages": HELLO, "max_tokens": 24, "temperature": 0}
            answers = [loaded.http.post("/v1/chat/completions", json=body, headers=headers) for _ in range(2)]
            arm = answers[0].headers["x-loray-arm"]
            for answer in answers:
                assert answer.json()["loray"]["arm"] == answer.headers["x-loray-arm"] == arm
                assert answer.json()["model"] == answer.headers["x-loray-model"] == arms[arm]["model"]
                assert answer.json()["choices"][0]["message"]["content"] == alone[arm]
            explained = loaded.http.get("/v1/resolve", params={"model": "support"}, headers=headers).json()
            assert (explained["arm"], explained["split"]) == (arm, "support")
            seen[arm] = str(number)
        assert set(seen) == set(arms)
        counted = loaded.http.get("/metrics").text
        for arm, entry in arms.items():
            row = f'loray_requests_total{{arm="{arm}",end="ok",model="{entry["model"]}",split="support"}}'
            (line,) = (line for line in counted.splitlines() if line.startswith(row))
            assert float(line.rsplit(" ", 1)[1]) >= 2
        keyless = loaded.post(model="support", max_tokens=2).json()
        assert keyless["loray"]["arm"] == "control"
        by_field = loaded.post(model="support", max_tokens=2, metadata={"user": f"user-{seen['candidate']}"}).json()
        assert by_field["loray"]["arm"] == "candidate"
        assert loaded.http.delete("/v1/adapters/red@1").status_code == 409
        assert [split["name"] for split in loaded.http.get("/v1/endpoints/test/splits").json()["data"]] == ["support"]
    finally:
        assert loaded.http.delete(url).status_code == 200
    assert loaded.post(model="support").status_code == 404
    assert loaded.http.get("/v1/resolve", params={"model": "support"}).status_code == 404
    assert loaded.http.put("/v1/endpoints/other/splits/support", json={"arms": arms}).status_code == 404
    bad = {"arms": {"a": {"model": "foreign@1", "weight": 1}, "b": {"model": "nobody@1", "weight": 1}}}
    refused = loaded.http.put(url, json=bad)
    assert refused.status_code == 400 and "foreign@1" in refused.text and "nobody" in refused.text
