"""The ledger's proof: what whole runs, killed runs and runs on changing numbers of workers leave, and what it finds wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service import storage
from service.config import load_run
from service.data import planner, shards
from service.data.prepare import prepare_run
from service.domain import RunState
from service.errors import NotFoundError
from service.logs import LogWriter
from service.render import load_renderer
from service.runs import Run
from service.training.ledger import LedgerCheck, StepDifference, check_ledger, compare
from tests.integration.tiny import save_tokenizer

ROWS = 26
RUN_FILE = """
model: base
data: {{train: {rows}}}
optim: {{batch: {{rows: 4}}, epochs: 2, max_steps: 12}}
scale: {{workers: 2}}
seed: 3
"""


@dataclass(frozen=True)
class Prepared:
    """A home with a prepared dataset, and the run file's path."""

    home: str
    cache: Path
    digest: str
    run_file: Path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    directory = tmp_path_factory.mktemp("ledger")
    save_tokenizer(directory / "tokenizer")
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q", "completion": "a" * n}) + "\n" for n in range(1, ROWS + 1)))
    home = str(directory / "home")
    (directory / "run.yaml").write_text(RUN_FILE.format(rows=file))
    config = load_run(str(directory / "run.yaml")).config
    card = prepare_run(config, load_renderer(directory / "tokenizer"), home=home).train
    return Prepared(home, directory / "cache", card.digest, directory / "run.yaml")


class Job:
    """A run whose workers only keep the ledger: as the training loop does, without its training."""

    def __init__(self, prepared: Prepared, overrides: Sequence[str] = ()) -> None:
        self.prepared = prepared
        resolved = load_run(str(prepared.run_file), overrides)
        self.run = Run.create(prepared.home, "tickets", resolved.text, resolved.as_json())
        self.run.set_state(RunState.RUNNING, train_digest=prepared.digest, workers=2)
        self.rows = shards.load(prepared.digest, home=prepared.home, cache=prepared.cache)
        optim = resolved.config.optim
        self.plan = planner.make_plan(
            self.rows.lengths, optim.batch, capacity=1024, epochs=optim.epochs, seed=3, max_steps=optim.max_steps
        )

    def attempt(self, number: int, workers: int, first: int, logged: Sequence[int]) -> None:
        """Steps from `first` on; `logged[rank]` is the last step that a worker has flushed when all of them are killed."""
        for rank in range(workers):
            with LogWriter(self.run.path("ledger"), f"a{number}-r{rank}", math.inf) as log:
                for step in range(first, logged[rank] + 1):
                    log.append({"step": step, "ids": self._share(step, rank, workers)})

    def _share(self, step: int, rank: int, workers: int) -> list[int]:
        batches = planner.micro_batches(
            self.plan.rows(step - 1), self.rows.lengths, micro=1, capacity=None, world_size=workers
        )
        mine = planner.share_of_rank(batches, self.rows.lengths, rank, workers)
        return [int(self.rows.row_numbers[row]) for i in mine if i is not None for pack in batches[i] for row in pack]

    def checkpoint(self, step: int) -> None:
        storage.write_bytes(self.run.path("checkpoints", f"{step:08d}", "checkpoint.json"), b"{}")

    def check(self) -> LedgerCheck:
        return check_ledger(self.run, self.prepared.cache)


def test_a_whole_run_has_drawn_each_planned_row_exactly_once(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 2, 1, [12, 12])
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check() == LedgerCheck(
        steps=12, draws=46, unsettled=[], differences=[]
    )  # 26 rows in 7 steps, then 5 of 4
    assert str(job.check()) == "ledger: 12 steps, 46 draws, each exactly once"


def test_steps_repeated_by_fewer_workers_are_those_of_the_last_attempt_alone(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 3, 1, [9, 7, 8])
    job.checkpoint(6)
    job.attempt(2, 1, 7, [12])
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check().ok and job.check().steps == 12


def test_steps_repeated_by_more_workers_too(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 1, 1, [9])
    job.checkpoint(4)
    job.attempt(2, 3, 5, [12, 12, 12])
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check().ok and job.check().steps == 12


def test_a_step_that_one_of_the_killed_workers_logged_is_open_until_it_is_repeated(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 2, 1, [8, 6])
    job.checkpoint(6)
    job.run.set_state(RunState.FAILED, "worker 1 was killed")
    assert job.check().unsettled == [7, 8] and job.check().ok and job.check().steps == 6
    assert str(job.check()).endswith("each exactly once; not whole and not in a checkpoint yet: [7, 8]")
    job.run.set_state(RunState.RUNNING)
    job.attempt(2, 2, 7, [12, 12])
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check().steps == 12 and job.check().unsettled == []


def test_an_attempt_killed_while_repeating_hides_a_step_only_until_it_is_repeated_again(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 2, 1, [9, 9])
    job.checkpoint(6)
    job.attempt(2, 2, 7, [7, 6])
    assert job.check().unsettled == [7] and job.check().ok
    job.attempt(3, 1, 7, [12])
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check().steps == 12 and job.check().unsettled == []


