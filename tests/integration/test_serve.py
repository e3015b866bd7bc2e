"""A real endpoint on a real Ray cluster, over real HTTP: OpenAI's client, adapters that come and go, bad requests."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.base_models import resolve_base_model
from service.config import ServeConfig
from service.domain import ModelRef
from service.errors import ClusterError, ConfigError, ModelError
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
DEADLINE_S = 60.0
HELLO = [{"role": "user", "content": "Hello there"}]


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


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again, up to DEADLINE_S; the pause is an Event nobody sets."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError(f"not within {DEADLINE_S:g} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(str(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def registry(base: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """red@1, red@2, blue@1 fit; wide@1 takes 24 columns; foreign@1, template@1 and dora@1 must be refused."""
    registry = Registry(settings.home)
    directory = tmp_path_factory.mktemp("adapters")
    resolved = resolve_base_model(str(base), settings.cache)
    good = {"base_digest": resolved.digest, "renderer_digest": load_renderer(base).digest}

    def publish(family: str, seed: int, rank: int = 8, overrides: dict[str, str] | None = None, **options: Any) -> None:
        source = tiny.save_adapter(base, directory / f"{family}{seed}", seed, rank, **options)
        draft = {"base_model": "base", **good, **(overrides or {}), "rank": rank, "alpha": 2.0 * rank}
        registry.publish(family, source, ManifestDraft.model_validate(draft))

    publish("red", 1)
    publish("red", 2)
    publish("blue", 3)
    publish("wide", 4, rank=24)
    publish("foreign", 5, overrides={"base_digest": "f" * 64})
    publish("template", 6, overrides={"renderer_digest": "e" * 64})
    publish("dora", 7, use_dora=True)
    return registry


@pytest.fixture(scope="module")
def config(base: Path) -> ServeConfig:
    engine = {"slots": 4, "max_context": 256, "lora_columns": 24, "threads": 1}
    return ServeConfig.model_validate(
        {"model": str(base), "endpoint": "test", "precision": "fp32", "port": free_port(), "engine": engine}
    )


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, config: ServeConfig, registry: Registry, settings: Settings) -> Iterator[Endpoint]:
    from serve import app

    url = app.start(config, settings)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as http, client:
        yield Endpoint(url, http, client, registry, settings)
    app.stop()


@pytest.fixture
def loaded(endpoint: Endpoint) -> Iterator[Endpoint]:
    """red@1 and blue@1 resident; everything withdrawn and drained afterwards."""
    assert endpoint.put("red", "red@1").status_code == 200
    assert endpoint.put("blue", "blue@1").status_code == 200
    yield endpoint
    clear(endpoint)


def clear(endpoint: Endpoint) -> None:
    for name in endpoint.names():
        if name is not None:
            endpoint.http.delete(f"/v1/adapters/{name}").raise_for_status()
    wait_until(lambda: endpoint.names() == [], "all adapters are gone")


def test_the_base_answers_openais_client_and_says_who_answered(endpoint: Endpoint) -> None:
    answer = endpoint.client.chat.completions.create(model="base", messages=HELLO, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == "base"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_usage_counts_the_rendered_prompt(endpoint: Endpoint, base: Path) -> None:
    answer = endpoint.client.chat.completions.create(model="base", messages=HELLO, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(load_renderer(base).prompt_ids(HELLO))


def test_an_answer_equals_transformers_own(endpoint: Endpoint, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, renderer = AutoModelForCausalLM.from_pretrained(base), load_renderer(base)
    ids = model.dummy_inputs["input_ids"].new_tensor([renderer.prompt_ids(HELLO)])
    out = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=24, do_sample=False)
    assert endpoint.ask("base") == renderer.decode(out[0, ids.shape[1] :].tolist())


def test_a_stream_has_openais_events_in_openais_order(endpoint: Endpoint) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8, "temperature": 0}
    response = endpoint.post(**fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 8
    assert all(e["usage"] is None for e in events[:-1])
    assert len({e["id"] for e in events}) == 1
    assert {e["model"] for e in events} == {"base"}
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == endpoint.ask("base", max_tokens=8)


def test_stop_ends_the_answer_before_the_stop_text(endpoint: Endpoint) -> None:
    whole = endpoint.ask("base")
    stop = whole[10:12]
    response = endpoint.post(max_tokens=24, temperature=0, stop=["never there", stop]).json()
    assert response["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert response["choices"][0]["finish_reason"] == "stop"
    assert endpoint.stream("base", stop=stop) == whole[: whole.index(stop)]


def test_a_seed_reproduces_a_sampled_answer(endpoint: Endpoint) -> None:
    first = endpoint.ask("base", temperature=1.5, seed=5)
    assert endpoint.ask("base", temperature=1.5, seed=5) == first
    assert endpoint.stream("base", temperature=1.5, seed=5) == first
    # 24 tokens of some 97 at this temperature: that another seed gives the same text is less likely than 1e-12
    assert endpoint.ask("base", temperature=1.5, seed=6) != first


def test_adapters_are_put_while_requests_run_and_every_answer_is_its_own(loaded: Endpoint) -> None:
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
    one, two = loaded.ask("red", max_tokens=60), None
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(loaded.post, model="red", max_tokens=60, temperature=0) for _ in range(8)]
        assert loaded.put("red", "red@2").status_code == 200
        answers += [pool.submit(loaded.post, model="red", max_tokens=60, temperature=0) for _ in range(4)]
        bodies = [answer.result().json() for answer in answers]
    two = loaded.ask("red@2", max_tokens=60)
    assert one != two
    for body in bodies:
        assert body["choices"][0]["message"]["content"] == {"red@1": one, "red@2": two}[body["model"]]
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
    with endpoint.client.chat.completions.create(model="wide", messages=HELLO, max_tokens=200, stream=True) as stream:
        next(iter(stream))
        response = endpoint.http.put("/v1/adapters/red?wait=resident&timeout=1.5", json={"model": "red@1"})
        if response.status_code != 200:  # the long answer was still running
            assert response.status_code == 504
            assert "needs 8 columns, 0 free" in response.json()["error"]["message"]
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
        ("../red@1", 400, "model name"),
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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_completion_tokens": 250}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": [1]}, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_400_in_openais_shape(
    endpoint: Endpoint, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = endpoint.post(stream=stream, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_requests_that_are_not_even_json_have_their_statuses(endpoint: Endpoint) -> None:
    def send(content: bytes, kind: str = "application/json", path: str = "/v1/chat/completions") -> httpx.Response:
        return endpoint.http.post(path, content=content, headers={"content-type": kind})

    answers = {
        400: [send(b"{"), send(b'{"temperature": NaN}'), send(b"[]")],
        415: [send(b"{}", "text/plain"), send(b"{}", "")],
        413: [send(b" " * (5 * 2**20))],
        404: [send(b"{}", path="/v1/nothing"), endpoint.post(model="nobody")],
        405: [endpoint.http.get("/v1/chat/completions")],
    }
    for status, responses in answers.items():
        for response in responses:
            assert response.status_code == status, response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_openais_client_raises_its_own_exceptions(endpoint: Endpoint) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        endpoint.ask("nobody")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        endpoint.ask("base", temperature=7)


def test_unknown_fields_are_named_and_strict_makes_them_an_error(endpoint: Endpoint) -> None:
    response = endpoint.post(max_tokens=1, top_k=4, user="me")
    assert response.status_code == 200
    assert response.headers["x-loray-ignored"] == "top_k"
    body = {"model": "base", "messages": HELLO, "max_tokens": 1, "top_k": 4}
    strict = endpoint.http.post("/v1/chat/completions", json=body, headers={"x-loray-strict": "true"})
    assert strict.status_code == 400
    assert strict.json()["error"]["param"] == "top_k"


def test_a_client_that_goes_away_frees_its_slot(endpoint: Endpoint) -> None:
    for stream in (True, False):
        body = {"model": "base", "messages": HELLO, "max_tokens": 200, "stream": stream}
        with httpx.Client(base_url=endpoint.url, timeout=DEADLINE_S) as http:
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body, timeout=0.05)
        wait_until(lambda: endpoint.replica()["running"] == 0, "the slot is free")
    assert endpoint.ask("base", max_tokens=1)


def test_more_requests_than_slots_are_all_answered(endpoint: Endpoint) -> None:
    alone = endpoint.ask("base")
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda _: endpoint.ask("base"), range(12))) == {alone}


def test_health_is_told(endpoint: Endpoint) -> None:
    assert endpoint.http.get("/healthz").json() == {"status": "ok", "base_model": "base", "replicas": 1}


def test_a_wrong_config_leaves_the_running_endpoint_alone(endpoint: Endpoint, config: ServeConfig) -> None:
    import ray.serve as ray_serve

    from serve import app

    def started(**changes: Any) -> None:
        values = {**config.model_dump(by_alias=True), **changes}
        app.start(ServeConfig.model_validate(values), endpoint.settings)

    with pytest.raises(ModelError, match="nowhere"):
        started(model="nowhere")
    with pytest.raises(ConfigError, match="foreign@1"):
        started(adapters=("foreign@1", "red@1"))
    with pytest.raises(ClusterError, match="already"):
        started(endpoint="other")
    assert list(ray_serve.status().applications) == ["loray-test"]
    assert endpoint.names() == []
