"""What a run would do, before anything is spent: data cards, steps, tokens, trainable parameters, bytes by part.

The parameter counts come from the real architecture on the meta device, so no weight is loaded. Activations are not
estimated here; what is listed is exact for its part.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.base_models import BaseModel, resolve_base_model
from service.config import ResolvedRun, RunConfig, read_text
from service.data import prepare
from service.data.prepare import DataCard
from service.errors import ModelError
from service.render import Renderer, load_renderer
from service.settings import Settings
from service.training import loop

FLOAT32 = 4
ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class RunPlan:
    """The figures of a run. Bytes are per worker."""

    base: BaseModel
    train: DataCard
    eval: DataCard | None
    num_steps: int
    steps_per_epoch: int
    micro_rows: int
    total_tokens: int  # that the model will read, padding left out
    total_parameters: int
    trainable_parameters: int
    frozen_weight_bytes: int
    trainable_weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For `loray plan --json`."""
        return asdict(self) | {
            "base": {"name": self.base.name, "digest": self.base.digest, "path": str(self.base.path)}
        }


def renderer_for(config: RunConfig, base: BaseModel) -> Renderer:
    """The renderer of a run: the base's own template, or the one that the config names."""
    template = config.model.chat_template
    return load_renderer(base.path, read_text(template, "model.chat_template") if template else None)


def make_run_plan(resolved: ResolvedRun, settings: Settings, digests: tuple[str, str | None] | None = None) -> RunPlan:
    """Resolve the base, prepare the data (cached by content), count. Raises ConfigError, DataError, ModelError.

    `digests` of the training and evaluation data, as prepared before, stand in for the source files of a resumed run.
    """
    config = resolved.config
    base = resolve_base_model(config.model.id, settings.cache, config.model.revision)
    train, held_out = _prepared_before(digests, settings) if digests else _prepared(config, base, settings)
    steps = loop.make_plan(config, train.examples)
    total, trainable, frozen_bytes = _parameters(base.path, config)
    rows = prepare.load(train.digest, home=settings.home, cache=settings.cache)
    tokens = sum(rows.lengths[row] for step in range(steps.num_steps) for row in steps.rows(step))
    return RunPlan(
        base=base,
        train=train,
        eval=held_out,
        num_steps=steps.num_steps,
        steps_per_epoch=steps.steps_per_epoch,
        micro_rows=loop.micro_rows(config, train.longest),
        total_tokens=tokens,
        total_parameters=total,
        trainable_parameters=trainable,
        frozen_weight_bytes=frozen_bytes,
        trainable_weight_bytes=trainable * FLOAT32,
        gradient_bytes=trainable * FLOAT32,
        optimizer_bytes=trainable * FLOAT32 * ADAMW_MOMENTS,
    )


def _prepared(config: RunConfig, base: BaseModel, settings: Settings) -> tuple[DataCard, DataCard | None]:
    data, renderer = config.data, renderer_for(config, base)

    def prepared(uri: str) -> DataCard:
        return prepare.prepare(uri, renderer, home=settings.home, seq_len=data.seq_len, over_long=data.over_long)

    return prepared(data.train), prepared(data.eval) if data.eval else None


def _prepared_before(digests: tuple[str, str | None], settings: Settings) -> tuple[DataCard, DataCard | None]:
    train, held_out = digests
    card = prepare.find(train, home=settings.home)
    return card, prepare.find(held_out, home=settings.home) if held_out else None


def _parameters(path: Path, config: RunConfig) -> tuple[int, int, int]:
    """All parameters, the trainable ones, and the bytes of the frozen ones, from the architecture alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from service.training.methods.lora import apply_lora

    try:
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
            wrapped = apply_lora(model, config.method, config.seed)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} holds no causal language model that transformers knows: {error}") from error
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in wrapped.parameters() if not p.requires_grad)
    return trainable + frozen, trainable, frozen * (2 if config.precision == "bf16" else FLOAT32)
