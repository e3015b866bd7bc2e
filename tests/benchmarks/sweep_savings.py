"""What stopping early saves and what it costs, and what sharing the base saves: on the tickets task.

    python -m tests.benchmarks.sweep_savings [--seeds 0 1 2] [--sweep FILE] [--set optim.max_steps=16 ...]

Prints a table, then one JSON line: `asha_token_share`, the tokens that the trials read with ASHA over those of the same trials
run to their ends, and `asha_loss_gap`, how much worse the best loss is (0.02: 2 %); medians over the seeds. Beside them what
Tune and Train cost around a trial, in seconds from its beginning to its first step. `shared_base_memory` is the peak memory
of one worker that trains SHARED trials on one copy of the base over the sum of those trials' workers when each has its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from service.runs import Run
from service.settings import Settings, load_settings
from tune import leaderboard
from tune.sweep import run_sweep
from tune.sweep_file import load_sweep
from tune.trials import Trial, Trials

RECIPE = "jobs/recipes/tickets-sweep.yaml"
SHARED = 4


@dataclass(frozen=True)
class Arm:
    """One sweep's figures."""

    tokens: int
    best: float
    stopped: int
    startups_s: tuple[float, ...]


def arm(trials: list[Trial]) -> Arm:
    first = leaderboard.best(trials, "min")
    assert first and first.value is not None, "no trial has finished"
    startups = tuple(trial.startup_s for trial in trials if trial.startup_s is not None)
    return Arm(leaderboard.tokens(trials), first.value, sum(trial.state == "stopped" for trial in trials), startups)


def swept(file: str, seed: int, stop: str, overrides: list[str], settings: Settings) -> Arm:
    resolved = load_sweep(file, [f"search.seed={seed}", f"stop.type={stop}", "publish=null", *overrides])
    sweep = run_sweep(resolved, settings, Console(file=sys.stderr, width=160))
    return arm(Trials(sweep, resolved).look())


def sharing(file: str, overrides: list[str], settings: Settings) -> float:
    """The ratio of peaks; prints the seconds of both, and how far the trials' losses are apart."""
    peaks, seconds, losses = [], [], []
    for share in ("false", "true"):
        own = [
            f"search.trials={SHARED}",
            "stop.type=none",
            "publish=null",
            "scale.workers=1",
            f"search.share_base={share}",
        ]
        resolved = load_sweep(file, [*overrides, *own])
        sweep = run_sweep(resolved, settings, Console(file=sys.stderr, width=160))
        trials = Trials(sweep, resolved).look()
        assert all(trial.state == "finished" for trial in trials), [trial.why for trial in trials]
        runs = [Run(settings.home, str(trial.run)) for trial in trials]
        peaks.append(
            [max(row["memory/peak_bytes"] for row in run.metrics() if "memory/peak_bytes" in row) for run in runs]
        )
        seconds.append(float(sweep.status().details["seconds"]))
        losses.append([trial.value or 0.0 for trial in trials])
    alone, shared = sum(peaks[0]), max(peaks[1])
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"{SHARED} trials on a base each: {alone / 2**30:.2f} GiB, {seconds[0]:.0f} s; on one base: "
        f"{shared / 2**30:.2f} GiB, {seconds[1]:.0f} s; losses differ by up to {apart:.2g}"
    )
    return float(shared / alone)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens that early stopping saves.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sweep", default=RECIPE, help="a sweep file of random search")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    given = parser.parse_args()
    shares, gaps, startups = [], [], []
    print(
        f"{'seed':>4}  {'tokens, to the end':>18}  {'tokens, ASHA':>12}  {'stopped':>7}  {'best, to the end':>16}  best, ASHA"
    )
    with tempfile.TemporaryDirectory(prefix="loray-savings-") as home:
        settings = replace(load_settings(), home=str(Path(home)))
        for seed in given.seeds:
            whole, asha = (swept(given.sweep, seed, stop, given.set, settings) for stop in ("none", "asha"))
            shares.append(asha.tokens / whole.tokens)
            gaps.append(asha.best / whole.best - 1)
            startups += [*whole.startups_s, *asha.startups_s]
            print(
                f"{seed:>4}  {whole.tokens:>18,}  {asha.tokens:>12,}  {asha.stopped:>7}  {whole.best:>16.4f}  {asha.best:.4f}",
                flush=True,
            )
        shared = sharing(given.sweep, given.set, settings)
    print(
        f"from a trial's beginning to its first step: median {statistics.median(startups):.1f} s of {len(startups)} trials"
    )
    ratios = {"asha_token_share": statistics.median(shares), "asha_loss_gap": statistics.median(gaps)}
    ratios["shared_base_memory"] = shared
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
