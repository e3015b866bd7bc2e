"""What goes together: method, optimizer, strategy, base model and machine. Refused before anything is spent, or advised on.

`refuse` and `refuse_steps` raise one error with every reason and, for each, the nearest choice that works. They refuse what
cannot work, or would not be what was asked for; what works and costs more than it must is a line of `advice`. What a run
file says wrongly by itself is in `config_blocks.py`; what a data file or a base model's files lack, their readers say.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from service.config import DEFAULT_LR, EngineBlock, FullBlock, LoraBlock, QloraBlock, RunConfig
from service.errors import ConfigError

STATE_COPIES = 4  # float32 copies of a trained weight: itself, its gradient, AdamW's two moments
FITS = 0.5  # share of a worker's memory that weights and state may take: the rest is for activations
HIGH_LR = 5  # times the method's usual rate
SERVED_NAME = re.compile(
    r"[A-Za-z0-9_.-]+"
)  # module names that an endpoint reads, as inference/adapter_files.py has it


def is_installed(package: str) -> bool:
    """Whether a package can be imported here; it is not imported."""
    return importlib.util.find_spec(package) is not None


def refuse(
    config: RunConfig,
    architecture: Any | None = None,
    *,
    on_gpu: bool | None = None,
    installed: Callable[[str], bool] = is_installed,
) -> None:
    """Raise ConfigError with every reason why this run cannot be done as configured; nothing when there is none.

    `architecture` is the base's transformers config, `on_gpu` says what the workers have; None where it is not known yet.
    """
    parts = (_packages(config, installed), _strategy(config), _quantised(config, on_gpu), _base(config, architecture))
    _raise([reason for part in parts for reason in part])


def refuse_steps(config: RunConfig, num_steps: int, longest: int, architecture: Any | None = None) -> None:
    """The same, once the data is known: `num_steps` of the plan, and the tokens of the longest row."""
    _raise([*_schedule(config, num_steps), *_positions(longest, architecture)])


def _raise(reasons: Sequence[str]) -> None:
    if reasons:
        count = f"{len(reasons)} reason{'s' if len(reasons) > 1 else ''}"
        raise ConfigError("\n  ".join([f"this run cannot be done as configured, for {count}.", *reasons]))


def _packages(config: RunConfig, installed: Callable[[str], bool]) -> Iterator[str]:
    scale, method, optim = config.scale, config.method, config.optim
    wanted = []
    if scale.strategy != "ddp":
        wanted.append((f"scale.strategy {scale.strategy}", "deepspeed", "zero", "take scale.strategy: ddp"))
    if isinstance(method, QloraBlock):
        wanted.append(("method.type qlora", "bitsandbytes", "quant", "take method.type: lora"))
    elif isinstance(method, LoraBlock) and method.base_bits == 8:
        wanted.append(("method.base_bits 8", "bitsandbytes", "quant", "take method.base_bits: 16"))
    if optim.name == "adamw8bit":
        wanted.append(("optim.name adamw8bit", "bitsandbytes", "quant", "take optim.name: adafactor"))
    for what, package, extra, instead in wanted:
        if not installed(package):
            yield f"{what}: {package} is not installed. Run pip install 'loray[{extra}]', or {instead}."


def _strategy(config: RunConfig) -> Iterator[str]:
    """ZeRO and offloading. ZeRO flattens weights into buffers and cuts those where a worker's share ends."""
    scale, name = config.scale, config.optim.name
    if scale.strategy == "ddp":
        if scale.offload != "none":
            stage = "zero3" if scale.offload == "all" else "zero2"
            yield (
                f"scale.offload {scale.offload}: ddp keeps everything on the worker. Set scale.strategy: {stage}, or "
                "scale.offload: none."
            )
        return
    if scale.offload == "all" and scale.strategy != "zero3":
        yield (
            f"scale.offload all: {scale.strategy} keeps the weights whole on every worker. Set scale.strategy: zero3, or "
            "scale.offload: optimizer."
        )
    lost = {
        "adafactor": "its sums over rows and columns need whole matrices, and ZeRO flattens them",
        "adamw8bit": "ZeRO cuts through the blocks that share a scale, so that its state fits no other number of workers",
    }
    if name in lost:
        yield f"optim.name {name} with {scale.strategy}: {lost[name]}. Set optim.name: adamw, or scale.strategy: ddp."


