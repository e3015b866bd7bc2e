"""An adapter merged into its base: one full model that answers as the two together, or nothing.

    merged = merge(ModelRef.parse("tickets@3"), "tickets-merged", settings)

PEFT adds the update to the base's weights in float32, which are then rounded to the type that the base stores them in.
What is saved is loaded again, and both models answer the same held-out rows: where KL(adapter || merged) is over its bound,
nothing is published. An adapter trained on a base in 4 or 8 bits was made to fit that base, and is merged into the
unquantised one: the divergence then also holds what quantisation had changed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.base_models import BaseModel, companion_files, resolve_base_model
from service.config import LoraBlock, QloraBlock, RunConfig
from service.data import shards
from service.data.formats import read_rows
from service.data.rendered import examples_of, renderer_for
from service.domain import BaseBits, Manifest, ManifestDraft, MergeRecord, ModelRef
from service.errors import ConfigError, ModelError, NotFoundError
from service.registry import Registry
from service.render import Renderer, load_renderer
from service.runs import Run
from service.settings import Settings

if TYPE_CHECKING:
    import torch

    from service.training.reloaded import Compute

# Nats per token on the mean, by the bits of the base under the adapter. SmolLM2-135M with an adapter trained on tickets, on
# rows of that task: rounding to bfloat16 gave 1.6e-6, float32 1e-9; an update scaled by 0.9 gives 2e-4, by 0.5 gives 0.03, and
# none at all 3. At 0.001 it takes 1,000 tokens before the answers tell the two models apart by odds of e to 1. On a base in 8 and
# 4 bits quantisation itself gave 2e-4 and 0.06, and it costs small models the most.
MAX_KL = {16: 0.001, 8: 0.01, 4: 0.2}
MAX_TOKENS = 1024  # compared: their distributions over a vocabulary of 150,000 take 600 MB
SHARD = "4GB"
VERSIONED = ("loray", "torch", "transformers", "peft")

Rows = list[tuple[list[int], list[int]]]  # token ids, and for each whether its prediction is compared


@dataclass(frozen=True)
class Divergence:
    """KL(adapter || merged), in nats per token, over so many tokens."""

    mean: float
    largest: float
    tokens: int


def merge(
    ref: ModelRef, publish: str, settings: Settings, *, max_kl: float | None = None, data: str | None = None
) -> Manifest:
    """Merge the adapter `ref` and publish the result as the next version of `publish`.

    `data` is a file of rows to compare on; without it, the data of the run that made the adapter. `max_kl` bounds the mean
    divergence. Raises ModelError with the figures where it is over, and NotFoundError, ConfigError, DataError; nothing is
    published then.
    """
    registry = Registry(settings.home)
    registry.versions(publish)  # a name that cannot be published under is told before anything is loaded
    manifest = registry.manifest(ref)
    config, base = _origin(manifest, settings)
    renderer = renderer_for(config, base.path)
    rows, source = _rows(manifest, settings, renderer, data)
    bits = _held(config).base_bits
    bound = MAX_KL[bits] if max_kl is None else max_kl
    adapter = registry.fetch(ModelRef.parse(manifest.ref), settings.cache)
    settings.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merging-", dir=settings.cache) as directory:
        found = _merged(base.path, adapter, config, rows, Path(directory))
        _save_companions(base.path, renderer if config.model.chat_template else None, Path(directory))
        _demand_same_renderer(manifest, Path(directory))
        if not found.mean <= bound:
            raise ModelError(_refusal(manifest.ref, bits, found, bound, source))
        record = MergeRecord(
            adapter=manifest.ref,
            digest=manifest.digest,
            kl_mean=found.mean,
            kl_max=found.largest,
            kl_bound=bound,
            tokens=found.tokens,
            data=source,
        )
        return registry.publish(publish, Path(directory), _draft(manifest, bits, record))


def summary(merged: Manifest) -> list[str]:
    """What was published, in lines for people."""
    record = merged.merged_from
    assert record is not None, "a merged model says what it was merged from"
    lines = [
        f"Merged {record.adapter} into {merged.base_model}: KL(adapter || merged) {record.kl_mean:.3g} nats per token, at "
        f"most {record.kl_max:.3g}, over {record.tokens} tokens of {record.data} (allowed on the mean: {record.kl_bound:g})"
    ]
    if merged.base_bits != 16:
        lines.append(
            f"It was trained on a base in {merged.base_bits} bits and merged into the unquantised one, so the divergence holds "
            "what quantisation had changed."
        )
    return [*lines, f"Published {merged.ref}  (sha256 {merged.digest[:12]})"]


def _origin(manifest: Manifest, settings: Settings) -> tuple[RunConfig, BaseModel]:
    """The config of the run that made an adapter, and the very base that it was trained on."""
    if manifest.kind != "adapter":
        raise ModelError(f"{manifest.ref} is a {manifest.kind} model: there is nothing to merge. Name an adapter.")
    config = RunConfig.model_validate(manifest.config)
    base = resolve_base_model(config.model.id, settings.cache, config.model.revision, settings.home)
    if base.digest != manifest.base_digest:
        raise ModelError(
            f"{manifest.ref} was trained on a base with sha256 {manifest.base_digest[:12]}, {config.model.id} is now "
            f"{base.digest[:12]}. Restore the base it was trained on."
        )
    return config, base


def _rows(manifest: Manifest, settings: Settings, renderer: Renderer, data: str | None) -> tuple[Rows, str]:
    """Rows to compare on, and where they come from. ConfigError where there are none."""
    if data is not None:
        examples = [example for row in read_rows(data) for example in examples_of(row, renderer)]
        return _first_tokens((example.ids, [int(m) for m in example.mask]) for example in examples), data
    try:
        details = Run.open(settings.home, manifest.run).status().details
        split = "evaluation" if details.get("eval_digest") else "training"
        prepared = shards.load(
            details.get("eval_digest") or details["train_digest"], home=settings.home, cache=settings.cache
        )
    except (NotFoundError, KeyError):
        raise ConfigError(
            f"the data of {manifest.run or 'the run'} that made {manifest.ref} is not below {settings.home} any more, and "
            "merging compares answers on rows. Give a data file: --data FILE."
        ) from None
    examples_of_run = (prepared[index] for index in range(len(prepared)))
    return _first_tokens(
        (ids.tolist(), mask.tolist()) for ids, mask in examples_of_run
    ), f"{split} data of {manifest.run}"


def _first_tokens(examples: Iterator[tuple[list[int], list[int]]]) -> Rows:
    """As many rows as hold MAX_TOKENS trained tokens; the last one is cut there."""
    rows: Rows = []
    left = MAX_TOKENS
    for ids, mask in examples:
        if left == 0:
            break
        compared = [place for place, trained in enumerate(mask) if trained and place > 0][:left]
        if compared:
            end = compared[-1] + 1
            rows.append((ids[:end], mask[:end]))
            left -= len(compared)
    return rows


def _merged(base: Path, adapter: Path, config: RunConfig, rows: Rows, target: Path) -> Divergence:
    """Write the merged weights to `target`; how far they answer from the adapter on its base. One model in memory at a time."""
    from service.training import reloaded
    from service.training.reloaded import Compute

    unquantised = Compute("fp32")
    held = _held(config)
    model = reloaded.load_adapter(reloaded.load_model(base, held), adapter)
    wanted = list(_distributions(model, rows))
    if held.base_bits != 16:
        del model
        reloaded.free_memory()
        model = reloaded.load_adapter(reloaded.load_model(base, unquantised), adapter)
    model = model.merge_and_unload(safe_merge=True)
    _store_as(base, model)
    model.save_pretrained(target, max_shard_size=SHARD)
    del model
    reloaded.free_memory()
    return _divergence(wanted, _distributions(reloaded.load_model(target, unquantised), rows))


def _held(config: RunConfig) -> Compute:
    """The base as it was under the adapter while that was trained, computed in float32."""
    from service.training.reloaded import Compute

    method = config.method
    assert isinstance(method, LoraBlock), "an adapter comes from a run that trains adapters"
    return Compute("fp32", method.base_bits, isinstance(method, QloraBlock) and method.double_quant)


def _distributions(model: Any, rows: Rows) -> Iterator[torch.Tensor]:
    """For each row the log-probabilities [N, V] of its N compared tokens, float32, on the CPU."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for ids, mask in rows:
        compared = torch.tensor(mask, device=device).bool()[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1][compared]
        yield logits.float().log_softmax(-1).cpu()


