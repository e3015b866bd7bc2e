"""A LoRA run in forty lines of plain PyTorch, transformers and PEFT: what losses ours must have. Imports nothing of loray."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch


def oracle_losses(base: Path, rows: list[dict[str, Any]], order: list[list[int]], lr: float) -> list[float]:
    """The same run in plain PyTorch, transformers and PEFT: a row at a time, dense head, one division by the tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    seen = []
    warm = math.ceil(len(order) / 10)
    for step, drawn in enumerate(order):
        total, count = torch.zeros(()), 0
        for number in drawn:
            messages = rows[number - 1]["messages"]
            text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = tokenizer(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            count += len(answer)
        torch.autograd.backward(total / count)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        progress = (step - warm) / (len(order) - warm)
        rate = (step + 1) / warm if step < warm else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(total.detach()) / count)
    return seen