def _quantised(config: RunConfig, on_gpu: bool | None) -> Iterator[str]:
    """Bases of 4 and 8 bits, as bitsandbytes 0.50 and PEFT 0.21 hold them."""
    method, stage = config.method, config.scale.strategy
    if isinstance(method, FullBlock) or method.base_bits == 16:
        return
    four = isinstance(method, QloraBlock)
    bits = "method.type qlora" if four else "method.base_bits 8"
    if stage == "zero1":
        yield (
            f"{bits} with zero1: that splits an adapter's moments, a few megabytes, and is not offered beside a quantised "
            "base. Set scale.strategy: ddp."
        )
    if stage == "zero3" and not four:
        yield (
            "method.base_bits 8 with zero3: bitsandbytes keeps each whole int8 weight in its layer beside the parameter, so "
            "nothing would be spread. Set method.type: qlora, or scale.strategy: ddp."
        )
    if method.dora and not four and on_gpu is False:
        yield (
            "method.dora with method.base_bits 8 without a GPU: PEFT turns int8 weights back for their norms, and there loses "
            "their scales. Set method.type: qlora, or method.base_bits: 16."
        )
    if method.dora and four and stage == "zero3":
        yield (
            "method.dora with qlora under zero3: PEFT replaces the weight when it turns it back for its norm, and ZeRO no "
            "longer knows it. Set scale.strategy: zero2, or method.dora: false."
        )
    if method.bias != "none":
        yield (
            f"method.bias {method.bias} with {bits}: bitsandbytes keeps biases in the compute type, and what trains is "
            "float32. Set method.bias: none, or method.type: lora with method.base_bits: 16."
        )


def _base(config: RunConfig, architecture: Any | None) -> Iterator[str]:
    stored = getattr(architecture, "quantization_config", None)
    if stored is not None:
        how = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", stored)
        yield (
            f"model.id {config.model.id}: its weights are stored quantised ({how}), and training starts from unquantised "
            "ones. Name the original model; method.type: qlora quantises it as it loads."
        )

    if architecture is not None and isinstance(config.method, FullBlock) and _is_multimodal(architecture):
        yield (
            f"method.type full with model.id {config.model.id}: it has towers for images or sounds, which text does not "
            "train. Set method.type: lora, which leaves them as they are, or take the text model alone."
        )


def _is_multimodal(architecture: Any) -> bool:
    return any(getattr(architecture, name, None) is not None for name in ("vision_config", "audio_config"))


def _schedule(config: RunConfig, num_steps: int) -> Iterator[str]:
    optim = config.optim
    warm, decay = _steps(optim.warmup, num_steps), _steps(optim.decay, num_steps)
    if warm > num_steps:
        yield (
            f"optim.warmup {optim.warmup}: the run has {num_steps} steps, so it would never reach optim.lr. Set optim.warmup: "
            "10%, or train for longer (optim.epochs, optim.max_steps)."
        )
    elif optim.schedule == "wsd" and warm + decay > num_steps:
        yield (
            f"optim.warmup {optim.warmup} and optim.decay {optim.decay} are {warm + decay:g} steps together, and the run has "
            f"{num_steps}. Set them to 10% and 20%, or train for longer (optim.epochs, optim.max_steps)."
        )


def _steps(written: int | str, num_steps: int) -> float:
    """Not rounded: 10% and 20% fit a run of any length."""
    return written if isinstance(written, int) else num_steps * float(written.rstrip("% ")) / 100


def _positions(longest: int, architecture: Any | None) -> Iterator[str]:
    """Rows only: in a pack every row counts its positions from zero."""
    text = architecture.get_text_config() if architecture is not None else None
    known = getattr(text, "max_position_embeddings", None)
    if isinstance(known, int) and longest > known:
        yield (
            f"the longest row has {longest} tokens, and the base model knows {known} positions. Set data.seq_len: {known} with "
            "data.over_long: drop, or take a base with a longer context."
        )


