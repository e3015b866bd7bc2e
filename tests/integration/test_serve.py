"""Chat over real HTTP: OpenAI's client and events, usage, stop, seed, bad requests, clients that go away, failed starts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.desired import EndpointFiles
from service.config import ServeConfig
from service.errors import ClusterError, ConfigError, ModelError
from service.registry import Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration.serving import HELLO, Endpoint

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_context", 100_000, "512"),  # the tiny model has 512 positions: the engine refuses, in the replica
        pytest.param(
            *("backend", "vllm", r"pip install 'loray\[vllm\]'"),
            marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: make test-vllm"),
        ),
    ],
    ids=["context", "no vllm"],
)
def test_a_replica_that_cannot_start_leaves_no_application_and_no_registration(
    ray_cluster: str, config: ServeConfig, registry: Registry, settings: Settings, key: str, value: Any, words: str
) -> None:
    import ray.serve as ray_serve

    from serve import app

    values = config.model_dump(by_alias=True)
    values["engine"][key] = value
    values["adapters"] = ("red@1",)
    with pytest.raises(ClusterError, match=words):
        app.start(ServeConfig.model_validate(values), settings)
    assert ray_serve.status().applications == {}
    assert EndpointFiles(settings.home, config.endpoint).read().adapters == {}, "the registration is taken back"


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


def test_several_answers_come_in_one_body_or_one_stream(endpoint: Endpoint) -> None:
    options: dict[str, Any] = {"model": "base", "messages": HELLO, "max_tokens": 12, "temperature": 1.5, "n": 3}
    answer = endpoint.client.chat.completions.create(**options, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == endpoint.ask("base", temperature=1.5, seed=5, max_tokens=12)
    assert answer.usage is not None and answer.usage.completion_tokens == 36
    streamed = ["", "", ""]
    ends = []
    for chunk in endpoint.client.chat.completions.create(**options, seed=5, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts and sorted(ends) == [0, 1, 2]


def test_penalties_biases_and_stop_ids_act(endpoint: Endpoint, base: Path) -> None:
    plain = endpoint.post(max_tokens=8, temperature=0, logprobs=True).json()["choices"][0]
    first = plain["logprobs"]["content"][0]["token"]
    ids = load_renderer(base).tokenizer(first, add_special_tokens=False)["input_ids"]
    banned = endpoint.post(max_tokens=8, temperature=0, logit_bias={str(ids[0]): -100}).json()["choices"][0]
    assert not banned["message"]["content"].startswith(first)
    ended = endpoint.post(max_tokens=8, temperature=0, stop_token_ids=ids[:1]).json()
    assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["finish_reason"] == "stop"
    for option in ({"repetition_penalty": 9.0}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}):
        assert endpoint.post(max_tokens=8, temperature=0, **option).json()["choices"][0] != plain


def test_an_answer_under_a_schema_is_json_of_it(endpoint: Endpoint) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = endpoint.ask("base", temperature=1.0, seed=1, max_tokens=100, response_format=wanted)
    assert json.loads(answer)["a"] in (1, 2)


def test_a_prompts_log_probabilities_are_the_models_own(endpoint: Endpoint, base: Path) -> None:
    """Through the official client's text completions, as an evaluation harness asks: prompts as text and as token ids."""
    import torch
    from transformers import AutoModelForCausalLM

    model, renderer = AutoModelForCausalLM.from_pretrained(base), load_renderer(base)
    texts = ["Hello there", "to be or not"]
    all_ids: list[list[int]] = [renderer.tokenizer(text)["input_ids"] for text in texts]
    prompts: list[Any] = [texts, all_ids]
    answers = [
        endpoint.client.completions.create(
            model="base", prompt=prompt, echo=True, max_tokens=1, logprobs=2, temperature=0
        )
        for prompt in prompts
    ]
    for number, (text, ids) in enumerate(zip(texts, all_ids, strict=True)):
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        for answer in answers:
            choice = answer.choices[number]
            assert choice.text.startswith(text) and choice.logprobs is not None
            seen: list[Any] = list(choice.logprobs.token_logprobs or [])
            assert len(seen) == len(ids) + 1 and seen[0] is None
            for place in range(1, len(ids)):
                assert seen[place] == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-3)
            assert seen[-1] == pytest.approx(float(expected[-1].max()), abs=1e-3)
            assert "".join(choice.logprobs.tokens or []) == choice.text
    streamed = endpoint.client.completions.create(
        model="base", prompt=texts[0], echo=True, max_tokens=1, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == answers[0].choices[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_completion_tokens": 250}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"n": 1000}, "n"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
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
    response = endpoint.post(max_tokens=1, top_z=4, user="me")
    assert response.status_code == 200
    assert response.headers["x-loray-ignored"] == "top_z"
    body = {"model": "base", "messages": HELLO, "max_tokens": 1, "top_z": 4}
    strict = endpoint.http.post("/v1/chat/completions", json=body, headers={"x-loray-strict": "true"})
    assert strict.status_code == 400
    assert strict.json()["error"]["param"] == "top_z"


def test_answers_of_many_megabytes_arrive_whole(endpoint: Endpoint) -> None:
    prompts = [[1 + (row + token) % 50 for token in range(240)] for row in range(40)]
    body = {"model": "base", "prompt": prompts, "echo": True, "max_tokens": 0, "logprobs": 20}
    answer = endpoint.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text[:500]
    assert len(answer.content) > 4 * 2**20  # the limit that gRPC has for a message unless told otherwise
    choices = answer.json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [240] * 40
    assert {len(top) for choice in choices for top in choice["logprobs"]["top_logprobs"][1:]} == {20}


def test_more_requests_than_slots_are_all_answered(endpoint: Endpoint) -> None:
    alone = endpoint.ask("base")
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda _: endpoint.ask("base"), range(12))) == {alone}


