"""Runs that share one copy of their frozen base, against the same runs alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from service.errors import ConfigError
from service.runs import Run
from service.settings import Settings
from service.training.loop import TrainJob, TrainResult, train
from service.training.strategy import World
from service.training.together import Together
from tests.integration import small_runs

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


@pytest.mark.longer
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


def test_models_that_share_a_base_hold_its_tensors_once(run_file: Path, settings: Settings) -> None:
    from service.config import load_run
    from service.training import methods

    together, device = Together(), torch.device("cpu")
    found = []
    for trial in TRIALS:
        config = load_run(str(run_file), trial).config
        with together.turn():
            base = together.base(Path(config.model.id), config, device)
            found.append(methods.load_model(Path(config.model.id), config, device, settings.cache, settings.home, base))
    frozen = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in found]
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in found]
    assert frozen[0] and frozen[0] == frozen[1]
    assert all(trained) and not trained[0] & trained[1]


@pytest.mark.parametrize(
    ("override", "problem"), [("method.bias=all", "method.bias to none"), ("precision=bf16", "this run needs the base")]
)
def test_a_run_that_would_change_the_base_or_needs_another_is_refused(
    run_file: Path, settings: Settings, override: str, problem: str
) -> None:
    from service.config import load_run

    together = Together()
    plain, other = (load_run(str(run_file), overrides).config for overrides in ([], [override]))
    together.base(Path(plain.model.id), plain, torch.device("cpu"))
    with pytest.raises(ConfigError, match=problem):
        together.base(Path(other.model.id), other, torch.device("cpu"))
