"""Runs that share one copy of their frozen base, against the same runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.config import load_run
from service.errors import ConfigError, TrainingError
from service.runs import Run
from service.settings import Settings
from service.training import methods
from service.training.batches import Batches
from service.training.loop import TrainJob, TrainResult, train
from service.training.methods.fused import beside, fused_linears
from service.training.objectives.sft import Batch, SupervisedLoss, collate
from service.training.strategy import World
from service.training.together import Together
from tests.integration import small_runs, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]
TRIALS = (
    ("optim.lr=1e-2", "method.r=4", "method.alpha=8"),
    ("optim.lr=2e-2", "method.r=3", "method.alpha=3"),
    ("optim.lr=5e-3", "method.r=8", "method.alpha=32", "method.rslora=true", "optim.batch.rows=4"),
    ("optim.lr=3e-3", "method.r=2", "method.alpha=4", "method.dropout=0.1"),  # draws of its own
)


def figures(run: Run) -> list[dict[str, float]]:
    names = ("train/loss", "train/grad_norm", "eval/loss")
    return [{name: row[name] for name in names if name in row} for row in run.metrics()]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "home"), tmp_path / "cache")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    base = small_runs.small_base(tmp_path / "base")
    return small_runs.write_run_file(tmp_path / "run", base, evaluate={"every": {"steps": 4}})


def jobs(run_file: Path, settings: Settings) -> list[tuple[Run, TrainJob]]:
    return [small_runs.make_job(run_file, settings, trial) for trial in TRIALS]


@pytest.mark.long
def test_the_losses_of_runs_that_share_a_base_equal_those_of_the_same_runs_alone(
    run_file: Path, settings: Settings
) -> None:
    together = Together()

    def train_here(job: TrainJob) -> TrainResult:
        torch.set_num_threads(1)
        return train(job, World(), None, together)

    shared = jobs(run_file, settings)
    with ThreadPoolExecutor(len(shared)) as pool:
        results = list(pool.map(train_here, [job for _, job in shared]))
    alone = jobs(run_file, settings)
    torch.set_num_threads(1)
    for (run, _), (own, job), result in zip(shared, alone, results, strict=True):
        assert train(job, World()).step == result.step >= 8
        for mine, wanted in zip(figures(run), figures(own), strict=True):
            assert mine == pytest.approx(wanted, rel=1e-5)  # float32: products of more rows round otherwise
        assert result.gate and result.gate.alive == result.gate.total
    assert figures(shared[-1][0]) == figures(alone[-1][0]), "the same operations on the same numbers, in its turns"
    assert len({str(figures(run)) for run, _ in shared}) == len(TRIALS)
    assert together.num_joint >= 8


def models(together: Together, run_file: Path, settings: Settings) -> list[torch.nn.Module]:
    """One of each trial."""
    device, found = torch.device("cpu"), []
    for trial in TRIALS:
        config = load_run(str(run_file), trial).config
        with together.turn():
            base = together.base(Path(config.model.id), config, device)
            found.append(methods.load_model(Path(config.model.id), config, device, settings.cache, settings.home, base))
    return found


def test_models_that_share_a_base_hold_its_tensors_once(run_file: Path, settings: Settings) -> None:
    found = models(Together(), run_file, settings)
    frozen = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in found]
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in found]
    assert frozen[0] and frozen[0] == frozen[1]
    assert all(trained) and not trained[0] & trained[1]


def micro_batch(seed: int, *lengths: int, packed: bool = False) -> Batch:
    rows = [(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in trained.some_rows(lengths, seed)]
    return collate([rows] if packed else [[row] for row in rows], torch.device("cpu"))


def gradients(model: torch.nn.Module) -> list[torch.Tensor | None]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def test_in_one_batch_each_run_has_its_own_loss_and_gradients_whatever_the_others_are(
    run_file: Path, settings: Settings
) -> None:
    """Sequences of other lengths, packed ones beside plain ones, and a run whose adapter is not finite."""
    found = models(Together(), run_file, settings)[:3]
    for model in found:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    objectives = [SupervisedLoss(model) for model in found]
    batches = [micro_batch(1, 9, 14), micro_batch(2, 20, 7, 16, packed=True), micro_batch(3, 11)]
    alone = []
    for objective, batch in zip(objectives, batches, strict=True):
        loss = objective(batch)
        loss.backward()
        alone.append((float(loss.detach()), gradients(objective.model)))
    with torch.no_grad():
        next(p for name, p in found[2].named_parameters() if "lora_A" in name).fill_(torch.nan)
    fused = [linears for model in found if (linears := fused_linears(model))]
    with beside([(linears, len(batch.ids_BT)) for linears, batch in zip(fused, batches, strict=True)]):
        losses = objectives[0].each(batches)
        torch.autograd.backward(losses)
    for loss, model, (wanted, wanted_gradients) in zip(losses[:2], found[:2], alone[:2], strict=True):
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-6)
        for mine, other in zip(gradients(model), wanted_gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not torch.isfinite(losses[2].detach())
    assert objectives[1](batches[1]).detach() == pytest.approx(alone[1][0]), "afterwards each is by itself again"


def test_a_run_that_draws_random_numbers_or_is_in_float16_has_its_turns(run_file: Path, settings: Settings) -> None:
    together, rank = Together(), np.arange(1)
    *plain, with_dropout = models(together, run_file, settings)
    batches = {precision: Batches(load_run(str(run_file), [f"precision={precision}"]).config, World(), rank, 1)
               for precision in ("fp32", "fp16")}  # fmt: skip
    assert all(together.seat(SupervisedLoss(model), batches["fp32"], 100) for model in plain)
    assert together.seat(SupervisedLoss(with_dropout), batches["fp32"], 100) is None
    assert together.seat(SupervisedLoss(plain[0]), batches["fp16"], 100) is None
    for key, value in (("hidden_dropout_prob", 0.1), ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4})):
        one: Any = plain.pop()
        setattr(one.get_base_model().config, key, value)
        assert together.seat(SupervisedLoss(one), batches["fp32"], 100) is None, key


def test_rounds_wait_for_who_steps_and_not_for_who_is_away_and_a_failure_is_everybodys(
    run_file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Together()
    batches = Batches(load_run(str(run_file)).config, World(), np.arange(1), 1)
    seats = [together.seat(SupervisedLoss(model), batches, 100) for model in models(together, run_file, settings)[:2]]
    first, second = (seat for seat in seats if seat)
    batch = micro_batch(1, 9, 14)
    with ThreadPoolExecutor(2) as pool, first.stepping(), second.stepping():
        waiting = pool.submit(first.compute, batch)
        assert pool.submit(second.compute, batch).result(60) == pytest.approx(waiting.result(60))
        assert together.num_joint == 1
        waiting = pool.submit(first.compute, batch)
        with second.away():
            assert waiting.result(60) > 0 and together.num_joint == 1

        each = SupervisedLoss.each

        def too_much(self: SupervisedLoss, batches: Sequence[Batch]) -> list[torch.Tensor]:
            if len(batches) > 1 or self is second.objective:
                raise MemoryError("no room for all of it")
            return each(self, batches)

        monkeypatch.setattr(SupervisedLoss, "each", too_much)
        alone, failed = [pool.submit(seat.compute, batch) for seat in (first, second)]
        assert alone.result(60) > 0 and "no room" in str(failed.exception(60))
        monkeypatch.setattr(SupervisedLoss, "each", each)

        def broken(losses: object) -> None:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(torch.autograd, "backward", broken)
        errors = [future.exception(60) for future in [pool.submit(seat.compute, batch) for seat in (first, second)]]
    assert {type(error) for error in errors} == {RuntimeError, TrainingError}
    assert all("the device is lost" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("override", "problem"), [("method.bias=all", "method.bias to none"), ("precision=bf16", "this run needs the base")]
)
def test_a_run_that_would_change_the_base_or_needs_another_is_refused(
    run_file: Path, settings: Settings, override: str, problem: str
) -> None:
    together = Together()
    plain, other = (load_run(str(run_file), overrides).config for overrides in ([], [override]))
    together.base(Path(plain.model.id), plain, torch.device("cpu"))
    with pytest.raises(ConfigError, match=problem):
        together.base(Path(other.model.id), other, torch.device("cpu"))
