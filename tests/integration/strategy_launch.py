"""Launching `strategy_worker.py`: tiny bases, cases by name, the workers, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.integration.serving import free_port
from tests.integration.strategy_worker import LRS, VOCABULARY

SEED, CLIP, DECAY = 7, 0.5, 0.1
DEADLINE_S = 300


def save_base(directory: Path, tied: bool = False, **size: int) -> Path:
    """A random Llama in several files. Some weights have an odd number of elements: two workers' parts are padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 129, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = LlamaConfig(
        **(small | size),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="50KB" if not size else "50MB")
    return directory


def to_bfloat16(base: Path) -> None:
    for file in base.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def save_biased_base(directory: Path) -> Path:
    """A random Qwen2, whose attention has biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=129,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def run_workers(module: str, argument: Path, size: int, *more: str) -> list[str]:
    """What `size` processes joined by gloo said, all of which must succeed; with `size` 0 one that is alone."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    alone = {key: value for key, value in os.environ.items() if key not in (*together, "RANK", "LOCAL_RANK")}
    environments = [alone | together | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)] or [alone]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(argument), *more],
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        said = [worker.communicate(timeout=DEADLINE_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(said)[-6000:]
    return said


class Launch:
    """Cases by name, run in the order in which they are given, by `size` workers at once."""

    def __init__(self, directory: Path, base: Path) -> None:
        self.directory = directory
        self.bases = {"lora": base, "qlora": base, "full": base}
        self.cases: list[dict[str, Any]] = []

    def case(self, name: str, strategy: str = "ddp", method: str = "lora", offload: str = "none", **rest: Any) -> str:
        """Add a case. Of `rest`, what `Case` has is the case's, `lora` goes into the method, the others into the config."""
        block: dict[str, Any] = {"type": "full" if method == "tied" else method}
        if "lora" in method:
            block |= {"r": 3, "alpha": 6.0, **rest.pop("lora", {})}
        of_case: dict[str, Any] = {
            key: rest.pop(key) for key in ("first", "steps", "load", "abandon", "poison") if key in rest
        }
        config = {
            "model": str(self.bases[method]),
            "data": {"train": "rows.jsonl"},
            "method": block,
            "precision": "fp32",
            "optim": {"weight_decay": DECAY, "clip": CLIP},
            "scale": {"strategy": strategy, "workers": 2, "offload": offload},
            "seed": SEED,
        }
        self.cases.append({"config": config | rest, "directory": str(self.directory / name), **of_case})
        return name

    def run(self, size: int = 2) -> None:
        """Start the workers and wait for them; with `size` 0 one worker that has no process group."""
        file = self.directory / "cases.json"
        file.write_text(json.dumps(self.cases))
        self.said = run_workers("tests.integration.strategy_worker", file, size)

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.directory / name / "result.json").read_text())
        return result

    def state_file(self, name: str, step: int) -> str:
        return str(self.directory / name / f"{step}.safetensors")

    def state(self, name: str, step: int = len(LRS)) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = load_file(self.state_file(name, step))
        return state

    def memory(self, name: str, rank: int) -> dict[str, int]:
        memory: dict[str, int] = json.loads((self.directory / name / f"memory-{rank}.json").read_text())
        return memory
