"""Which weights a method trains, counted on real architectures without a weight, and full models written in shards."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from service.config import LoraBlock, RunConfig
from service.errors import ConfigError, ModelError
from service.training.compatibility import refuse
from service.training.methods import full, quantised
from service.training.methods.lora import apply_lora

LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
}


def _skeleton(shape: Mapping[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**shape))
    return model


def _lora(shape: Mapping[str, Any], **method: Any) -> torch.nn.Module:
    with torch.device("meta"):
        tuned: torch.nn.Module = apply_lora(_skeleton(shape), LoraBlock.model_validate(method), seed=0)
    return tuned


def _trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_llama_2_7b_has_its_published_number_of_parameters() -> None:
    trained = full.train_everything(_skeleton(LLAMA_2_7B))
    assert _trainable(trained) == 6_738_415_616
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ({"r": 8, "targets": ["q_proj", "v_proj"]}, 4_194_304),
        ({"r": 16}, 39_976_960),
        ({"r": 16, "rslora": True}, 39_976_960),
        ({"r": 8, "targets": ["q_proj", "v_proj"], "dora": True}, 4_194_304 + 32 * 2 * 4096),
        ({"r": 16, "dora": True}, 39_976_960 + 32 * (5 * 4096 + 2 * 11008)),
    ],
)
def test_an_adapter_of_llama_2_7b_has_its_published_number_of_parameters(method: dict[str, Any], wanted: int) -> None:
    assert _trainable(_lora(LLAMA_2_7B, **method)) == wanted


def _random_shape(draw: random.Random) -> dict[str, Any]:
    heads = draw.choice([2, 4, 8])
    return {
        "hidden_size": 8 * heads * draw.randint(1, 4),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]),
        "intermediate_size": 8 * draw.randint(1, 20),
        "vocab_size": draw.randint(10, 300),
        "tie_word_embeddings": draw.random() < 0.5,
    }


def _linears(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """A Llama layer's linears: name -> (in, out)."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }


@pytest.mark.parametrize("seed", range(12))
def test_counts_follow_the_formulas_for_any_shape(seed: int) -> None:
    draw = random.Random(seed)
    shape = _random_shape(draw)
    linears, layers, hidden = _linears(shape), shape["num_hidden_layers"], shape["hidden_size"]
    targets = draw.sample(sorted(linears), draw.randint(1, 7))
    rank, other, dora = draw.randint(1, 9), draw.randint(1, 9), draw.random() < 0.5
    ranks = dict.fromkeys(targets, rank) | {targets[0]: other}
    adapter = sum(ranks[t] * sum(linears[t]) + dora * linears[t][1] for t in targets)
    tuned = _lora(shape, r=rank, targets=targets, dora=dora, rank_pattern={targets[0]: other})
    assert _trainable(tuned) == layers * adapter

    embeddings = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    a_layer = sum(i * o for i, o in linears.values()) + 2 * hidden
    assert _trainable(full.train_everything(_skeleton(shape))) == embeddings + layers * a_layer + hidden


def _scales(model: torch.nn.Module) -> dict[str, float]:
    return {name: m.scaling["default"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize(("rslora", "wanted"), [(False, 6 / 9), (True, 6 / 3)])
def test_the_scale_is_alpha_over_r_and_over_its_root_for_rslora(rslora: bool, wanted: float) -> None:
    assert set(_scales(_lora(SMALL, r=9, alpha=6, rslora=rslora)).values()) == {wanted}


def test_patterns_give_some_modules_their_own_rank_and_alpha() -> None:
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 10}}
    model = _lora(SMALL, r=5, alpha=5, targets=["q_proj", "v_proj"], **patterns)
    ranks = {n.split(".layers.")[1]: len(p) for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {
        "0.self_attn.q_proj.lora_A.default.weight": 5,
        "0.self_attn.v_proj.lora_A.default.weight": 5,
        "1.self_attn.q_proj.lora_A.default.weight": 3,
        "1.self_attn.v_proj.lora_A.default.weight": 5,
    }
    by_name = {name.split(".")[-1]: scale for name, scale in _scales(model).items()}
    assert by_name["v_proj"] == 10 / 5


def test_targets_and_patterns_that_name_nothing_are_all_refused_with_what_there_is() -> None:
    with pytest.raises(ModelError) as refused:
        _lora(SMALL, targets=["q_proj", "query"], rank_pattern={"k_prj": 4}, alpha_pattern={"layers.9.*": 1})
    said = str(refused.value)
    assert "method.targets ['query']" in said and "method.rank_pattern ['k_prj']" in said
    assert "method.alpha_pattern ['layers.9.*']" in said and "down_proj, gate_proj, k_proj, lm_head" in said


def test_patterns_for_layers_that_are_no_targets_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"rank_pattern \['k_proj'\] matches no linear layer that method.targets names"
    ):
        _lora(SMALL, targets=["q_proj"], rank_pattern={"k_proj": 4})
    with pytest.raises(ModelError, match="alpha_pattern"):
        _lora(SMALL, alpha_pattern={"lm_head": 4})


