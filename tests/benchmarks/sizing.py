"""GPUs, memory and storage for models of 7, 70 and 405 billion parameters, by the planner's rehearsal; nothing is trained.

    python -m tests.benchmarks.sizing [--gpu-gib 80] [--tokens 4096]

Each model is built without weights from the shape that its authors publish, and a step of it is rehearsed in bfloat16 with
activation checkpointing and one sequence a worker, on 1, 2, 4, ... workers until it fits a GPU. The table of `k8s/README.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from service.config import RunConfig, validated
from service.errors import LorayError
from service.training import methods
from service.training.compatibility import refuse
from service.training.memory import MemoryPlan, Shape, Work, plan_memory
from service.training.methods.loading import meta_base

GIB = 2**30
FITS = 0.9  # of a GPU: its context, NCCL and what its allocator leaves unused take the rest
MOST_GPUS = 1024
INTERVAL_S = 900.0  # between checkpoints, as the gpu overlay has it

# arXiv:2307.09288 (7B); arXiv:2407.21783 table 3 (70B, 405B)
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
METHODS = {
    "full": [("full", "zero3")],
    "LoRA": [("lora", "ddp"), ("lora", "zero3")],
    "QLoRA": [("qlora", "ddp"), ("qlora", "zero3")],
}


@dataclass(frozen=True)
class Row:
    """One line of the table. Bytes."""

    model: str
    method: str
    strategy: str
    gpus: int
    gpu_peak: int
    host: int  # a worker
    checkpoint: int  # all workers
    published: int


def main() -> int:
    """Print the table, then the rows as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sizing", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="of these only")
    given = parser.parse_args()
    rows = []
    print(
        "| model | method | GPUs | peak a GPU | host memory a worker | checkpoint | to storage, every 15 minutes | published |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in given.models:
        for method in METHODS:
            row = smallest(model, method, given.gpu_gib * GIB * FITS, given.tokens)
            print(as_markdown(row) if row else f"| {model} | {method} | more than {MOST_GPUS} | | | | | |", flush=True)
            rows += [asdict(row)] if row else []
    print_serving(given.gpu_gib * GIB * FITS, given.tokens)
    print(json.dumps({"rows": rows}))
    return 0


def print_serving(gpu_bytes: float, tokens: int) -> None:
    """What one GPU holds of a served model: slots of `tokens` beside the base, with a tenth of the GPU for adapters of rank 16."""
    print(
        f"| model | base | key-value memory a token | slots of {tokens:,} tokens | adapter of rank 16 | adapters resident |"
    )
    print("|---|---|---|---|---|---|")
    for model, shape in MODELS.items():
        for kind, stored in (("lora", "bfloat16"), ("qlora", "NF4")):
            with tempfile.TemporaryDirectory(prefix="loray-sizing-") as name:
                trainable, base = methods.weight_bytes(*_built(model, kind, Path(name), tokens))
            head = shape["hidden_size"] // shape["num_attention_heads"]
            kv = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * 2
            adapter, for_adapters = trainable // 2, gpu_bytes / 10
            slots = int((gpu_bytes - base - for_adapters) // (kv * tokens))
            fits = (
                [str(slots), f"{adapter / 2**20:.0f} MiB", str(int(for_adapters // adapter))]
                if slots > 0
                else ["does not fit a GPU", "", ""]
            )
            print("| " + " | ".join([model, f"{base / GIB:.0f} GiB, {stored}", f"{kv / 2**10:.0f} KiB", *fits]) + " |")


def _built(model: str, kind: str, directory: Path, tokens: int) -> tuple[torch.nn.Module, RunConfig]:
    LlamaConfig(**MODELS[model], architectures=["LlamaForCausalLM"], tie_word_embeddings=False).save_pretrained(
        directory
    )
    config = next(_configs(kind, "ddp", tokens))
    return methods.skeleton(directory, config), config


def as_markdown(row: Row) -> str:
    """A line of the table: storage must take a checkpoint in a tenth of the time between two."""
    rate = row.checkpoint / (INTERVAL_S / 10)
    sizes = [
        f"{size / GIB:,.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"
        for size in (row.gpu_peak, row.host, row.checkpoint)
    ]
    shown = [
        row.model,
        f"{row.method}, {row.strategy}",
        str(row.gpus),
        *sizes,
        f"{rate / GIB:.2f} GiB/s",
        f"{row.published / GIB:.1f} GiB",
    ]
    return "| " + " | ".join(shown) + " |"


def smallest(model: str, method: str, gpu_bytes: float, tokens: int) -> Row | None:
    """The fewest GPUs, a power of two, on which a strategy for this method fits; the earlier strategy where both do."""
    with tempfile.TemporaryDirectory(prefix="loray-sizing-") as name:
        base = Path(name)
        LlamaConfig(**MODELS[model], architectures=["LlamaForCausalLM"], tie_word_embeddings=False).save_pretrained(
            base
        )
        for kind, strategy in METHODS[method]:
            for config in _configs(kind, strategy, tokens):
                if _least(config, base) > gpu_bytes:
                    continue
                plan = _plan(config, base, tokens)
                if plan is None:
                    break
                if plan.peak <= gpu_bytes:
                    return _row(model, method, config, base, plan)
    return None


def _configs(kind: str, strategy: str, tokens: int) -> Iterator[RunConfig]:
    workers = 1
    while workers <= (1 if strategy == "ddp" else MOST_GPUS):
        values = {
            "model": "base", "data": {"train": "rows.jsonl", "seq_len": tokens}, "method": kind,
            "scale": {"workers": workers, "strategy": strategy}, "memory": {"checkpoint_activations": True},
        }  # fmt: skip
        yield validated(RunConfig, values, "sizing")
        workers *= 2


def _least(config: RunConfig, base: Path) -> float:
    """What weights, gradients and moments take of a worker at least: below that no rehearsal is needed."""
    trainable, frozen = methods.weight_bytes(methods.skeleton(base, config), config)
    return (4 * trainable + frozen) / config.scale.max_workers


def _plan(config: RunConfig, base: Path, tokens: int) -> MemoryPlan | None:
    """None where the combination is refused."""
    try:
        refuse(config, meta_base(base).config)
    except LorayError as error:
        print(f"{config.method.type}, {config.scale.strategy}: {error}", file=sys.stderr)
        return None
    shape = Shape(sequences=1, tokens=tokens, supervised=tokens // 2, starts=())
    work = Work(shape, shape, config.scale.max_workers, packed=False, accumulates=True, saves_between=True)
    return plan_memory(config, base, work, torch.device("cuda"))


def _row(model: str, method: str, config: RunConfig, base: Path, plan: MemoryPlan) -> Row:
    trainable, _ = methods.weight_bytes(methods.skeleton(base, config), config)
    published = trainable // 2 if config.method.type == "full" else trainable  # bfloat16; adapters stay float32
    return Row(
        model, method, config.scale.strategy, config.scale.max_workers, plan.peak, plan.host_bytes, 3 * trainable, published
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
