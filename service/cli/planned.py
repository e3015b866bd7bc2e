"""`loray plan`: a run's figures as tables for a person."""

from __future__ import annotations

from rich.table import Table

from service.config import ResolvedRun, leaves
from service.data.prepare import DataCard
from service.training.plan import RunPlan


def plan_tables(resolved: ResolvedRun, plan: RunPlan) -> list[Table]:
    """The resolved config with sources, the data cards, and what the run would take."""
    config = Table("field", "value", "source", title="config")
    for name, value in leaves(resolved.config.model_dump(mode="json", by_alias=True)):
        config.add_row(name, str(value), resolved.sources[name])
    data = Table("data", "rows", "examples", "tokens", "trained on", "longest", "dropped", title="data")
    for card in (plan.train, plan.eval):
        if card:
            data.add_row(*_data_row(card))
    figures = Table("figure", "value", title="run")
    for name, shown in _figures(plan).items():
        figures.add_row(name, shown)
    return [config, data, figures]


def _data_row(card: DataCard) -> list[str]:
    trained = f"{card.supervised_tokens:,} ({card.supervised_share:.0%})"
    counts = [f"{card.rows:,}", f"{card.examples:,}", f"{card.tokens:,}", trained, str(card.longest)]
    return [card.source, *counts, str(card.rows_dropped)]


def _figures(plan: RunPlan) -> dict[str, str]:
    share = plan.trainable_parameters / plan.total_parameters
    parts = {
        "frozen weights": plan.frozen_weight_bytes,
        "trainable weights": plan.trainable_weight_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer": plan.optimizer_bytes,
    }
    return {
        "base model": f"{plan.base.name} (sha256 {plan.base.digest[:12]})",
        "steps": f"{plan.num_steps:,} ({plan.steps_per_epoch:,} an epoch), micro-batch {plan.micro_rows} rows",
        "tokens read": f"{plan.total_tokens:,}",
        "trainable parameters": f"{plan.trainable_parameters:,} of {plan.total_parameters:,} ({share:.2%})",
        **{f"bytes per worker, {name}": f"{size / 2**20:,.1f} MiB" for name, size in parts.items()},
        "bytes per worker, activations": "not estimated",
    }
