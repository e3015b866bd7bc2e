"""Adapters of a running endpoint: put from registry or URI, swapped, evicted, deleted and refused while requests flow."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.adapter_sync import POLL_EVERY_S
from serve.desired import HEARTBEAT_EVERY_S, EndpointFiles
from serve.last_known import AGAIN_S
from serve.registration import from_uri, register
from serve.routing import Registered
from service.config import ServeConfig
from service.domain import ModelRef
from service.errors import ConfigError
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration.serving import DEADLINE_S, HELLO, Endpoint, clear, wait_until

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


def test_one_adapter_can_be_asked_for_by_its_name(loaded: Endpoint) -> None:
    listed = {entry["name"]: entry for entry in loaded.http.get("/v1/adapters").json()["data"]}
    one = loaded.http.get("/v1/adapters/red").json()
    assert one == listed["red"]
    assert one["state"] == "resident" and [r["state"] for r in one["replicas"].values()] == ["resident"]
    absent = loaded.http.get("/v1/adapters/grey")
    assert absent.status_code == 404 and "'grey' is not registered" in absent.json()["error"]["message"]


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
    data = loaded.http.get("/v1/adapters").json()["data"]
    assert {a["name"]: a["state"] for a in data} == {"wide": "resident", "red": "cached", "blue": "cached"}
    held = {a["name"]: sum(report["bytes"] for report in a["replicas"].values()) for a in data}
    assert held["red"] == held["blue"] == 0 < held["wide"]
    assert loaded.ask("red") == before


def test_a_pinned_adapter_makes_no_room_until_it_is_put_without_its_pin(loaded: Endpoint) -> None:
    def states() -> dict[str, str]:
        return {a["name"]: a["state"] for a in loaded.http.get("/v1/adapters").json()["data"]}

    pinned: Any = {"params": {"wait": "resident"}, "json": {"model": "red@1", "pin": True}}
    assert loaded.http.put("/v1/adapters/red", **pinned).status_code == 200
    before = loaded.ask("red")
    loaded.ask("blue")  # the one used last, so that red would be the one to go
    loaded.http.put("/v1/adapters/wide", json={"model": "wide@1"}).raise_for_status()
    refused = loaded.post(model="wide", max_tokens=1)
    assert refused.status_code == 409, refused.text
    assert "needs 24 columns, and pinned adapters leave 16" in refused.json()["error"]["message"]
    assert loaded.put("other", "red@2").status_code == 200
    assert states()["red"] == "resident" and loaded.ask("red") == before
    unpinned = loaded.http.put("/v1/adapters/red", json={"model": "red@1"})
    assert unpinned.status_code in (200, 202)  # wide, which waits for room, may have taken red's already
    wait_until(lambda: loaded.post(model="wide", max_tokens=1).status_code == 200, "the replica has heard of it")
    assert states()["red"] == "cached"


def test_without_room_a_put_says_pending_and_keeps_the_registration(endpoint: Endpoint) -> None:
    endpoint.put("wide", "wide@1")
    answered = threading.Event()

    def keep_busy() -> None:
        while not answered.is_set():
            endpoint.post(model="wide", max_tokens=100).raise_for_status()

    # Twelve callers on four slots: eight rows are always at hand of the engine, so wide is in use until the PUT is answered.
    with ThreadPoolExecutor(12) as pool:
        callers = [pool.submit(keep_busy) for _ in range(12)]
        try:
            wait_until(lambda: endpoint.replica()["running"] == 8, "wide is in use")
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
    config: ServeConfig, registry: Registry, settings: Settings, adapter_root: Path
) -> None:
    from serve.app import prepare

    registry.set_alias("blue", "production", 1)
    registry.set_alias("red", "production", 1)
    registry.set_alias("red", "canary", 2)
    values = {
        **config.model_dump(by_alias=True),
        "endpoint": "other",
        "adapters": ("red@production", "red@canary", "blue", f"{adapter_root}/wide4/"),
    }
    prepared = prepare(ServeConfig.model_validate(values), settings)
    models = {label: entry.model for label, entry in prepared.adapters.items()}
    pinned = f"wide4@sha256-{prepared.adapters['wide4'].digest[:12]}"
    assert models == {"red@production": "red@1", "red@canary": "red@2", "blue": "blue@1", "wide4": pinned}
    assert prepared.adapters["blue"].digest == registry.manifest(ModelRef.parse("blue@1")).digest
    assert prepared.files.read().epoch == 0
    for roots in (("nowhere", "s3://a/../b"), ()):
        with pytest.raises(ConfigError) as caught:
            prepare(ServeConfig.model_validate({**values, "adapter_roots": roots}), settings)
        said = ["'nowhere' is no directory", "is no plain key"] if roots else ["adapter_roots in the serve file"]
        assert all(one in str(caught.value) for one in said)


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


def test_a_home_that_is_not_mounted_for_a_while_looks_empty_and_nothing_is_forgotten(loaded: Endpoint) -> None:
    before = {name: loaded.ask(name) for name in ("base", "red", "blue@1")}
    names, home = loaded.names(), Path(loaded.settings.home)
    assert loaded.http.get("/healthz").status_code == 200
    aside, mount_point = home.with_name("unmounted"), home.with_name("mount-point")
    mount_point.mkdir()
    home.rename(aside)
    try:
        mount_point.rename(home)
        for refused in (loaded.http.delete("/v1/adapters/red"), loaded.put("new", "red@2")):
            assert refused.status_code == 503
            assert "LORAY_HOME" in refused.json()["error"]["message"]
        noticed = time.time()
        while time.time() < noticed + HEARTBEAT_EVERY_S + POLL_EVERY_S:
            assert {name: loaded.ask(name) for name in before} == before
            assert loaded.http.get("/healthz").status_code == 200
        written = [file for file in home.rglob("*") if file.is_file() and file.stat().st_mtime > noticed + POLL_EVERY_S]
        assert written == [], "nothing is written below a mount that is away"
    finally:
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
    wait_until(lambda: loaded.put("red", "red@2").status_code == 200, "changes are taken again")
    assert loaded.ask("red") == loaded.ask("red@2") != before["red"]
    wait_until(lambda: loaded.names() == names, "what was there is there, and red@1 has gone")


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
        assert 'loray_keyless_requests_total{split="support"} 1.0' in loaded.http.get("/metrics").text
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


def put_uri(endpoint: Endpoint, name: str, uri: Path | str, **fields: Any) -> httpx.Response:
    body = {"uri": str(uri), **fields}
    return endpoint.http.put(f"/v1/adapters/{name}", params={"wait": "resident"}, json=body)


def pefts_answer(base: Path, adapter: Path) -> str:
    """What PEFT and transformers say to HELLO, one request at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, renderer = AutoModelForCausalLM.from_pretrained(base), load_renderer(base)
    ids = model.dummy_inputs["input_ids"].new_tensor([renderer.prompt_ids(HELLO)])
    tuned = PeftModel.from_pretrained(model, adapter)
    out = tuned.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=24, do_sample=False)
    return renderer.decode(out[0, ids.shape[1] :].tolist())


