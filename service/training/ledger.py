"""The proof that training drew what it should have: a run's ledger against its plan, made again from its config and data.

The ledger says for every step which rows of the training file were drawn (`Run.ledger` merges workers and attempts). A
step that some checkpoint holds was logged by all workers before that checkpoint became visible; so it is settled, and
must be exactly the planned draws. Later steps are repeated by the next attempt: of them a worker that was killed may have
left its rows and another not, which is no error, but nothing that was not planned may be there. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import storage
from service.config import run_from_json
from service.data import planner, shards
from service.domain import RunState
from service.errors import NotFoundError
from service.runs import Run

_SHOWN = 20


@dataclass(frozen=True)
class StepDifference:
    """How one step differs from its plan. Row numbers stand as often as they are missing or too many."""

    step: int
    missing: list[int]
    extra: list[int]  # not planned for this step at all
    twice: list[int]  # planned, and drawn once more

    def __str__(self) -> str:
        parts = (("missing rows", self.missing), ("extra rows", self.extra), ("drawn twice", self.twice))
        return f"step {self.step}: " + ", ".join(f"{what} {_shown(rows)}" for what, rows in parts if rows)


@dataclass(frozen=True)
class LedgerCheck:
    """What the comparison found."""

    steps: int  # that are exactly as planned
    draws: int  # in these
    unsettled: list[int]  # steps that lack draws, and that no checkpoint holds yet
    differences: list[StepDifference]

    @property
    def ok(self) -> bool:
        """Nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        if self.ok:
            line = f"ledger: {self.steps:,} steps, {self.draws:,} draws, each exactly once"
            return (
                f"{line}; not whole and not in a checkpoint yet: {_shown(self.unsettled)}" if self.unsettled else line
            )
        head = f"ledger: {len(self.differences):,} steps differ from the plan, {self.steps:,} are as planned"
        more = len(self.differences) - _SHOWN
        return "\n".join([head, *map(str, self.differences[:_SHOWN]), *([f"and {more:,} more"] if more > 0 else [])])


def check_ledger(run: Run, cache: Path) -> LedgerCheck:
    """Compare a run's ledger with its plan. NotFoundError where the run never began, or its data was deleted."""
    config = run_from_json(run.resolved()).config
    status = run.status()
    if children := status.details.get("children"):
        raise NotFoundError(f"run {run.id} has drawn nothing itself. Check its trainings: {', '.join(children)}")
    if "train_digest" not in status.details:
        raise NotFoundError(f"run {run.id} is {status.state} and has drawn nothing yet: there is no plan to check.")
    rows = shards.load(status.details["train_digest"], home=run.home, cache=cache)
    plan = planner.plan_of(config, rows.lengths, rows.card.bounds, rows.scores)
    drawn = run.ledger()
    settled = newest_checkpoint_step(run)
    if status.state is RunState.SUCCEEDED:
        logged = max((row["step"] for row in (*drawn, *run.metrics())), default=0)
        settled = max(settled, logged) if config.stop.patience else plan.num_steps
    return compare(lambda step: rows.row_numbers[plan.rows(step - 1)].tolist(), plan.num_steps, drawn, settled)


def compare(
    planned: Callable[[int], Sequence[int]], num_steps: int, drawn: Sequence[Mapping[str, Any]], settled: int
) -> LedgerCheck:
    """`planned(step)` are the row numbers of steps 1 to `num_steps`, `drawn` the ledger; all up to `settled` must be whole.

    Several examples may come from one row of the file: its number then stands as often, and must be drawn as often.
    """
    ids = {int(row["step"]): row["ids"] for row in drawn}
    steps = draws = 0
    unsettled: list[int] = []
    differences: list[StepDifference] = []
    for step in range(1, max(settled, *ids, 0) + 1):
        wanted = Counter(planned(step) if step <= num_steps else ())
        found = Counter(ids.get(step, ()))
        missing, surplus = sorted((wanted - found).elements()), sorted((found - wanted).elements())
        if not missing and not surplus:
            steps, draws = steps + 1, draws + found.total()
        elif step in ids and step > settled and not surplus:
            unsettled.append(step)
        else:
            extra = [row for row in surplus if row not in wanted]
            twice = [row for row in surplus if row in wanted]
            differences.append(StepDifference(step, missing, extra, twice))
    return LedgerCheck(steps, draws, unsettled, differences)


def newest_checkpoint_step(run: Run) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    for name in reversed(storage.list_names(run.path("checkpoints"))):
        if name.isdigit() and storage.exists(run.path("checkpoints", name, "checkpoint.json")):
            return int(name)
    return 0


def _shown(numbers: Sequence[int]) -> str:
    more = len(numbers) - _SHOWN
    return f"[{', '.join(map(str, numbers[:_SHOWN]))}{f' and {more:,} more' if more > 0 else ''}]"
