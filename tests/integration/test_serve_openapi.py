"""What the endpoint says of itself and what it does are one: thousands of generated requests, right and wrong ones."""

from __future__ import annotations

import pytest

from tests.integration.serving import Endpoint, clear

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
]


@pytest.mark.parametrize("number", [120, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_answer_to_generated_requests_is_a_documented_one(endpoint: Endpoint, number: int) -> None:
    from tests.integration.openapi_cases import send_cases

    arms = {"old": {"model": "red@1", "weight": 1}, "new": {"model": "base", "weight": 1}}
    split = "/v1/endpoints/test/splits/support"

    def prepare() -> None:
        assert endpoint.put("red", "red@1").status_code == endpoint.put("blue", "blue@1").status_code == 200
        endpoint.http.put(split, json={"arms": arms}).raise_for_status()

    try:
        seen = send_cases(endpoint.url, number, prepare)
    finally:
        endpoint.http.delete(split)
        clear(endpoint)
    for (operation, mode, status), count in sorted(seen.items()):
        print(f"{count:6} {operation} {mode} {status}")
    assert sum(seen.values()) >= number
    for operation in ("POST /v1/chat/completions", "POST /v1/completions") if number >= 1000 else ():
        asked = sum(count for (name, mode, _), count in seen.items() if (name, mode) == (operation, "positive"))
        assert seen[operation, "positive", 200] > asked / 6, "many are answered by a model, not refused"
    assert endpoint.ask("base", max_tokens=1)
