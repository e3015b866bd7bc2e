"""Which engine a replica runs, by its config and by what this machine has, and how the config's sizes become its own.

`auto` is vLLM on CUDA where it is installed and takes the config's sizes, else the embedded engine. Both are imported here when they are made, never
before: a machine without vLLM, and a driver without torch, get along.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from service.config import EngineBlock
from service.errors import ConfigError
from service.inference.engine import Engine
from service.render import Renderer


def backend_of(engine: EngineBlock) -> Literal["torch", "vllm"]:
    """The engine that this config means on this machine. ConfigError where it names one that is not installed."""
    import torch

    installed = find_spec("vllm") is not None
    if engine.backend == "vllm" and not installed:
        raise ConfigError(
            "engine.backend is vllm, and vLLM is not installed here. Install it on every node that serves "
            "(pip install 'loray[vllm]'), or set engine.backend: torch."
        )
    if engine.backend != "auto":
        return engine.backend
    # What was served before vLLM was installed is served after: what it does not take is the embedded engine's.
    # Its adapters on a base that is quantised while it is loaded were never tried here.
    takes = engine.base_bits == 16 and (engine.lora_columns == 0 or engine.lora_columns >= engine.vllm.max_rank)
    return "vllm" if installed and takes and torch.cuda.is_available() else "torch"


def make_engine(model_dir: Path, renderer: Renderer, precision: str, engine: EngineBlock) -> Engine:
    """The engine, with its weights loaded. Raises what its constructor raises, and ConfigError as `backend_of`."""
    import torch

    shared: dict[str, Any] = {
        "tokenizer": renderer.tokenizer,
        "stop_ids": renderer.stop_ids,
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "num_slots": engine.slots,
        "max_context": engine.max_context,
        "max_lora_columns": engine.lora_columns,
        "kv_bytes": engine.kv_bytes,
        "prefix_bytes": engine.prefix_bytes,
    }
    if backend_of(engine) == "vllm":
        from serve.vllm_engine import VllmEngine

        return VllmEngine(model_dir, **shared, max_lora_rank=engine.vllm.max_rank, threads=engine.threads)
    from service.inference.torch_engine import TorchEngine

    # Ray sets OMP_NUM_THREADS=1 for a fraction of a CPU, which is what it was asked to reserve, not what may be used.
    torch.set_num_threads(engine.threads or len(os.sched_getaffinity(0)))
    return TorchEngine(
        model_dir,
        **shared,
        device="cuda" if torch.cuda.is_available() else "cpu",
        host_bytes=engine.host_bytes,
        base_bits=engine.base_bits,
        double_quant=engine.double_quant,
    )