def _divergence(adapter: Sequence[torch.Tensor], merged: Iterator[torch.Tensor]) -> Divergence:
    import torch

    def of_row(p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
        return (p_NV.exp() * (p_NV - q_NV)).double().sum(-1)

    each = torch.cat([of_row(p, q) for p, q in zip(adapter, merged, strict=True)])
    each = each.clamp(min=0)  # which rounding takes it below; a NaN stays
    return Divergence(float(each.mean()), float(each.max()), len(each))


def _store_as(base: Path, model: Any) -> None:
    """Round every weight to the type in which the base's files hold it."""
    from service.training.saved_weights import Weights

    stored = Weights.of_model(base)
    types = {name: stored.read(name).dtype for name in stored.names}
    usual = max(set(types.values()), key=list(types.values()).count)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, usual))


def _save_companions(base: Path, renderer: Renderer | None, target: Path) -> None:
    """Tokenizer and generation settings: the base's, with the chat template that the adapter was trained with."""
    for file in companion_files(base):
        shutil.copyfile(file, target / file.name)
    if renderer is not None:
        renderer.tokenizer.save_pretrained(target)


def _demand_same_renderer(manifest: Manifest, target: Path) -> None:
    digest = load_renderer(target).digest
    if digest != manifest.renderer_digest:
        raise ModelError(
            f"{manifest.ref} was trained with the chat template and tokenizer {manifest.renderer_digest[:12]}, the merged "
            f"model would have {digest[:12]}. Restore model.chat_template and the base's tokenizer files."
        )


def _refusal(ref: str, bits: int, found: Divergence, bound: float, source: str) -> str:
    quantised = f" It was trained on a base in {bits} bits and merged into the unquantised one." if bits != 16 else ""
    return (
        f"{ref} merged answers differently from {ref} on its base: KL(adapter || merged) is {found.mean:.3g} nats per token, "
        f"at most {found.largest:.3g}, over {found.tokens} tokens of {source}; wanted {bound:g} or less on the mean.{quantised} "
        "Nothing was published. Serve the adapter on its base, or allow more with --max-kl."
    )


def _draft(manifest: Manifest, bits: BaseBits, record: MergeRecord) -> ManifestDraft:
    return ManifestDraft(
        kind="full",
        method=manifest.method,
        base_model=manifest.base_model,
        base_digest=manifest.base_digest,
        base_bits=bits,
        renderer_digest=manifest.renderer_digest,
        config=manifest.config,
        data=manifest.data,
        metrics={"merge/kl_mean": record.kl_mean, "merge/kl_max": record.kl_max},
        run=manifest.run,
        merged_from=record,
        versions={package: importlib.metadata.version(package) for package in VERSIONED},
    )
