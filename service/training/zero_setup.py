"""DeepSpeed as `zero.py` uses it: imported late and quietly, configured, loaded into, and let go of.

Sizes that DeepSpeed leaves to its user, in elements; all are capped by the model, so that a small one is split too:

    buckets      2e7: 80 MB, past which neither gradients nor weights travel faster; DeepSpeed's 5e8 is 2 GB of buffers
    persistence  weights up to 1e5, and to a ten-thousandth of the model, stay whole under zero3: norms, biases, small
                 adapters, for which a message costs more than the memory
    live, reuse  at most 5e8 and a quarter of the model gathered ahead or kept for reuse; DeepSpeed's 1e9 keeps all of a
                 model of 1e9 whole
    sub-groups   2e7 are stepped at a time, under zero3: AdamW needs three copies of what it steps, 240 MB; with
                 DeepSpeed's 1e9 it is 12 GB
    overlap      communication beside computation under zero3 on GPUs, as DeepSpeed has it; elsewhere off: it takes a
                 second set of buffers, and on a CPU there is nothing to overlap with
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from service.config import RunConfig
from service.errors import ConfigError
from service.training.strategy import World

STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}
BUCKET = 20_000_000
PERSISTENT = 100_000
LIVE = 500_000_000
SUB_GROUP = 20_000_000
_ASKED_FOR = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # unused: the loop decides
_M_MMAP_THRESHOLD = -3  # of malloc.h: blocks as large have pages of their own
_LARGE = 128 * 2**10  # glibc's own threshold at the start
_HIGHEST = 32 * 2**20  # and what it grows to by itself


@contextmanager
def spread_while_loading(config: RunConfig) -> Iterator[None]:
    """Inside, transformers' `from_pretrained` splits every weight between the workers as soon as it is read (zero3).

    The first worker reads, by memory map; the others see shapes only. Frozen weights are stored in the run's precision,
    those of full fine-tuning in float32: the loader has to ask for the same dtype.
    """
    world = World.current()
    deepspeed_on(world.device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    stored = config.precision if config.method.type != "full" else "fp32"
    block = {"zero_optimization": {"stage": 3, **_parameter_offload(config, world.device)}, **_ASKED_FOR}
    if stored in ("bf16", "fp16"):
        block[stored] = {"enabled": True}
    alive = HfDeepSpeedConfig(block)  # transformers holds it by a weak reference
    try:
        with _freed_blocks_returned():
            yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def _freed_blocks_returned() -> Iterator[None]:
    """On Linux, each large block of host memory goes back to the system when it is freed.

    Loading makes every weight whole for a moment. In one heap, where workers keep their memory, the holes these leave
    fit no later weight, and a worker's memory grew to 1.3 times the whole model where half of it was to stay.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", _HIGHEST)))


def engine_config(config: RunConfig, objective: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration for a run: the sizes at the top of this file, and nothing that compiles or converts."""
    total, trainable = _sizes(objective)
    cuda = device.type == "cuda"
    bucket = 2 * max(1, min(BUCKET, trainable) // 2)  # even, as DeepSpeed wants it
    zero: dict[str, Any] = {
        "stage": STAGE[config.scale.strategy],
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": cuda and config.scale.strategy == "zero3",
        "sub_group_size": SUB_GROUP,
        "stage3_param_persistence_threshold": min(PERSISTENT, total // 10_000),
        "stage3_prefetch_bucket_size": min(BUCKET, total // 16),
        "stage3_max_live_parameters": min(LIVE, total // 4),
        "stage3_max_reuse_distance": min(LIVE, total // 4),
        **_parameter_offload(config, device),
    }
    if config.scale.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        **_ASKED_FOR,
        "zero_optimization": zero,
        "gradient_clipping": config.optim.clip,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW is: DeepSpeed's own list has its compiled ones only
        "zero_force_ds_cpu_optimizer": False,  # with offload too: DeepSpeed's takes minutes to compile
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device
    }


def _parameter_offload(config: RunConfig, device: torch.device) -> dict[str, Any]:
    if config.scale.offload != "all":
        return {}
    return {"offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"}}


def _sizes(objective: torch.nn.Module) -> tuple[int, int]:
    """Elements of all weights and of the trainable ones, whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in objective.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def deepspeed_on(device: torch.device) -> Any:
    """DeepSpeed, quiet, with the process group it needs, and without compiling anything."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It calls collectives by names that PyTorch 2.13 is about to drop; nothing that a user of ours could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError:
        raise ConfigError(
            "scale.strategy zero1, zero2 and zero3 need deepspeed, which is not installed. Run: pip install 'loray[zero]', "
            "or take ddp."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # what it warns of, such as an overflow, the loop says
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cpu":
        # Only DeepSpeed's inference uses it; it compiles for a minute and fails where `ninja` is not on PATH.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    return deepspeed


def let_go(engine: Any) -> None:
    """Take the engine out of DeepSpeed's globals and out of a cache on a method, which would keep all its memory."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    decorated: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in decorated.__closure__:
        cell.cell_contents.cache_clear()