@dataclass(frozen=True)
class Figures:
    """What `advice` needs to know of a run and its machine. `worker_bytes` is a GPU's memory, else the host's share."""

    trainable_bytes: int  # of the trained weights, float32
    frozen_bytes: int  # of the others, as they are stored
    worker_bytes: int
    on_gpu: bool

    @property
    def fits_one_worker(self) -> bool:
        """Whether a worker can hold all weights and the whole state, with room for activations."""
        return self.frozen_bytes + STATE_COPIES * self.trainable_bytes <= FITS * self.worker_bytes


def advice(config: RunConfig, figures: Figures) -> list[str]:
    """A line for each choice that works, and that somebody who knew more would make otherwise."""
    return [*_spreading(config, figures), *_learning(config, figures), *_serving(config)]


def _spreading(config: RunConfig, figures: Figures) -> Iterator[str]:
    scale, method = config.scale, config.method
    if scale.strategy == "ddp":
        return
    if scale.max_workers == 1:
        yield f"{scale.strategy} with one worker spreads nothing: scale.strategy: ddp does the same with less."
    elif scale.strategy != "zero3" and isinstance(method, LoraBlock):
        state = STATE_COPIES * figures.trainable_bytes
        yield f"{scale.strategy} spreads an adapter's state only, {_size(state)} in all: ddp is simpler and no slower."
    elif figures.fits_one_worker:
        need = figures.frozen_bytes + STATE_COPIES * figures.trainable_bytes
        yield (
            f"{scale.strategy} is slower than ddp, and is not needed: weights and state are {_size(need)}, a worker has "
            f"{_size(figures.worker_bytes)}."
        )
    if isinstance(method, QloraBlock):
        yield (
            f"every worker first loads the whole quantised base ({_size(figures.frozen_bytes)}): {scale.strategy} cannot "
            "lower that peak."
        )
    if scale.offload != "none" and not figures.on_gpu:
        yield f"scale.offload {scale.offload} moves to host memory what is there already: without a GPU it only costs."


def _learning(config: RunConfig, figures: Figures) -> Iterator[str]:
    usual = DEFAULT_LR[config.method.type]
    if config.optim.lr > HIGH_LR * usual:
        yield (
            f"optim.lr {config.optim.lr:g} is {config.optim.lr / usual:.0f} times what method.type {config.method.type} "
            f"usually takes ({usual:g}). Leave optim.lr out to get that."
        )
    if config.precision == "fp16" and not figures.on_gpu:
        yield "precision fp16 without a GPU is slower than bf16, and has to search for its loss scale: precision: bf16."
    if not (config.checkpoint.every.steps or config.checkpoint.every.minutes):
        yield "checkpoint.every is off: a run that loses a worker begins anew."


def _serving(config: RunConfig) -> Iterator[str]:
    """What an endpoint would refuse of the published model: inference/adapter_files.py has the rules."""
    method = config.method
    if config.publish is None:
        return
    if isinstance(method, FullBlock):
        yield "a full model is served as a base model of its own: only adapters can be swapped while an endpoint serves."
        return
    reasons = []
    if method.dora:
        reasons.append("DoRA rescales whole rows of the base and cannot share a batch (method.dora)")
    if method.bias != "none":
        reasons.append("biases cannot be swapped per request (method.bias)")
    targets = () if isinstance(method.targets, str) else method.targets
    strange = [
        name for name in (*targets, *method.rank_pattern, *method.alpha_pattern) if not SERVED_NAME.fullmatch(name)
    ]
    if strange:
        reasons.append(f"module names must be plain names, not patterns such as {strange[0]!r}")
    if any(name.split(".")[-1] == "lm_head" for name in targets):
        reasons.append("the output head carries no adapters (method.targets lm_head)")
    for reason in reasons:
        yield f"an endpoint will not hot-swap this adapter: {reason}."
    rank, columns = max([method.r, *method.rank_pattern.values()]), EngineBlock().lora_columns
    if rank > columns:
        yield f"rank {rank} needs an endpoint with engine.lora_columns: {rank} or more; the default is {columns}."


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