def test_draws_that_a_checkpoint_holds_and_the_ledger_lacks_are_named(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 2, 1, [8, 6])
    job.checkpoint(8)
    check = job.check()
    assert [difference.step for difference in check.differences] == [7, 8] and not check.ok
    assert check.differences[0].missing == sorted(job._share(7, 1, 2))
    assert str(check).startswith("ledger: 2 steps differ from the plan, 6 are as planned\nstep 7: missing rows [")


def test_a_run_that_succeeded_early_without_stopping_early_lacks_steps(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 2, 1, [10, 10])
    job.run.set_state(RunState.SUCCEEDED)
    assert [difference.step for difference in job.check().differences] == [11, 12]
    early = Job(prepared, ["stop.patience=2", "data.eval=rows.jsonl", "evaluate.every.steps=1"])
    early.attempt(1, 2, 1, [10, 10])
    early.run.set_state(RunState.SUCCEEDED)
    assert early.check().ok and early.check().steps == 10


def test_rows_of_another_step_are_extra_and_a_repeated_row_is_drawn_twice(prepared: Prepared) -> None:
    job = Job(prepared)
    job.attempt(1, 1, 1, [2])
    with LogWriter(job.run.path("ledger"), "a1-r1") as log:
        log.append({"step": 2, "ids": [job._share(2, 0, 1)[0], job._share(1, 0, 1)[0]]})
    (difference,) = job.check().differences
    assert difference == StepDifference(2, [], [job._share(1, 0, 1)[0]], [job._share(2, 0, 1)[0]])


@pytest.mark.parametrize("batch", ["{rows: 5}", "{tokens: 600}"])
def test_the_plan_does_not_depend_on_how_a_run_is_spread(prepared: Prepared, batch: str) -> None:
    changed = [f"optim.batch={batch}", "scale.workers={min: 1, max: 3}", "scale.strategy=zero2", "memory.micro=2"]
    job = Job(prepared, [f"optim.batch={batch}"])
    job.attempt(1, 3, 1, [job.plan.num_steps] * 3)
    resolved = load_run(str(prepared.run_file), changed).as_json()
    storage.write_bytes(job.run.path("resolved.json"), json.dumps(resolved).encode())
    job.run.set_state(RunState.SUCCEEDED)
    assert job.check().ok and job.check().steps == job.plan.num_steps


def test_whatever_is_killed_when_no_draw_is_lost_or_repeated(prepared: Prepared) -> None:
    for seed in range(6):
        draw, job, saved = random.Random(seed), Job(prepared), 0
        for attempt in range(1, 100):
            workers = draw.randint(1, 3)
            logged = [draw.randint(saved, 12) for _ in range(workers)]
            job.attempt(attempt, workers, saved + 1, logged)
            if min(logged) > saved and draw.random() < 0.5:  # visible only after all workers have flushed
                saved = draw.randint(saved + 1, min(logged))
                job.checkpoint(saved)
            assert job.check().ok, (seed, attempt)
            if min(logged) == 12:
                break
        assert min(logged) == 12
        job.run.set_state(RunState.SUCCEEDED)
        assert job.check().ok and (job.check().steps, job.check().unsettled) == (12, []), seed


def _compared(planned: dict[int, list[int]], drawn: dict[int, list[int]], settled: int = 0) -> LedgerCheck:
    rows: list[dict[str, Any]] = [{"step": step, "ids": ids} for step, ids in drawn.items()]
    return compare(planned.__getitem__, len(planned), rows, settled)


def test_examples_of_one_row_count_each() -> None:
    planned = {1: [3, 3, 5]}
    assert _compared(planned, {1: [5, 3, 3]}, 1) == LedgerCheck(1, 3, [], [])
    assert _compared(planned, {1: [5, 3]}, 1).differences == [StepDifference(1, [3], [], [])]
    assert _compared(planned, {1: [5, 3, 3, 3]}, 1).differences == [StepDifference(1, [], [], [3])]


def test_a_step_without_rows_below_the_last_is_missing_and_one_after_the_plan_is_extra() -> None:
    planned = {1: [1], 2: [2], 3: [3]}
    assert _compared(planned, {1: [1], 3: [3]}).differences == [StepDifference(2, [2], [], [])]
    assert _compared(planned, {1: [1], 2: [2], 3: [3], 4: [4]}).differences == [StepDifference(4, [], [4], [])]
    assert _compared(planned, {}) == LedgerCheck(0, 0, [], [])


def test_a_long_list_of_differences_is_cut() -> None:
    planned = {step: list(range(step * 100, step * 100 + 30)) for step in range(1, 31)}
    text = str(_compared(planned, {30: []}, 30))
    assert "step 20: " in text and "step 21: " not in text and text.endswith("and 10 more")
    assert "and 10 more]" in text.splitlines()[1]


def test_a_run_that_never_began_has_no_plan_to_check(prepared: Prepared) -> None:
    resolved = load_run(str(prepared.run_file))
    run = Run.create(prepared.home, "tickets", resolved.text, resolved.as_json())
    with pytest.raises(NotFoundError, match="has drawn nothing yet"):
        check_ledger(run, prepared.cache)
