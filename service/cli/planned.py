"""`loray plan`: a run's figures as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from service.config import ResolvedRun, leaves
from service.data.prepare import Prepared
from service.data.shards import DataCard
from service.training.plan import RunPlan


def plan_tables(resolved: ResolvedRun, plan: RunPlan) -> list[Table]:
    """The resolved config with sources, the data cards, what the run would take, memory by part, and advice."""
    config = Table("field", "value", "source", title="config")
    for name, value in leaves(resolved.config.model_dump(mode="json", by_alias=True)):
        config.add_row(name, str(value), resolved.sources[name])
    figures = Table("figure", "value", title="run")
    for name, shown in _figures(plan):
        figures.add_row(name, shown)
    return [config, data_table(plan), *findings_table(plan), figures, *_memory(plan), *_advice(plan)]


def data_table(data: Prepared | RunPlan) -> Table:
    """The data cards of a run."""
    table = Table("data", "rows", "examples", "tokens", "trained on", "longest", "left out", title="data")
    for side, card in (("train", data.train), ("eval", data.eval), ("test", data.test)):
        if card:
            table.add_row(*_data_row(side, card))
    table.caption_justify, table.caption = "left", Text("\n".join(_half_checked(data)))
    return table


def _half_checked(data: Prepared | RunPlan) -> Iterator[str]:
    """The sources of whose checkup nothing is known but of their first rows."""
    for checkup in data.checkups:
        if not checkup.whole:
            looked_at = checkup.rows + checkup.unreadable
            yield f"The checkup read the first {looked_at:,} rows. All: loray data check {checkup.name}"


def findings_table(data: Prepared | RunPlan) -> list[Table]:
    """What the checkup warns of, if anything."""
    found = [(checkup.name, finding) for checkup in data.checkups for finding in checkup.findings]
    table = Table("data", "rows", "finding", "what to do", title="warnings of the data's checkup", show_lines=True)
    for name, finding in found:
        more = ", ..." if finding.count > len(finding.rows) > 0 else ""
        shown = ", ".join(map(str, finding.rows)) + more
        table.add_row(*map(Text, (name, shown, finding.text, finding.fix)))
    return [table] if found else []


def _data_row(side: str, card: DataCard) -> list[str]:
    trained = f"{card.supervised_tokens:,} ({card.supervised_share:.0%})"
    counts = [f"{card.rows:,}", f"{card.examples:,}", f"{card.tokens:,}", trained, str(card.longest)]
    return [f"{side}: {card.source}", *counts, _left_out(card)]


def _left_out(card: DataCard) -> str:
    """What is not trained on of the rows, and what is added to them, in words."""
    parts = [f"{number:,} {why}" for why, number in card.rows_filtered.items()]
    parts += [f"{card.rows_dropped:,} too long"] if card.rows_dropped else []
    parts += [f"{card.rows_truncated:,} lost their end"] if card.rows_truncated else []
    parts += [f"{card.rows_copied:,} changed copies added"] if card.rows_copied else []
    return ", ".join(parts) or "0"


def _figures(plan: RunPlan) -> Iterator[tuple[str, str]]:
    share = plan.trainable_parameters / plan.total_parameters
    trained = f"{plan.supervised_tokens:,} trained on, {plan.supervised_tokens / plan.total_tokens:.0%}"
    yield "base model", f"{plan.base.name} (sha256 {plan.base.digest[:12]})"
    yield "steps", f"{plan.num_steps:,} ({plan.steps_per_epoch:,} an epoch)"
    yield "tokens read", f"{plan.total_tokens:,} ({trained})"
    yield "trainable parameters", f"{plan.trainable_parameters:,} of {plan.total_parameters:,} ({share:.2%})"
    yield from _time(plan)


def _time(plan: RunPlan) -> Iterator[tuple[str, str]]:
    if plan.time is None:
        yield "time", "not measured: loray plan --probe makes two real steps and says"
        return
    training = f"{_duration(plan.time.training_s)} ({plan.time.seconds_per_step:.3g} s a step)"
    evaluating = f", and {_duration(plan.time.evaluation_s)} for evaluation" if plan.time.evaluation_s else ""
    yield "time of training", training + evaluating
    yield "time, source", plan.time.source
    if plan.probe:
        yield "time to load", f"{_duration(plan.probe.load_s)} in the probe"


def _memory(plan: RunPlan) -> Iterator[Table]:
    if plan.memory is None:
        return
    memory = plan.memory
    micro = f"{memory.sequences} x {memory.tokens} tokens, {memory.supervised} trained on"
    title = f"memory per worker, on {memory.device}, above what its libraries take"
    kept = (
        ""
        if memory.device != "cpu"
        else "\nCPU workers keep freed memory for speed: they grow beyond this, seen 1.1 to 2.2 times"
    )
    table = Table("part", "bytes", title=title, caption=f"at the largest micro-batch: {micro}{kept}", min_width=90)
    for part, size in memory.parts.items():
        table.add_row(part, _size(size))
    for phase, size in memory.peaks.items():
        table.add_row(f"peak: {phase}", _size(size))
    if memory.device != "cpu":
        table.add_row("in host memory: what checkpoints are written from", _size(memory.host_bytes))
    if plan.probe:
        table.add_row("measured by the probe, in one worker", _size(plan.probe.peak_bytes))
        table.add_row("process with its libraries, beside it", _size(plan.probe.libraries_bytes))
    yield table


def _advice(plan: RunPlan) -> Iterator[Table]:
    if plan.advice:
        table = Table("advice", show_lines=True)
        for line in plan.advice:
            table.add_row(line)
        yield table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