def test_towers_that_no_text_goes_through_get_no_adapters() -> None:
    text = {**SMALL, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        tuned = apply_lora(model, LoraBlock(r=2), seed=0)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(".language_model.layers." in name for name in trained)
    with pytest.raises(ConfigError, match="towers for images or sounds"):
        refuse(RunConfig.model_validate({"model": "x", "data": {"train": "y"}, "method": "full"}), config)


def test_the_transposed_linears_of_gpt2_are_targets_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
        tuned = apply_lora(model, LoraBlock(r=2), seed=0)
    assert _trainable(tuned) == 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


def test_a_linear_takes_a_quarter_of_its_bf16_bytes_in_4_bits_and_half_in_8() -> None:
    four, plain, eight = (
        RunConfig.model_validate({"model": "x", "data": {"train": "x"}, "method": method}).method
        for method in ("qlora", {"type": "qlora", "double_quant": False}, {"base_bits": 8})
    )
    shape, bf16 = (4096, 11008), 2 * 4096 * 11008
    assert quantised.quantised_bytes(shape, four) / bf16 == pytest.approx((0.5 + 1 / 64 + 4 / 64 / 256) / 2)
    assert quantised.quantised_bytes(shape, plain) / bf16 == pytest.approx((0.5 + 4 / 64) / 2)
    assert quantised.quantised_bytes(shape, eight) == 4096 * 11008 + 4 * 4096


def _base(directory: Path, **changes: Any) -> Any:
    """A tiny base as `load_base` leaves it: with the directory that it came from."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, **changes)).save_pretrained(directory)
    for name in ("tokenizer.json", "manifest.json", "claim.json"):
        (directory / name).write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_full_model_reads_back_equal_from_one_file_or_from_shards(
    tmp_path: Path, tied: bool, shard_bytes: int
) -> None:
    model = _base(tmp_path / "base", tie_word_embeddings=tied)
    weights = [(name, p.detach() + 1) for name, p in model.named_parameters()]
    full.save_full(model, iter(weights), tmp_path / "new", torch.float32, shard_bytes)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert read.dtype == torch.float32
    assert all(torch.equal(read.get_parameter(name), weight) for name, weight in weights)
    files = sorted(file.name for file in (tmp_path / "new").glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors"))
    assert stored < 1.3 * sum(weight.nbytes for _, weight in weights)  # tied weights once
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for _, weight in weights)
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    for file in files:
        with safe_open(tmp_path / "new" / file, framework="pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118 - no mapping
        assert sum(sizes) <= shard_bytes or len(sizes) == 1


def test_a_full_model_is_stored_as_the_precision_says_beside_the_bases_other_files(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    full.save_full(model, model.named_parameters(), tmp_path / "new", torch.bfloat16)
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").dtype == torch.bfloat16


def test_experts_that_were_fused_when_loaded_are_stored_apart_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    full.save_full(model, model.named_parameters(), tmp_path / "new", torch.float32)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "new"))
    assert any("experts.2.w1" in name for name in before)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    (tmp_path / "new").mkdir()
    written: list[int] = []

    def weights() -> Any:
        for name, parameter in model.named_parameters():
            written.append(len(list((tmp_path / "new").glob("part-*"))))
            yield name, parameter.detach()

    full.save_full(model, weights(), tmp_path / "new", torch.float32, shard_bytes=3000)
    assert written[-1] >= 3 and written == sorted(written)


def test_a_base_that_is_gone_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no longer in .*base.*resume the run"):
        full.save_full(model, model.named_parameters(), tmp_path / "new", torch.float32)
    assert not (tmp_path / "new").exists()
