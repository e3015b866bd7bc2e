"""Several trainings as one run: over folds of the data or over seeds, with mean and spread of what they measure.

    run: {folds: 5}     five trainings, each held-out fold once
    run: {seeds: 3}     three trainings that differ in `seed`: what is chance, and what is not

The run that was asked for trains nothing itself. Its children are runs like any other: with directories of their own,
resumable, through the gate, one after the other, from the same prepared data where that does not depend on the fold.
Their ids are in the status of the whole, which goes on at the first child that has not succeeded. What is asked of the
whole by `stop` or by a signal reaches the child that is training.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from service import launcher, storage
from service.config import ResolvedRun, derived
from service.domain import Manifest, RunState
from service.errors import NotFoundError
from service.registry import Registry
from service.runs import Run, new_id
from service.settings import Settings
from service.status import repeating
from service.training import driver
from service.training.plan import make_run_plan
from service.training.stop_channel import StopChannel

PASS_ON_EVERY_S = 1.0
FIRST_METRICS = ("eval/loss", "eval/perplexity", "test/loss", "test/perplexity", "train/loss")


@dataclass(frozen=True)
class Variant:
    """What one child is, `fold 2 of 5` or `seed 7`, what its run is called, and its config."""

    name: str
    run_name: str
    resolved: ResolvedRun


def variants(resolved: ResolvedRun) -> list[Variant]:
    """The children that a config asks for; none where it is a training by itself."""
    config, name = resolved.config, driver.run_name(resolved)[:28]
    if config.run.folds > 1 and config.run.fold is None:
        of = config.run.folds
        folds = range(1, of + 1)
        return [Variant(f"fold {i} of {of}", f"{name}-fold-{i}", derived(resolved, [f"run.fold={i}"])) for i in folds]
    if config.run.seeds > 1:
        seeds = range(config.seed, config.seed + config.run.seeds)
        alone = ("run.seeds=1", "publish=null")
        return [Variant(f"seed {i}", f"{name}-seed-{i}", derived(resolved, [f"seed={i}", *alone])) for i in seeds]
    return []


def train(
    resolved: ResolvedRun,
    settings: Settings,
    console: Console,
    *,
    resume: Run | None = None,
    run_id: str | None = None,
    profile: bool = False,
    asked_at: float = 0.0,
) -> Run:
    """As `driver.train_run`, which it calls for each child, or once where there are none."""
    children = variants(resolved)
    if not children:
        return driver.train_run(
            resolved, settings, console, resume=resume, run_id=run_id, profile=profile, asked_at=asked_at
        )
    if resume is None:
        make_run_plan(children[0].resolved, settings)  # wrong input is told before there is a run
    name = driver.run_name(resolved)
    run = resume or Run.create(settings.home, name, resolved.text, resolved.as_json(), id=run_id)
    if resume:
        run.set_resolved(resolved.as_json())  # with what was set on resuming
    driver.begin(run)
    with driver.driven(run):
        _say(console, f"Run {run.id}  ({run.uri}): {len(children)} trainings")
        trained = _train_children(run, children, settings, console, profile=profile, asked_at=asked_at)
        if trained:
            _finish(run, resolved, trained, settings, console)
    return run


def _train_children(
    run: Run, children: Sequence[Variant], settings: Settings, console: Console, *, profile: bool, asked_at: float
) -> list[Outcome]:
    """One after the other; what they have measured. Nothing where it was asked to stop: then that is the run's state."""
    launcher.connect()  # first, because Ray brings a handler of SIGTERM of its own
    stop, trained = StopChannel(run), list[Outcome]()
    with driver.stop_on_signal(stop, console):
        for number, variant in enumerate(children):
            child, before = _child(run, number, variant)
            if before is None or before.status().state is not RunState.SUCCEEDED:
                run.heartbeat(message=f"{variant.name}: run {child.id}")
                _say(console, f"--- {variant.name}")
                with _passing_on(stop, child):
                    driver.train_run(
                        replace(variant.resolved, text=f"# {variant.name} of run {run.id}\n{variant.resolved.text}"),
                        settings,
                        console,
                        resume=driver.reopen(run.home, child.id) if before else None,
                        run_id=child.id,
                        profile=profile,
                        asked_at=asked_at if number == 0 else time.time(),
                    )
            status, last = child.status(), number == len(children) - 1
            reason = stop.wanted() or StopChannel(child).wanted()
            if status.state is not RunState.SUCCEEDED or (reason and not last):
                run.set_state(RunState.STOPPED, reason or status.message)
                _say(console, f"Stopped at {variant.name}. Go on: loray train --resume {run.id}")
                return []
            trained.append(Outcome.of(variant, child))
    return trained


