"""An adapter's files before they are served: module names are text, never expressions to be matched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.errors import ModelError
from service.inference.adapter_files import LoraTensors, read_adapter

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
SHAPES = dict.fromkeys(NAMES, (4, 4))
# Python's `re` takes for ever over this: each further letter doubles the time.
ENDLESS = "(([a-z_.0-9])*)*!"


def read(
    directory: Path, modules: tuple[str, ...] = NAMES, ranks: tuple[int, ...] = (2, 2), **config: Any
) -> dict[str, LoraTensors]:
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in zip(modules, ranks, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, 4)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(4, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(whole))
    return read_adapter(directory, SHAPES, 8, torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ENDLESS},
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": [ENDLESS]},
        {"target_modules": ["q_proj", ""]},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": "q_proj|"},
        {"target_modules": {"q_proj": 1}},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {"^q_proj": 2}},
    ],
)
def test_an_expression_where_a_module_name_belongs_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(config))} (holds|is) .*module names"):
        read(tmp_path, **config)


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["self_attn.q_proj", NAMES[1]], "all-linear", "|".join(NAMES), NAMES[0], None],
)
def test_names_suffixes_and_alternations_of_names_are_served(tmp_path: Path, targets: Any) -> None:
    assert set(read(tmp_path, target_modules=targets)) == set(NAMES)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "|".join(NAMES)])
def test_a_targeted_module_without_tensors_is_named(tmp_path: Path, targets: Any) -> None:
    with pytest.raises(ModelError, match=r"v_proj is targeted, but has no tensors"):
        read(tmp_path, NAMES[:1], (2,), target_modules=targets)


def test_a_pattern_holds_for_whole_parts_of_a_name(tmp_path: Path) -> None:
    found = read(tmp_path, ranks=(3, 2), rank_pattern={"self_attn.q_proj": 3, "proj": 7}, alpha_pattern={"q_proj": 6})
    assert [tuple(found[name].a_RI.shape) for name in NAMES] == [(3, 4), (2, 4)]
    assert [found[name].b_RO[0, 0].item() for name in NAMES] == [2.0, 1.0]
