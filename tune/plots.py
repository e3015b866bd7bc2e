"""A sweep's pictures, as PNG: the metric by step, parallel coordinates, the importance of each field."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune.leaderboard import Mode, best, comparable
from tune.trials import Trial


def metric_by_step(trials: Sequence[Trial], metric: str, mode: Mode) -> bytes:
    """A line a trial; the best one is thick."""
    figure, axes = _figure()
    first = best(trials, mode)
    for trial in trials:
        if trial.curve:
            thick = first is not None and trial.number == first.number
            values = [value for _, value in trial.curve]
            label = f"trial {trial.number}, the best" if thick else None
            axes.plot(trial.steps, values, "o-", markersize=3, linewidth=2.5 if thick else 1.0, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if first:
        axes.legend(frameon=False)
    return _png(figure)


def parallel_coordinates(trials: Sequence[Trial], metric: str, mode: Mode) -> bytes:
    """A line a trial through its values, each axis from its smallest to its largest, coloured by the metric.

    The metric is that at the share of steps which all trials reached.
    """
    from matplotlib import colormaps

    figure, axes = _figure()
    share, measured = comparable(trials)
    keys = list(dict.fromkeys(key for trial, _ in measured for key in trial.changes))
    columns = {key: [trial.changes.get(key) for trial, _ in measured] for key in keys}
    columns[f"{metric} at {share:.0%}"] = [value for _, value in measured]
    places = {key: _places(column) for key, column in columns.items()}
    good = list(places.values())[-1]
    for index in range(len(measured)):
        colour = colormaps["viridis"](good[index] if mode == "min" else 1 - good[index])
        axes.plot(range(len(places)), [column[index] for column in places.values()], color=colour, linewidth=1.3)
    for at, column in enumerate(columns.values()):
        for value, place in {str(v): (v, p) for v, p in zip(column, list(places.values())[at], strict=True)}.values():
            if place in (0.0, 1.0) or not isinstance(value, float):
                axes.text(at, place, _short(value), fontsize=7, ha="center", va="bottom")
    axes.set_xticks(range(len(places)), list(places), fontsize=8)
    axes.set_yticks([])
    return _png(figure)


def importance_bars(shares: Mapping[str, float]) -> bytes:
    """A bar a field."""
    figure, axes = _figure()
    axes.barh(list(shares)[::-1], list(shares.values())[::-1])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the differences that it alone explains (adjusted R2 of ranks)")
    return _png(figure)


def _places(column: Sequence[Any]) -> list[float]:
    """From 0 to 1: numbers by size (by logarithm over more than a factor of ten), anything else in order of its text."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        numbers = [float(value) for value in column]
        if min(numbers) > 0 and max(numbers) / min(numbers) > 10:
            numbers = [math.log(number) for number in numbers]
    else:
        names = sorted({str(value) for value in column})
        numbers = [float(names.index(str(value))) for value in column]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