def test_health_is_told(endpoint: Endpoint) -> None:
    assert endpoint.http.get("/healthz").json() == {"status": "ok", "base_model": "base", "replicas": 1}


def test_serve_lets_requests_go_on_for_as_long_as_the_config_says(endpoint: Endpoint, config: ServeConfig) -> None:
    from serve import app

    assert app._graceful_s("loray-test") == app.drain_s(config.engine)
    with pytest.raises(ClusterError, match="loray-test could not be taken off Ray Serve within 0 s"):
        app._await_gone("loray-test", 0.0)


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
    assert list(ray_serve.status().applications) == ["loray-test"]
    assert endpoint.names() == []


def test_an_endpoint_answers_on_when_another_one_is_refused_and_stopped(
    endpoint: Endpoint, config: ServeConfig
) -> None:
    from serve import app

    before = endpoint.ask("base")
    values = {**config.model_dump(by_alias=True), "endpoint": "other", "adapters": ("red@1",)}
    with pytest.raises(ClusterError, match="'test' already"):
        app.start(ServeConfig.model_validate(values), endpoint.settings)
    assert endpoint.ask("base") == before
    assert EndpointFiles(endpoint.settings.home, "other").read().epoch == 0, "what cannot start writes nothing"
    app.stop("other")
    assert endpoint.ask("base") == before


def test_a_web_page_under_a_name_of_its_own_gets_no_answer(endpoint: Endpoint) -> None:
    port = httpx.URL(endpoint.url).port
    for host, status in {
        "evil.example": 400,
        f"evil.example:{port}": 400,
        f"127.0.0.1.evil.example:{port}": 400,
        f"127.0.0.1:{port}": 200,
        f"localhost:{port}": 200,
        f"[::1]:{port}": 200,
    }.items():
        assert endpoint.http.get("/v1/models", headers={"host": host}).status_code == status, host
    assert endpoint.http.delete("/v1/adapters/red", headers={"host": "evil.example"}).status_code == 400
