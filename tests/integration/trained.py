"""What a trainer leaves behind, made by plain torch, transformers and PEFT: a saved model, and the probe for the gate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from service.training.gate import Probe
from service.training.saved_weights import WeightDigests
from tests.integration.tiny import TARGETS, save_base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Rows = list[tuple[list[int], list[int]]]


def base_with(directory: Path, **config: Any) -> Path:
    """The tiny Llama with another configuration, for example `attention_bias`, its biases drawn at random."""
    save_base(directory)
    changed = type(LlamaForCausalLM.from_pretrained(directory).config).from_pretrained(directory, **config)
    torch.manual_seed(0)
    model = LlamaForCausalLM(changed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def some_rows(lengths: tuple[int, ...] = (12, 20, 7, 16), seed: int = 4) -> Rows:
    """Random rows; the last two thirds of each are trained."""
    draw = np.random.Generator(np.random.PCG64(seed))
    return [(draw.integers(0, 90, n).tolist(), [int(i > n // 3) for i in range(n)]) for n in lengths]


def leave_adapter(
    base: Path, directory: Path, precision: str, *, bits: int = 16, start: Path | None = None, **options: Any
) -> Probe:
    """Train a LoRA on `base` for a few steps, save it with PEFT; the probe. `start`: an adapter to go on from."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[precision], **_quantised(bits, precision))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # after repacking, no gradient passes bitsandbytes' 4-bit weights
    if start is not None:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
    else:
        torch.manual_seed(3)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(model, LoraConfig(**settings))
    train(model, precision, lr=2e-2)
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(directory, state_dict=trained, save_embedding_layers=False)
    return probe_of(model, precision)


def leave_full(base: Path, directory: Path, precision: str, lr: float = 1e-2, shard: str = "50GB") -> Probe:
    """Train every weight of `base` in float32 for a few steps, save them in the precision's type; the probe."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    train(model, precision, lr)
    probe = probe_of(model, precision)
    digests = WeightDigests(DTYPES[precision])
    weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    stored = {name: tensor.to(DTYPES[precision]) for name, tensor in digests.watch(weights)}
    model.config.dtype = DTYPES[precision]
    model.save_pretrained(directory, state_dict=stored, max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return Probe(probe.examples, probe.log_probs, probe.noise, digests.of)


def train(model: Any, precision: str, lr: float) -> None:
    """Four steps of AdamW on random rows. What trains is float32 whatever the rest is stored in."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.train()
    for step in range(4):
        with _computed(precision):
            loss = -_log_probs(model, some_rows(seed=step)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def probe_of(model: Any, precision: str) -> Probe:
    """The model's own log-probabilities of a few rows, and how much a batch alone changes them."""
    rows = some_rows(seed=100)
    with _computed(precision):
        together = _log_probs(model, rows)
        alone = torch.cat([_log_probs(model, [row]) for row in rows])
    return Probe(rows, together.tolist(), float((together - alone).abs().max()))


def tensor_files(directory: Path) -> Iterator[Path]:
    """Its safetensors files."""
    yield from sorted(directory.glob("*.safetensors"))


def edit_json(file: Path, **values: Any) -> None:
    """Change keys of a JSON object."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _log_probs(model: Any, rows: Rows) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    trained = torch.tensor([mask + [0] * (longest - len(mask)) for _, mask in rows]).bool()[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][trained]
    values: torch.Tensor = logits.float().log_softmax(-1).gather(1, ids[:, 1:][trained][:, None])[:, 0]
    return values


def _computed(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "fp32")


def _quantised(bits: int, precision: str) -> dict[str, Any]:
    if bits == 16:
        return {}
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=DTYPES[precision], **four)
    return {"quantization_config": config}
