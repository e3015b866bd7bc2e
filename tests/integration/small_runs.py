"""Small runs for tests: a tiny model, a learnable data file, a run file, and the jobs that the loop takes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from service.config import load_run
from service.runs import Run
from service.settings import Settings
from service.training.loop import TrainJob
from service.training.plan import make_run_plan
from tests.integration import tiny

WORDS = ("red", "green", "blue", "ten", "two", "six", "up", "down")


def write_rows(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Rows of different lengths whose answer is the question's words in capitals."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
        turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words.upper()}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_run_file(directory: Path, base: Path | str, num_rows: int = 20, **blocks: Any) -> Path:
    """A float32 run of ten steps over twenty rows, changed by `blocks`."""
    directory.mkdir(parents=True, exist_ok=True)
    train = write_rows(directory / "train.jsonl", num_rows)
    held_out = write_rows(directory / "eval.jsonl", 6, seed=1)
    config: dict[str, Any] = {
        "model": str(base),
        "data": {"train": str(train), "eval": str(held_out)},
        "method": {"type": "lora", "r": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "batch": {"rows": 6}, "epochs": 2},
        "precision": "fp32",
        "seed": 7,
    }
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({**config, **blocks}))
    return file


def make_job(run_file: Path, settings: Settings, overrides: Sequence[str] = ()) -> tuple[Run, TrainJob]:
    """A created run and what its workers would be given."""
    resolved = load_run(str(run_file), overrides)
    plan = make_run_plan(resolved, settings)
    run = Run.create(settings.home, "small", resolved.text, resolved.as_json())
    job = TrainJob(
        home=settings.home,
        cache=str(settings.cache),
        run_id=run.id,
        attempt=1,
        config=resolved.config.model_dump(mode="json", by_alias=True),
        base_source=str(plan.base.path),
        base_digest=plan.base.digest,
        train_digest=plan.train.digest,
        eval_digest=plan.eval.digest if plan.eval else None,
        test_digest=plan.test.digest if plan.test else None,
    )
    return run, job


def small_base(directory: Path) -> Path:
    """The tiny Llama of `tiny.py`."""
    return tiny.save_base(directory)
