"""Tiny random models for integration tests: a Llama of 2 layers that writes printable text, strong adapters on it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_TOKENS = 98  # as `save_tokenizer` makes them
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_tokenizer(directory: Path, template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and ChatML's two."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = [pre.pre_tokenize_str(c)[0][0] for c in string.printable[:95] + "\n"]
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_base(directory: Path, seed: int = 0, **options: Any) -> Path:
    """A random Llama with its tokenizer, as safetensors; `options` are of its config."""
    tokenizer = save_tokenizer(directory)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(**(shape | options))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[-2:] = 0.0  # the two special tokens are never the likeliest: answers run to max_tokens
    model.save_pretrained(directory)
    return directory


def save_adapter(base: Path, directory: Path, seed: int, rank: int = 8, **options: Any) -> Path:
    """A random LoRA on `base` so strong that it changes every answer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"lora_alpha": 2 * rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    config = LoraConfig(r=rank, **settings)
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.save_pretrained(directory)
    return directory
