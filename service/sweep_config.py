"""What a sweep file may hold: which fields of a run vary, how they are searched, when trials are stopped.

    base: tickets.yaml                    # a run file, relative to the sweep file; or leave it out and write a run file here
    space:                                # any field of a run, by its dotted name
      optim.lr: {log: [1.0e-5, 1.0e-3]}
      method.r: [4, 8, 16, 32]
      method.alpha: {ratio_of: method.r, choose: [1, 2]}
      method.dropout: {uniform: [0, 0.1], when: {method.r: [16, 32]}}
    search: {algorithm: random, trials: 16, metric: eval/loss}
    stop: asha
    publish: tickets

A range in a plain run file makes that file a sweep: its ranges are the space, `search:` may stand in it. Files are
read in `tune/sweep_file.py`, values are drawn in `tune/space.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from service.config_blocks import Block, PublishBlock
from service.config_values import value_at

RANGES = ("log", "uniform", "integer", "choose")
# What a run reports (training/loop.py).
METRICS = (
    *("eval/loss", "eval/perplexity", "train/loss", "train/grad_norm", "train/tokens", "train/supervised_tokens"),
    *(
        "train/tokens_per_s",
        "train/data_wait_share",
        "train/epoch",
        "optim/lr",
        "optim/loss_scale",
        "memory/peak_bytes",
    ),
)
# What population-based training may change in the middle of a run: no shape, and nothing that the order of rows follows from.
STEPS = (
    "model",
    "data",
    "optim.batch",
    "optim.epochs",
    "optim.max_steps",
    "run",
)  # what the number of steps depends on
LIVE = ("optim.lr", "optim.weight_decay", "optim.clip", "method.dropout")
# What may differ among trials that share one copy of the base.
SHARING = ("optim.lr", "method.r", "method.alpha")

Ends = Annotated[tuple[float, float], Strict(False)]


class Dimension(Block):
    """One field's values: one of four ranges, of the field itself or of its ratio to another; `when` it is searched at all.

    `log` is uniform in the logarithm; both are rounded where the field takes integers, and `integer` includes its ends.
    A field whose `when` does not hold keeps what the base says.
    """

    log: Ends | None = None
    uniform: Ends | None = None
    integer: Annotated[tuple[int, int], Strict(False)] | None = None
    choose: Annotated[tuple[Any, ...], Strict(False), Field(min_length=1)] | None = None
    ratio_of: str | None = None
    when: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _one_range_that_holds_something(self) -> Self:
        given = [name for name in RANGES if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none"
            raise ValueError(f"holds {seen}; give one of log, uniform, integer or choose")
        if self.ends and self.ends[0] >= self.ends[1]:
            raise ValueError(f"{given[0]} [{self.ends[0]:g}, {self.ends[1]:g}] is empty; write the smaller end first")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"log [{self.log[0]:g}, {self.log[1]:g}] must begin above 0; a logarithm has no 0")
        words = [value for value in self.choose or () if isinstance(value, bool) or not isinstance(value, int | float)]
        if self.ratio_of and words:
            raise ValueError(f"ratio_of multiplies {self.ratio_of}, which {words[0]!r} cannot; list numbers")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of a range of numbers."""
        return self.log or self.uniform or self.integer


MOST_TRIALS = 10_000


class Budget(Block):
    """What all trials together may take; where it is spent, running trials stop with a checkpoint."""

    tokens: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)


class SearchBlock(Block):
    """How values are found: `trials` is 16 unless given, for a grid all of it. `parallel`: as many as have room, unless given.

    `share_base`: all trials train in one worker on one copy of the frozen base, `parallel` of them (4 unless given) at a time.
    """

    algorithm: Literal["random", "grid", "tpe"] = "random"
    trials: int | None = Field(default=None, ge=1, le=MOST_TRIALS)
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    parallel: int | None = Field(default=None, ge=1)
    share_base: bool = False
    budget: Annotated[Budget, BeforeValidator(lambda value: {} if value is None else value)] = Budget()
    seed: int = Field(default=0, ge=0, lt=2**32)


class AshaBlock(Block):
    """Asynchronous successive halving, arXiv:1810.05934: past `grace` of its steps, and at each `factor` times as many, a
    trial goes on if it is among the best 1/`factor` of those that got there before it."""

    type: Literal["asha"] = "asha"
    factor: float = Field(default=4.0, gt=1)
    grace: float = Field(default=1 / 16, gt=0, lt=1)


class PbtBlock(Block):
    """Population-based training, arXiv:1711.09846: after each `every` of its steps a trial among the worst `quantile` takes
    over the checkpoint of one among the best, with its rate (and whatever else is in LIVE) times one of `factors`."""

    type: Literal["pbt"] = "pbt"
    every: float = Field(default=0.125, gt=0, lt=1)
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    factors: Annotated[tuple[float, float], Strict(False)] = (0.8, 1.25)


class NoStopBlock(Block):
    """Every trial runs to its end."""

    type: Literal["none"] = "none"


StopRule = Annotated[AshaBlock | PbtBlock | NoStopBlock, Field(discriminator="type")]


def _stop(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": value}
    return {"type": "asha", **value} if isinstance(value, Mapping) else value


def _main_key(key: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class SweepConfig(Block):
    """A sweep without its space and its base."""

    search: Annotated[SearchBlock, _main_key("algorithm")] = SearchBlock()
    stop: Annotated[StopRule, BeforeValidator(_stop)] = AshaBlock()
    publish: Annotated[PublishBlock, _main_key("name")] | None = None

    @classmethod
    def problems_across(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What cannot be searched and stopped together."""
        algorithm = (
            values.get("search") if isinstance(values.get("search"), str) else value_at(values, "search.algorithm")
        )
        rule = values.get("stop") if isinstance(values.get("stop"), str) else value_at(values, "stop.type")
        if rule == "pbt" and algorithm in ("tpe", "grid"):
            what = "draws new trials from finished ones" if algorithm == "tpe" else "goes through fixed values"
            yield (
                f"stop: pbt changes values while all trials train, search: {algorithm} {what}; the two cannot go together. "
                "Set search.algorithm: random, or stop: asha."
            )
        if value_at(values, "search.share_base") and (algorithm == "tpe" or rule == "pbt"):
            both = "search: tpe" if algorithm == "tpe" else "stop: pbt"
            yield (
                f"search.share_base: has a runner of its own, which knows no {both}. Set search.algorithm to random or grid, "
                "and stop to asha or none."
            )
        metric = value_at(values, "search.metric")
        if isinstance(metric, str) and metric not in METRICS:
            yield f"search.metric: no run reports {metric!r}. Reported are {', '.join(METRICS)}."
