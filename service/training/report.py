"""A finished run as a page: `report.md` and its loss curve `loss.png`, in the run's directory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from service import storage
from service.config import LoraBlock, ResolvedRun, RunConfig
from service.config_values import leaves
from service.logs import figure
from service.runs import Run
from service.training.loop import TrainResult
from service.training.plan import RunPlan

# How far the loss may end above where it began before a report warns: what batches of a few rows differ by stays below.
WORSE_SHARE, WORSE_NATS = 0.25, 0.1


def write_report(
    run: Run, resolved: ResolvedRun, plan: RunPlan, result: TrainResult, published: str | None
) -> tuple[str, str | None]:
    """Write both files; the URI of report.md, and its warning if it has one."""
    rows = run.metrics()
    warning = got_worse(
        [figure(row["train/loss"]) for row in rows if "train/loss" in row and row["step"] <= result.step]
    )
    storage.write_bytes(run.path("loss.png"), loss_curve(rows))
    uri = run.path("report.md")
    storage.write_bytes(uri, _page(run, resolved, plan, result, published, rows, warning).encode())
    return uri, warning


def got_worse(losses: Sequence[float]) -> str | None:
    """What to say of training losses (nats, by step) whose last tenth lies clearly above their first; None if it does not."""
    if not losses:
        return None
    tenth = max(1, len(losses) // 10)
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    if last <= first + max(WORSE_NATS, WORSE_SHARE * first):
        return None
    return (
        f"the training loss rose from {first:.4g} to {last:.4g} nats: this model is worse than what it began as. "
        "Lower optim.lr, or look at the rows: loray data check."
    )


def startup(run: Run) -> str:
    """The seconds from the command to the first step of the newest attempt, and where they went."""
    lines = [event["text"] for event in run.events() if event["kind"] == "ready"]
    return lines[-1] if lines else "unknown"


def loss_curve(rows: list[dict[str, Any]]) -> bytes:
    """A PNG of training loss and, where measured, held-out loss, by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("train/loss", "training", "-"), ("eval/loss", "held out", "o--")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _page(
    run: Run,
    resolved: ResolvedRun,
    plan: RunPlan,
    result: TrainResult,
    published: str | None,
    rows: list[dict[str, Any]],
    warning: str | None,
) -> str:
    config = resolved.config
    measured = [f"{figure(row['eval/loss']):.4f}" for row in rows if "eval/loss" in row]
    held_out = " -> ".join([*measured[:1], *measured[1:][-1:]]) or "not measured: no data.eval"
    rates = [row["train/tokens_per_s"] for row in rows if "train/tokens_per_s" in row]
    gate = result.gate
    table = {
        "published as": published or "not published (no `publish` in the run file)",
        "base model": f"{plan.base.name} (sha256 {plan.base.digest[:12]})",
        "method": f"{_method(config)}, {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters",
        "training rows": f"{plan.train.rows:,} ({plan.train.tokens:,} tokens, {plan.train.supervised_share:.0%} trained)",
        "steps": f"{result.step} of {plan.num_steps}, global batch {_batch(config)}, {config.scale.strategy} on "
        f"{run.status().details.get('workers', 1)} worker(s)",
        "training loss": f"{rows[0].get('train/loss', rows[min(1, len(rows) - 1)].get('train/loss')):.4f} -> "
        f"{rows[-1]['train/loss']:.4f} nats per trained token",
        "held-out loss": held_out,
        **({"test loss": f"{result.metrics['test/loss']:.4f}, measured once, at the end"} if plan.test else {}),
        "speed": f"median {sorted(rates)[len(rates) // 2]:.0f} tokens/s over all workers",
        "start-up": startup(run),
        "peak memory": f"{rows[-1]['memory/peak_bytes'] / 2**30:.2f} GiB (worker 0)",
        "head": result.head,
        "packing": result.packing,
    }
    if gate:
        table["gate"] = (
            f"alive {gate.alive}/{gate.total}; reloaded = trained within {gate.largest_difference:.2g} nats "
            f"(allowed {gate.tolerance:.2g}); differs from the base by up to {gate.change_from_base:.2g}"
        )
    if warning:
        table["warning"] = warning
    lines = [f"# Run {run.id}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in table.items())]
    values = leaves(config.model_dump(mode="json", by_alias=True))
    changed = [f"- `{key}`: {value}" for key, value in values if resolved.sources.get(key) == "--set"]
    lines += ["", "![loss](loss.png)", "", "## Run file", "", "```yaml", resolved.text.rstrip(), "```"]
    if changed:
        lines += ["", "Set on the command line:", *changed]
    return "\n".join(lines) + "\n"


def _method(config: RunConfig) -> str:
    method = config.method
    if not isinstance(method, LoraBlock):
        return "all weights"
    options = [name for name in ("dora", "rslora") if getattr(method, name)]
    return f"{method.type} r={method.r} alpha={method.alpha:g}{''.join(f' {name}' for name in options)}"


def _batch(config: RunConfig) -> str:
    batch = config.optim.batch
    return f"{batch.rows} rows" if batch.rows else f"{batch.tokens} tokens"
