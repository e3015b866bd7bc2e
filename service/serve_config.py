"""Every key that a serve file may hold: its type, its range, its default. Import these from `service.config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict

from service.config_blocks import Block, Bounds, ModelBlock, shorthand
from service.config_values import value_at
from service.domain import check_name


class VllmBlock(Block):
    """What only vLLM needs: the columns that each adapter takes, whatever its rank. Of these sizes vLLM has kernels."""

    max_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 32


class EngineBlock(Block):
    """The serving engine's fixed sizes: slots (concurrent rows), tokens per row, LoRA columns, CPU threads (0 = all).

    `backend`: the embedded engine (torch) or vLLM; auto is vLLM on CUDA where it is installed, unless `base_bits` or
    `lora_columns` rule it out. What follows holds for both but for three: vLLM reads an adapter that comes back from its
    files (no `host_bytes`), does not quantise, and gives every adapter `vllm.max_rank` of the `lora_columns`.

    `kv_bytes` limits the memory of the slots' keys and values: there are fewer slots then. `prefix_bytes` are kept of
    prompts seen before, in host or GPU memory, wherever the model is; 0 computes every prompt anew. `host_bytes` of adapters
    stay in host memory, read and checked, for when they come back. `base_bits` 4 (NF4,
    with its scales quantised too: `double_quant`) or 8 (int8) quantises the base as it is loaded, adapters stay exact.
    """

    backend: Literal["auto", "torch", "vllm"] = "auto"
    slots: int = Field(default=16, ge=1, le=1024)
    max_context: int = Field(default=2048, ge=16)
    lora_columns: int = Field(default=256, ge=0)
    threads: int = Field(default=0, ge=0)
    kv_bytes: int | None = Field(default=None, ge=1)
    prefix_bytes: int = Field(default=2**28, ge=0)
    host_bytes: int = Field(default=2**30, ge=0)
    base_bits: Literal[4, 8, 16] = 16
    double_quant: bool = True
    vllm: VllmBlock = VllmBlock()


class ReplicasBlock(Bounds):
    """A number of engine replicas that follows the load: Ray Serve keeps `ongoing` requests a replica, running or waiting.

    `ongoing` is the engine's slots unless given. More replicas come once there have been too many requests for
    `upscale_delay_s`, and go, when they have answered, after `downscale_delay_s` with too few.
    """

    ongoing: float | None = Field(default=None, gt=0)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)


class ServeConfig(Block):
    """One endpoint: a base model and the adapters it starts with.

    `host` may be other than loopback when there are API keys: a file of them in `keys`, or LORAY_API_KEYS. Adapters are
    models of the registry, or lie at URIs below `adapter_roots` (directories that all nodes share, s3:// prefixes) with at
    most `adapter_max_bytes` of files.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    endpoint: Annotated[str, AfterValidator(lambda value: check_name(value, "endpoint"))] = "default"
    model: Annotated[ModelBlock, shorthand("id")]
    adapters: Annotated[tuple[str, ...], Strict(False)] = ()
    adapter_roots: Annotated[tuple[str, ...], Strict(False)] = ()
    adapter_max_bytes: int = Field(default=2**31, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    keys: str | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    engine: EngineBlock = EngineBlock()
    replicas: Annotated[int, Field(ge=1)] | ReplicasBlock = 1

    @property
    def min_replicas(self) -> int:
        """The fewest that there are."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    @classmethod
    def problems_across(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What vLLM was asked for and the embedded engine alone does."""
        if value_at(values, "engine.backend") != "vllm":
            return
        bits = value_at(values, "engine.base_bits")
        if bits in (4, 8):
            yield f"engine.base_bits: {bits} is not served by vLLM here. Set engine.backend: torch, or leave base_bits out."
        columns = value_at(values, "engine.lora_columns")
        rank = value_at(values, "engine.vllm.max_rank")
        columns = EngineBlock().lora_columns if columns is None else columns
        rank = VllmBlock().max_rank if rank is None else rank
        if isinstance(columns, int) and isinstance(rank, int) and 0 < columns < rank:
            yield (
                f"engine.lora_columns: {columns}, and under vLLM every adapter takes engine.vllm.max_rank columns, {rank}. "
                "Raise the first or lower the second."
            )
