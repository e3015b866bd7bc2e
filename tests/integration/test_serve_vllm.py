"""A real endpoint on vLLM's CPU build: `make test-vllm` runs it, in the environment that has vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from service.config import ServeConfig
from service.domain import ModelRef
from service.render import load_renderer
from tests.integration import tiny
from tests.integration.serving import HELLO, Endpoint, free_port

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

pytest_plugins = ("tests.integration.serving_fixtures",)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a head size that vLLM's CPU kernels have."""
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def config(base: Path) -> ServeConfig:
    engine = {"backend": "vllm", "slots": 4, "max_context": 256, "lora_columns": 16, "vllm": {"max_rank": 8}}
    return ServeConfig.model_validate(
        {"model": str(base), "endpoint": "test", "precision": "fp32", "port": free_port(), "engine": engine}
    )


def _expected(base: Path, endpoint: Endpoint, model: str | None) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    renderer = load_renderer(base)
    if model:
        files = endpoint.registry.fetch(ModelRef.parse(model), endpoint.settings.cache)
        reference = PeftModel.from_pretrained(reference, files)
    ids = reference.dummy_inputs["input_ids"].new_tensor([renderer.prompt_ids(HELLO)])
    out = reference.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=24, do_sample=False)
    return renderer.decode(out[0, ids.shape[1] :].tolist())


def test_adapters_come_go_and_answer_over_http_as_peft_does(loaded: Endpoint, base: Path) -> None:
    """Two places for three versions: red@2 needs one of them, and blue@1 comes back when it is asked for."""
    for model, name in ((None, "base"), ("red@1", "red@1"), ("blue@1", "blue@1")):
        assert loaded.ask(name) == loaded.stream(name) == _expected(base, loaded, model)
    assert loaded.replica()["free_columns"] == 0
    assert loaded.put("red", "red@2").status_code == 200
    for name in ("red@2", "blue@1"):
        assert loaded.ask(name) == _expected(base, loaded, name)
    refused = loaded.put("wide", "wide@1")
    assert refused.status_code >= 400 and "24 columns" in refused.text