def _child(run: Run, number: int, variant: Variant) -> tuple[Run, Run | None]:
    """The child of this number, whose id the run has kept, or keeps now; and again where it exists already."""
    ids = run.status().details.get("children", [])
    if number == len(ids):
        ids = [*ids, new_id(run.home, variant.run_name)]
        run.heartbeat(children=ids)
    try:
        return Run(run.home, ids[number]), Run.open(run.home, ids[number])
    except NotFoundError:
        return Run(run.home, ids[number]), None


@contextmanager
def _passing_on(stop: StopChannel, child: Run) -> Iterator[None]:
    """What the whole is asked to do, its child is asked to do: from a thread, because this one trains the child."""

    def pass_on() -> None:
        stop.deliver()
        reason = stop.wanted()
        if reason and child.status().state is RunState.RUNNING and not child.stop_requested():
            child.request_stop(reason)

    with repeating(pass_on, PASS_ON_EVERY_S, "pass-on-stops"):
        yield


@dataclass(frozen=True)
class Outcome:
    """What a child came to: the metrics of the step that its model is of, without those that were not finite."""

    name: str
    run: Run
    resolved: ResolvedRun
    step: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, variant: Variant, child: Run) -> Outcome:
        """Of a child that has succeeded."""
        step = child.status().step or 0
        return cls(variant.name, child, variant.resolved, step, child.figures(step))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What summary.json holds: each child, and mean and standard deviation (n - 1) of each metric that all have."""
    named = [name for name in outcomes[0].metrics if all(name in outcome.metrics for outcome in outcomes)]
    named.sort(key=lambda name: (FIRST_METRICS.index(name) if name in FIRST_METRICS else len(FIRST_METRICS), name))
    values = {name: [outcome.metrics[name] for outcome in outcomes] for name in named}
    return {
        "children": [{"name": o.name, "run": o.run.id, "step": o.step, "metrics": o.metrics} for o in outcomes],
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) for name, found in values.items()},
    }


def _finish(run: Run, resolved: ResolvedRun, outcomes: Sequence[Outcome], settings: Settings, console: Console) -> None:
    """Publish the best, write report and summary, say where they are. Storage that is away is asked again."""
    insist = driver.patience_of(run, resolved, console).insist
    found = summary(outcomes)
    model = insist(lambda: _publish_best(resolved, outcomes, settings)) if resolved.config.publish else None
    insist(lambda: storage.write_bytes(run.path("summary.json"), json.dumps(found, indent=2).encode()))
    report = run.path("report.md")
    insist(lambda: storage.write_bytes(report, _page(run, resolved, found, model).encode()))
    insist(lambda: run.set_state(RunState.SUCCEEDED, report=report, **({"model": model} if model else {})))
    for name in [name for name in FIRST_METRICS if name in found["mean"]]:
        _say(console, f"{name}: {found['mean'][name]:.4f} +- {found['std'][name]:.4f} over {len(outcomes)} trainings")
    if model:
        _say(console, f"Published {model}, the one of lowest eval/loss")
    _say(console, f"Report: {report}")


def _publish_best(resolved: ResolvedRun, outcomes: Sequence[Outcome], settings: Settings) -> str:
    """The child of lowest eval/loss as a version, unless an earlier attempt has published it."""
    assert resolved.config.publish, "only a run that publishes has a best"
    family, registry = resolved.config.publish.name, Registry(settings.home)
    best = min(outcomes, key=lambda outcome: outcome.metrics.get("eval/loss", math.inf))

    def publish() -> Manifest:
        plan = make_run_plan(best.resolved, settings, driver.digests(best.run))
        return driver.publish_model(family, best.run, best.resolved, settings, plan, best.metrics)

    return driver.published_once(family, best.run, registry, publish).ref


def _page(run: Run, resolved: ResolvedRun, found: dict[str, Any], model: str | None) -> str:
    """report.md: mean and spread of each metric, a line a child, the run file."""
    shown = [name for name in FIRST_METRICS if name in found["mean"]]
    lines = [f"# Run {run.id}", "", f"{len(found['children'])} trainings, one after the other."]
    lines += [f"Published as {model}, the one of lowest eval/loss."] if model else []
    lines += ["", "| metric | mean | standard deviation |", "|---|---|---|"]
    lines += [f"| {name} | {mean:.6g} | {found['std'][name]:.3g} |" for name, mean in found["mean"].items()]
    lines += ["", f"| training | run | step | {' | '.join(shown)} |", "|" + "---|" * (3 + len(shown))]
    for child in found["children"]:
        figures = " | ".join(f"{child['metrics'][name]:.6g}" for name in shown)
        lines.append(f"| {child['name']} | {child['run']} | {child['step']} | {figures} |")
    lines += [
        "",
        "The standard deviation divides by n - 1.",
        "",
        "## Run file",
        "",
        "```yaml",
        resolved.text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
