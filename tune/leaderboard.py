"""Which trial is best, and what mattered: pure, on trials as `trials.py` reads them, and written as a page and as JSON.

Trials that ended early are compared with the others as far as all of them got, not by their last figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tune.trials import Trial, TrialState

Mode = Literal["min", "max"]
FEWEST = 8  # trials, below which nothing is said of what mattered: a parabola goes through almost any four points


def ranked(trials: Sequence[Trial], mode: Mode) -> list[Trial]:
    """Best first: finished trials by their metric, then the others by how far they got and theirs; unmeasured ones last."""
    sign = 1.0 if mode == "min" else -1.0

    def place(trial: Trial) -> tuple[bool, bool, float, float, int]:
        finished = trial.state is TrialState.FINISHED
        value = math.inf if trial.value is None else sign * trial.value
        return trial.value is None, not finished, 0.0 if finished else -trial.progress, value, trial.number

    return sorted(trials, key=place)


def best(trials: Sequence[Trial], mode: Mode) -> Trial | None:
    """The best of the finished trials: only they have a model."""
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED and trial.value is not None]
    return ranked(finished, mode)[0] if finished else None


def comparable(trials: Sequence[Trial]) -> tuple[float, list[tuple[Trial, float]]]:
    """The share of a run's steps that all measured trials reached, and the metric of each from there on."""
    measured = [trial for trial in trials if trial.curve]
    share = min((trial.curve[-1][0] for trial in measured), default=0.0)
    return share, [(trial, next(v for at, v in trial.curve if at >= share)) for trial in measured]


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """By field that varies, the share of the metric's differences that this field alone explains, 0 to 1.

    Adjusted R2 of ranks: for numbers of a parabola, because a rate can be too low and too high; for words of the group
    means. Fields that work only together show in none of them.
    """
    _, values = comparable(trials)
    if len(values) < FEWEST:
        return {}
    metric = _ranks([value for _, value in values])
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for trial, _ in values for key in trial.changes):
        column = [trial.changes.get(key) for trial, _ in values]
        if len({repr(value) for value in column}) > 1:
            found[key] = _explained(_design(column), metric)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def tokens(trials: Sequence[Trial]) -> int:
    """What all trials together have read."""
    return sum(trial.tokens for trial in trials)


def as_json(trials: Sequence[Trial], metric: str, mode: Mode, model: str | None) -> dict[str, Any]:
    """What `leaderboard.json` holds."""
    first = best(trials, mode)
    return {
        "metric": metric,
        "mode": mode,
        "best": first.number if first else None,
        "model": model,
        "tokens": tokens(trials),
        "importance": importance(trials),
        "trials": [_row(trial) for trial in ranked(trials, mode)],
    }


def page(title: str, board: Mapping[str, Any], run_file: str) -> str:
    """`leaderboard.md`: the ranking, what mattered, and the best trial's run file."""
    keys = list(dict.fromkeys(key for row in board["trials"] for key in row["changes"]))
    header = ["#", "trial", *keys, board["metric"], "step", "state", "tokens", "run"]
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header))]
    for place, row in enumerate(board["trials"], start=1):
        values = [shown(row["changes"].get(key)) for key in keys]
        figures = [shown(row["value"]), f"{row['step']}/{row['num_steps']}", row["state"], f"{row['tokens']:,}"]
        lines.append(_line([str(place), str(row["trial"]), *values, *figures, row["run"] or ""]))
    whys = [f"- trial {row['trial']}: {row['why']}" for row in board["trials"] if row["why"]]
    lines += ["", "![metric](metric.png)", "![parameters](parallel.png)"]
    if board["importance"]:
        lines += ["", "## What mattered", "", "Share of the differences that each field alone explains:", ""]
        lines += [f"- `{key}`: {share:.0%}" for key, share in board["importance"].items()]
        lines += ["", "![importance](importance.png)"]
    lines += ["", "## Why trials ended early", "", *whys] if whys else []
    if run_file:
        lines += ["", f"## Run file of trial {board['best']}", "", "```yaml", run_file.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value for a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "run": trial.run,
        "state": str(trial.state),
        "why": trial.why.split("\n")[0],
        "changes": trial.changes,
        "value": trial.value,
        "step": trial.step,
        "num_steps": trial.num_steps,
        "tokens": trial.tokens,
        "startup_s": trial.startup_s,
        "curve": [{"step": step, "value": value} for step, (_, value) in zip(trial.steps, trial.curve, strict=True)],
    }


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """From 0 to 1; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    upto = (array[:, None] >= array[None, :]).sum(axis=1)
    ranks: npt.NDArray[np.float64] = (below + upto - 1) / 2 / max(1, len(array) - 1)
    return ranks


def _design(column: Sequence[Any]) -> npt.NDArray[np.float64]:
    """The columns that explain, a constant first."""
    ones = np.ones(len(column))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        ranks = _ranks([float(value) for value in column])
        powers = [ranks, ranks**2] if len(set(ranks.tolist())) > 2 else [ranks]
        return np.stack([ones, *powers], axis=1)
    names = sorted({repr(value) for value in column})
    groups = [np.array([repr(value) == name for value in column], dtype=np.float64) for name in names[1:]]
    return np.stack([ones, *groups], axis=1)


def _explained(design: npt.NDArray[np.float64], metric: npt.NDArray[np.float64]) -> float:
    total = float(((metric - metric.mean()) ** 2).sum())
    free = len(metric) - design.shape[1]
    if total == 0.0 or free < 1:
        return 0.0
    fit, *_ = np.linalg.lstsq(design, metric, rcond=None)
    left = float(((metric - design @ fit) ** 2).sum())
    return float(max(0.0, 1.0 - (left / free) / (total / (len(metric) - 1))))


def dumps(board: Mapping[str, Any]) -> bytes:
    """As it is stored."""
    return json.dumps(board, indent=2).encode()
