"""What the trainer says of itself before it saves: the products that it trained with are PEFT's, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.base_models import resolve_base_model
from service.config import RunConfig
from service.errors import GateError
from service.training.batches import Batches
from service.training.handover import PROBE_ROWS, make_probe
from service.training.methods.fused import fuse
from service.training.objectives.sft import SupervisedLoss, TokenArrays
from service.training.strategy import World

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LABELS = ("class a", "class b", "other")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M."""
    return resolve_base_model("smollm2-135m-instruct", tmp_path_factory.mktemp("cache")).path


@pytest.fixture(scope="module")
def objective(base: Path) -> SupervisedLoss:
    """An adapter that changes its base, in bfloat16."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    fuse(model)
    return SupervisedLoss(model)


@pytest.fixture(scope="module")
def rows(base: Path) -> list[TokenArrays]:
    """A classifier's: one word that is asked for, some 7 nats each before it has learnt them."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def row(number: int) -> TokenArrays:
        text = f"please classify this short text number {number} about topic a{number % 7}"
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": LABELS[number % 3]}]
        ids = np.array(tokenizer.apply_chat_template(turns, return_dict=False), dtype=np.int32)
        return ids, (np.arange(len(ids)) >= len(ids) - 3).astype(np.uint8)

    return [row(number) for number in range(64)]


def _batches(base: Path) -> Batches:
    config = RunConfig.model_validate({"model": str(base), "data": {"train": "x"}, "precision": "bf16"})
    return Batches(config, World(), np.arange(1), 1)


def _groups(rows: list[TokenArrays]) -> Iterator[Any]:
    yield from (rows[start : start + PROBE_ROWS] for start in range(0, len(rows), PROBE_ROWS))


def test_few_trained_tokens_do_not_make_rounding_look_like_an_error(
    base: Path, objective: SupervisedLoss, rows: list[TokenArrays]
) -> None:
    for group in _groups(rows):
        probe = make_probe(objective, _batches(base), group)
        assert len(probe.log_probs) == 3 * PROBE_ROWS
        assert probe.examples == [(ids.tolist(), mask.tolist()) for ids, mask in group]


def test_an_adapter_that_was_trained_with_other_products_is_refused(
    base: Path, objective: SupervisedLoss, rows: list[TokenArrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = objective.model
    forward = type(model.get_base_model().model.layers[5].mlp.down_proj.forward)
    scale = forward.scale
    monkeypatch.setattr(forward, "scale", property(lambda fused: 2 * scale.fget(fused)))
    for group in list(_groups(rows))[:3]:
        with pytest.raises(GateError, match=r"differ from PEFT's and transformers' own by [0-9.]+ nats a token"):
            make_probe(objective, _batches(base), group)