def test_an_adapter_at_a_uri_answers_as_peft_does_and_a_put_takes_what_lies_there_now(
    loaded: Endpoint, base: Path, adapter_root: Path
) -> None:
    directory = adapter_root / "moving"
    shutil.copytree(adapter_root / "blue3", directory)
    put = put_uri(loaded, "mine", f"file://{directory}")
    assert put.status_code == 200, put.text
    first = put.json()
    assert (first["state"], first["uri"]) == ("resident", f"file://{directory}")
    assert first["model"] == f"mine@sha256-{first['digest'][:12]}"
    answer = loaded.post(model="mine", max_tokens=24, temperature=0).json()
    assert (answer["model"], answer["loray"]["model_digest"]) == (first["model"], first["digest"])
    text = answer["choices"][0]["message"]["content"]
    assert text == pefts_answer(base, directory) != loaded.ask("base")
    assert loaded.ask(first["model"]) == loaded.ask("blue") == text, "its exact name, and the registry's blue@1"
    assert {"mine", first["model"]} <= {model.id for model in loaded.client.models.list()}

    split = "/v1/endpoints/test/splits/half"
    arms = {"one": {"model": first["model"], "weight": 1}, "two": {"model": "blue@1", "weight": 0}}
    assert loaded.http.put(split, json={"arms": arms}).status_code == 200
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_root / "red1" / name, directory / name)
    assert loaded.ask("mine") == text, "what was registered goes on answering"
    second = put_uri(loaded, "mine", directory).json()
    assert second["model"] != first["model"]
    answer = loaded.post(model="mine", max_tokens=24, temperature=0).json()
    assert answer["model"] == second["model"]
    assert answer["choices"][0]["message"]["content"] == loaded.ask("red") != text
    arm = loaded.post(model="half", max_tokens=24, temperature=0).json()
    assert (arm["model"], arm["choices"][0]["message"]["content"]) == (first["model"], text), "an arm is what it was"
    assert loaded.http.delete(f"/v1/adapters/{first['model']}").status_code == 409
    assert loaded.http.delete(split).status_code == 200
    assert loaded.http.delete(f"/v1/adapters/{first['model']}").status_code == 200
    assert loaded.post(model=first["model"]).status_code == 404
    gone = loaded.http.put(split, json={"arms": arms})
    assert gone.is_client_error, gone.text


