"""Endpoints whose base is quantised while it loads, or is itself a fine-tuned model: what they answer, with adapters on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from service.base_models import resolve_base_model
from service.config import ServeConfig
from service.domain import BaseBits
from service.quantised import keep_unpacked, loading_options
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration import tiny
from tests.integration.serving import HELLO, free_port, served
from tests.integration.trained import leave_full

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # importing ray.serve 2.60
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]


def _config(model: str, **engine: Any) -> ServeConfig:
    engine = {"slots": 4, "max_context": 256, "lora_columns": 24, "threads": 1, **engine}
    values = {"model": model, "endpoint": "bases", "precision": "fp32", "port": free_port(), "engine": engine}
    return ServeConfig.model_validate(values)


def _answer(base: Path, adapter: Path | None, bits: BaseBits = 16) -> str:
    """Of transformers and PEFT on the base as it would be served, by itself."""
    options = loading_options(bits, torch.float32, double_quant=True, alone=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    if bits != 16:
        keep_unpacked(model)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    renderer = load_renderer(base)
    ids = torch.tensor([renderer.prompt_ids(HELLO)])
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return renderer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_answers_with_exact_adapters_on_top(
    ray_cluster: str, base: Path, registry: Registry, settings: Settings, adapter_root: Path, bits: BaseBits
) -> None:
    with served(_config(str(base), base_bits=bits), registry, settings) as endpoint:
        assert endpoint.put("red", "red@1").status_code == 200
        answers = {"base": endpoint.ask("base"), "red": endpoint.ask("red")}
    assert answers == {"base": _answer(base, None, bits), "red": _answer(base, adapter_root / "red1", bits)}
    assert answers["base"] != _answer(base, None), "it is quantised"


def test_a_fully_fine_tuned_model_is_a_base_of_its_own(
    ray_cluster: str, base: Path, registry: Registry, settings: Settings, tmp_path: Path
) -> None:
    leave_full(base, tmp_path / "whole", "fp32")

    def digest(model: Path) -> str:
        return resolve_base_model(str(model), settings.cache).digest

    renderer = load_renderer(base).digest
    draft = {"base_model": "base", "base_digest": digest(base), "renderer_digest": renderer}
    registry.publish(
        "whole", tmp_path / "whole", ManifestDraft.model_validate({**draft, "kind": "full", "method": "full"})
    )
    adapter = tiny.save_adapter(tmp_path / "whole", tmp_path / "on-whole", seed=11)
    draft |= {"base_model": "whole@1", "base_digest": digest(tmp_path / "whole")}
    registry.publish("above", adapter, ManifestDraft.model_validate({**draft, "rank": 8, "alpha": 16.0}))
    with served(_config("whole@1"), registry, settings) as endpoint:
        own = endpoint.client.models.list().data[0].id
        assert endpoint.put("above", "above@1").status_code == 200
        answers = [endpoint.ask(own), endpoint.ask("above")]
        refused = endpoint.put("red", "red@1")
    assert answers == [_answer(tmp_path / "whole", None), _answer(tmp_path / "whole", adapter)]
    assert answers[0] != _answer(base, None), "it is the fine-tuned one"
    assert refused.status_code == 400 and "this endpoint serves whole@1" in refused.text
