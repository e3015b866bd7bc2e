"""Engines that break, in their own process: what was in them fails with 500 and an id, and the next request is answered."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.integration.serving import HELLO, Endpoint
from tests.integration.waiting import wait_until

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]
REPLACED_S = 240.0  # Serve looks every 10 s, gives up after three, and starts a process that imports everything


def _engine_actor() -> tuple[str, Any]:
    """Name and handle of the one engine replica that lives."""
    import ray
    from ray.util.state import list_actors

    (name,) = {
        actor.name
        for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True)
        if "Engine" in actor.class_name and actor.name
    }
    return name, ray.get_actor(name, namespace="serve")


def _in_engine(actor: Any, change: Callable[[Any], None]) -> None:
    """Run `change(engine)` in the replica's own process."""

    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the replica cannot import the tests

    def call(replica: Any) -> None:
        change(replica._replica_impl._user_callable_wrapper._callable._engine)

    ray.get(actor.__ray_call__.remote(call))


@pytest.fixture
def answers(loaded: Endpoint) -> Iterator[dict[str, str]]:
    """What red and base say before anything is broken; and afterwards, however the test ended, again."""
    before = {name: loaded.ask(name) for name in ("red", "base")}
    assert before["red"] != before["base"]
    yield before
    wait_until(lambda: _status(loaded) == 200, "it answers again", REPLACED_S)
    assert {name: loaded.ask(name) for name in before} == before


def _status(endpoint: Endpoint) -> int:
    return endpoint.post(model="red", max_tokens=1).status_code


def _fail_once(engine: Any) -> None:
    decoder, forward = engine._decoder, engine._decoder.forward

    def broken(*args: Any) -> Any:
        decoder.forward = forward
        raise RuntimeError("no memory left, by /secret/path")

    decoder.forward = broken


def _fail_always(engine: Any) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("the device is lost")

    engine._decoder.forward = broken


def _hang(engine: Any) -> None:
    engine._stall_after_s = 1.0
    engine._decoder.forward = lambda *args: time.sleep(1e6)


def test_a_step_that_fails_is_500_with_an_id_and_the_same_engine_goes_on(
    loaded: Endpoint, answers: dict[str, str], ray_cluster: str
) -> None:
    name, actor = _engine_actor()
    _in_engine(actor, _fail_once)
    answer = loaded.post(model="red", max_tokens=5)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"].startswith("err-") and error["code"] in error["message"] and "secret" not in answer.text
    assert loaded.ask("red") == answers["red"]
    assert _engine_actor()[0] == name


@pytest.mark.long
@pytest.mark.parametrize("breaks", [_fail_always, _hang])
def test_an_engine_that_does_nothing_any_more_is_replaced(
    loaded: Endpoint, answers: dict[str, str], ray_cluster: str, breaks: Callable[[Any], None]
) -> None:
    name, actor = _engine_actor()
    _in_engine(actor, breaks)
    if breaks is _fail_always:
        assert [_status(loaded) for _ in range(5)] == [500] * 5
    else:
        with pytest.raises(openai.APITimeoutError):
            loaded.client.with_options(timeout=2.0).chat.completions.create(model="red@1", messages=HELLO)
    wait_until(lambda: name not in _names(), "it is gone", REPLACED_S)


def _names() -> set[str]:
    from ray.util.state import list_actors

    return {str(actor.name) for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True)}