def changed_adapter(
    root: Path, name: str, change: Callable[[dict[str, Any]], None] = lambda tensors: None, **config: Any
) -> Path:
    """A copy of red1 with some other values in its config, and other tensors, which `change` is given to work on."""
    from safetensors.torch import load_file, save_file

    directory = root / name
    shutil.copytree(root / "red1", directory)
    before = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**before, **config}))
    tensors: dict[str, Any] = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def wrong_shape(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :3].contiguous()


def unknown_module(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


def test_an_adapter_at_a_uri_that_cannot_be_served_says_why_and_disturbs_nobody(
    loaded: Endpoint, adapter_root: Path, settings: Settings
) -> None:
    before = loaded.ask("red"), loaded.ask("blue")
    configs: dict[str, tuple[dict[str, Any], str]] = {
        "bias": ({"bias": "all"}, "bias is 'all'"),
        "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        "rank": ({"r": 64}, "needs 64 columns, the endpoint has 24"),
        "endless": ({"rank_pattern": {"q_proj": float("inf")}}, "positive numbers"),
    }
    wanted = {"dora": (adapter_root / "dora7", "DoRA")}
    for name, (config, said) in configs.items():
        wanted[name] = (changed_adapter(adapter_root, name, **config), said)
    wanted["shape"] = (changed_adapter(adapter_root, "shape", wrong_shape), "A is [8, 3]")
    wanted["module"] = (changed_adapter(adapter_root, "module", unknown_module), "no such linear layer")
    wanted["corrupt"] = (changed_adapter(adapter_root, "corrupt"), "is not safetensors")
    (wanted["corrupt"][0] / "adapter_model.safetensors").write_bytes(b"\xff" * 1000)
    for name, (directory, _) in wanted.items():  # all at once: each waits for the replica's next look
        put = loaded.http.put(f"/v1/adapters/{name}", json={"uri": str(directory)})
        assert put.status_code == 202, put.text

    def reasons() -> dict[str, str]:
        data = loaded.http.get("/v1/adapters").json()["data"]
        return {row["name"]: row["detail"] for row in data if row["state"] == "refused"}

    wait_until(lambda: set(reasons()) == set(wanted), "all are refused")
    for name, (_, said) in wanted.items():
        assert said in reasons()[name], reasons()[name]
    refused = put_uri(loaded, "waited", adapter_root / "dora7")
    assert refused.status_code == 400 and "DoRA" in refused.text and "waited" not in loaded.names()
    assert (loaded.ask("red"), loaded.ask("blue")) == before


def test_a_uri_is_read_below_the_roots_only(endpoint: Endpoint, adapter_root: Path, base: Path) -> None:
    outside = shutil.copytree(adapter_root / "red1", adapter_root.parent / "outside")
    (adapter_root / "link").symlink_to(outside)
    other = changed_adapter(adapter_root, "other", base_model_name_or_path="org/other")
    refused: list[tuple[Path | str, int, str]] = [
        (outside, 400, "outside the directories"),
        (adapter_root / "link", 400, "outside the directories"),
        (f"{adapter_root}/../outside", 400, "outside the directories"),
        (f"file://{adapter_root}/%2e%2e/outside", 400, "outside the directories"),
        ("s3://bucket/adapters", 400, "outside the directories"),
        ("adapters/red1", 400, "absolute path"),
        ("https://example.org/red1", 400, "not supported"),
        (adapter_root / "nothing", 404, "does not exist"),
        (adapter_root, 400, "adapter_config.json, adapter_model.safetensors missing"),
        (base, 400, "outside the directories"),
        (other, 400, "made for base model 'org/other', this endpoint serves 'base'"),
    ]
    for uri, status, said in refused:
        put = put_uri(endpoint, "x", uri)
        assert put.status_code == status, put.text
        assert said in put.json()["error"]["message"]
    for body, param in [({"uri": 3}, "uri"), ({"uri": "/a", "model": "red@1"}, "uri"), ({}, "model")]:
        put = endpoint.http.put("/v1/adapters/x", json=body)
        assert put.status_code == 400 and put.json()["error"]["param"] == param
    assert endpoint.names() == []
    assert put_uri(endpoint, "x", other, base_model="base").status_code == 200, "whoever knows better may say so"
    clear(endpoint)


def test_what_changes_under_a_uri_after_it_was_registered_is_refused_by_the_replica(
    endpoint: Endpoint, adapter_root: Path, config: ServeConfig, settings: Settings
) -> None:
    from serve.app import prepare

    prepared, wanted = prepare(config, settings), dict[str, Registered]()
    for name in ("changes", "moves"):
        directory = changed_adapter(adapter_root, name, revision=name)  # content that no cache has yet
        wanted[name] = from_uri(name, str(directory), None, prepared.base, prepared.uris)
    (adapter_root / "changes" / "adapter_config.json").write_text("{}")
    (adapter_root / "moves").rename(adapter_root.parent / "moved")
    (adapter_root / "moves").symlink_to(adapter_root.parent / "moved")
    register(prepared.files, wanted)

    def states() -> dict[str, tuple[str, str]]:
        return {row["name"]: (row["state"], row["detail"]) for row in endpoint.http.get("/v1/adapters").json()["data"]}

    wait_until(lambda: {state for state, _ in states().values()} == {"refused"}, "the replica has looked")
    assert "has changed since it was registered" in states()["changes"][1]
    assert "outside the directories" in states()["moves"][1]
    assert "refused" in endpoint.post(model="moves").text
    clear(endpoint)


def test_names_that_climb_are_refused_and_nothing_is_written(endpoint: Endpoint, settings: Settings) -> None:
    files = EndpointFiles(settings.home, "test")

    def written() -> set[Path]:
        everything = Path(settings.home).parent.rglob("*")
        return {path for path in everything if "replicas" not in path.parts and not path.name.endswith(".lock")}

    before, epoch = written(), files.read().epoch
    climbing = ["..%2f..%2fx", "..%2F..%2Fdesired.json", "%2e%2e%2fx", "..", "../../x", "..%5c..%5cx", "%00", ".%2fx", "%252e%252e%252fx", "/etc/passwd"]  # fmt: skip
    address = httpx.URL(endpoint.url)
    for name in climbing:  # a client that sends paths as they are: httpx would tidy them up
        for path in (f"/v1/adapters/{name}", f"/v1/endpoints/test/splits/{name}", f"/v1/endpoints/{name}/splits/x"):
            connection = http.client.HTTPConnection(address.host, address.port, timeout=DEADLINE_S)
            body = {"model": "red@1", "arms": {"a": {"model": "red@1", "weight": 1}}}
            connection.request("PUT", path, json.dumps(body), {"content-type": "application/json"})
            status = connection.getresponse().status
            assert 400 <= status < 500, (path, status)
            connection.close()
    for model in ["../../red@1", "..@1", "red@../../x", "default/../red@1", "a/../../red@1", "%2e%2e/red@1", "red@..", "/etc/passwd", "file:///etc"]:  # fmt: skip
        for response in (
            endpoint.put("x", model),
            endpoint.http.put("/v1/endpoints/test/splits/x", json={"arms": {"a": {"model": model, "weight": 1}}}),
            endpoint.post(model=model),
        ):
            assert response.is_client_error, (model, response.text)
    assert files.read().epoch == epoch and written() == before


def test_an_alias_that_moves_is_followed_without_a_put_and_never_unanswered(
    endpoint: Endpoint, adapter_root: Path, base: Path
) -> None:
    registry = endpoint.registry

    def publish(family: str, source: str, like: str) -> None:
        manifest = registry.manifest(ModelRef.parse(like))
        draft = manifest.model_dump(include=set(ManifestDraft.model_fields))
        registry.publish(family, adapter_root / source, ManifestDraft.model_validate(draft))

    publish("green", "red1", "red@1")
    registry.set_alias("green", "production", 1)
    put = endpoint.put("green", "green@production").json()
    assert (put["model"], put["follows"]) == ("green@1", "green@production")
    one = endpoint.ask("green")

    publish("green", "blue3", "blue@1")
    registry.set_alias("green", "production", 2)
    assert max(AGAIN_S, POLL_EVERY_S) <= 1.0  # the gateway asks for aliases, then a replica for what is wanted
    began = time.monotonic()
    wait_until(lambda: endpoint.post(model="green", max_tokens=1).raise_for_status().json()["model"] == "green@2", "it is followed")  # fmt: skip
    print(f"the alias was followed after {time.monotonic() - began:.2f} s")
    assert endpoint.ask("green@production") == endpoint.ask("green@2") == pefts_answer(base, adapter_root / "blue3")
    assert endpoint.ask("green") != one

    publish("green", "foreign5", "foreign@1")
    registry.set_alias("green", "production", 3)  # cannot be served here

    def detail() -> str:
        assert endpoint.post(model="green", max_tokens=1).json()["model"] == "green@2"
        rows = endpoint.http.get("/v1/adapters").json()["data"]
        return str(next(row["detail"] for row in rows if row["name"] == "green"))

    wait_until(lambda: "ffffffffffff" in detail(), "the reason is told")
    clear(endpoint)
