"""GPUs, memory and storage for models of 7, 70 and 405 billion parameters, by the planner's rehearsal; nothing is trained.

    python -m tests.benchmarks.sizing [--gpu-gib 80] [--tokens 4096] [--models 7B 70B 405B]

Each model is built without weights from the shape that its authors publish. A training step of it is rehearsed in bfloat16,
with activation checkpointing and one sequence a worker, on 1, 2, 4, ... workers until its peak fits a GPU. Under ZeRO-3 a
rehearsal of 126 layers takes many minutes, so it is made at two depths: every further layer adds the same. Loading and saving,
which the plan of a run counts too, are left out there: the plan's figure for them is that of a whole model. The tables of
`k8s/README.md`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from service.config import RunConfig, validated
from service.errors import LorayError
from service.training import methods
from service.training.compatibility import refuse
from service.training.memory import Shape, Work, plan_memory
from service.training.methods.loading import meta_base

GIB = 2**30
FITS = 0.9  # of a GPU: its context, NCCL and what its allocator leaves unused take the rest
MOST_BY_STATE = 0.8  # of that: beside it are activations, and what zero3 gathers
MOST_GPUS = 1024
INTERVAL_S = 900.0  # between checkpoints, as the gpu overlay has it
DEPTHS = (2, 6)

# arXiv:2307.09288 (7B); arXiv:2407.21783 table 3 (70B, 405B)
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
METHODS = {
    "full": [("full", "zero3")],
    "LoRA": [("lora", "ddp"), ("lora", "zero3")],
    "QLoRA": [("qlora", "ddp")],  # under zero3 each GPU has the whole base in the backward pass
}


@dataclass(frozen=True)
class Row:
    """One line of the table. Bytes."""

    model: str
    method: str
    strategy: str
    gpus: int
    gpu_peak: int
    host: int  # a worker: the copy of its state that a checkpoint is written from
    checkpoint: int  # of all workers
    published: int


def main() -> int:
    """Print the two tables of `k8s/README.md`."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sizing", description="GPUs, memory, storage.")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="of these only")
    given = parser.parse_args()
    gpu_bytes = given.gpu_gib * GIB * FITS
    print("| model | method | GPUs | peak a GPU | host memory a worker | checkpoint | to storage | published |")
    print("|---|---|---|---|---|---|---|---|")
    for model in given.models:
        for method in METHODS:
            print(line(model, method, gpu_bytes, given.tokens), flush=True)
    print(
        f"\n| model | base | key-value memory a token | slots of {given.tokens:,} tokens | an adapter | adapters resident |"
    )
    print("|---|---|---|---|---|---|")
    for model in given.models:
        print("\n".join(served(model, gpu_bytes, given.tokens)))
    return 0


def line(model: str, method: str, gpu_bytes: float, tokens: int) -> str:
    """A line of the first table."""
    row = smallest(model, method, gpu_bytes, tokens)
    if row:
        return as_markdown(row)
    kind, strategy = METHODS[method][-1]
    with _saved(model, MODELS[model]["num_hidden_layers"]) as base:
        config = next(_configs(kind, strategy, tokens))
        _, frozen = methods.weight_bytes(methods.skeleton(base, config), config)
    return f"| {model} | {method}, {strategy} | no GPU holds its base of {_size(frozen)} |  |  |  |  |  |"


def smallest(model: str, method: str, gpu_bytes: float, tokens: int) -> Row | None:
    """The fewest GPUs, a power of two, on which a strategy for this method fits; the earlier strategy where both do."""
    layers = MODELS[model]["num_hidden_layers"]
    for kind, strategy in METHODS[method]:
        with _saved(model, layers) as base:
            config = next(_configs(kind, strategy, tokens))
            trainable, frozen = methods.weight_bytes(methods.skeleton(base, config), config)
        for config in _configs(kind, strategy, tokens):
            workers = config.scale.max_workers
            if (4 * trainable + frozen) / workers > MOST_BY_STATE * gpu_bytes:  # weights, gradients, moments
                continue
            peak = _peak(model, layers, config, tokens)
            if peak is None:
                break
            if peak <= gpu_bytes:
                published = trainable // 2 if kind == "full" else trainable  # bfloat16; adapters stay float32
                return Row(model, method, strategy, workers, peak, 3 * trainable // workers, 3 * trainable, published)
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


def _peak(model: str, layers: int, config: RunConfig, tokens: int) -> int | None:
    """Bytes at the peak of a training step, on one worker's GPU; None where the combination is refused."""
    depths = DEPTHS if config.scale.strategy == "zero3" else (layers,)
    peaks = []
    for depth in depths:
        with _saved(model, depth) as base:
            try:
                refuse(config, meta_base(base).config)
            except LorayError as error:
                print(f"{config.method.type}, {config.scale.strategy}: {error}", file=sys.stderr)
                return None
            shape = Shape(sequences=1, tokens=tokens, supervised=tokens // 2, starts=())
            work = Work(shape, shape, config.scale.max_workers, packed=False, accumulates=True, saves_between=True)
            plan = plan_memory(config, base, work, torch.device("cuda"))
            peaks.append(plan.peaks["train"] if len(depths) > 1 else plan.peak)
    return peaks[0] if len(peaks) == 1 else extended(depths, peaks, layers)


def extended(depths: tuple[int, ...], values: list[int], depth: int) -> int:
    """The straight line through two values, at `depth`."""
    (near, far), (low, high) = depths, values
    return round(low + (high - low) / (far - near) * (depth - near))


@contextmanager
def _saved(model: str, layers: int) -> Iterator[Path]:
    """A directory with the model's config alone."""
    with tempfile.TemporaryDirectory(prefix="loray-sizing-") as name:
        shape = {**MODELS[model], "num_hidden_layers": layers}
        LlamaConfig(**shape, architectures=["LlamaForCausalLM"], tie_word_embeddings=False).save_pretrained(name)
        yield Path(name)


def as_markdown(row: Row) -> str:
    """A line of the table; storage has a tenth of the time between two checkpoints for one."""
    rate = row.checkpoint / (INTERVAL_S / 10)
    sizes = [_size(value) for value in (row.gpu_peak, row.host, row.checkpoint)]
    shown = [
        row.model,
        f"{row.method}, {row.strategy}",
        f"{row.gpus}",
        *sizes,
        f"{_size(rate)}/s",
        _size(row.published),
    ]
    return f"| {' | '.join(shown)} |"


def served(model: str, gpu_bytes: float, tokens: int) -> Iterator[str]:
    """Lines of the second table: slots of `tokens` beside the base on one GPU, a tenth of which is for adapters of rank 16."""
    shape = MODELS[model]
    head = shape["hidden_size"] // shape["num_attention_heads"]
    kv = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * 2  # keys and values, bfloat16
    for kind, stored in (("lora", "bfloat16"), ("qlora", "NF4")):
        with _saved(model, shape["num_hidden_layers"]) as directory:
            config = next(_configs(kind, "ddp", tokens))
            trainable, base = methods.weight_bytes(methods.skeleton(directory, config), config)
        adapter, for_adapters = trainable // 2, gpu_bytes / 10  # served in bfloat16
        slots = int((gpu_bytes - base - for_adapters) // (kv * tokens))
        resident = str(int(for_adapters // adapter))
        fits = [str(slots), _size(adapter), resident] if slots > 0 else ["no GPU holds it", "", ""]
        yield "| " + " | ".join([model, f"{_size(base)}, {stored}", _size(kv), *fits]) + " |"


def _size(num_bytes: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.0f} {name}" if num_bytes >= 10 * unit else f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


if __name__ == "__main__":
    sys.exit(main())
