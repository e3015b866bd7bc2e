"""How far the planned memory of a worker is from what a real run takes, over methods, strategies, lengths, checkpointing.

    python -m tests.benchmarks.plan_error [--methods full,lora,qlora] [--strategies ddp,zero2,zero3] [--lengths 128,512]
        [--checkpointing 0,1] [--checkpoint-beside] [--resumed] [--list]

Each case is a whole run of `train()` on a random Llama of 86 million parameters in bfloat16: load, two steps, a checkpoint,
save, gate; `ddp` in one process, ZeRO in two. Measured is the largest resident memory of a worker that no file backs, above
what the same process had after training a tiny model by the same road, and weights that are mapped from their file.
glibc gives freed memory back at once here (MALLOC_MMAP_THRESHOLD_), so that it does not hide what is needed; `loray train`
on CPUs keeps it for speed. How much of a checkpoint is still there when the next step needs most depends on storage; the
plan counts all of it, so `--checkpoint-beside` shows larger errors. `--resumed` measures runs that go on from the checkpoint
of their last step: load, resume and save, without a step. Prints the error of each case, and as its last line
the median |error|, the worst, and the worst below what was measured, as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from service.training.strategy import World

MIB = 2**20
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODEL = {"hidden": 640, "intermediate": 1792, "layers": 14, "vocabulary": 32768}
TINY = {"hidden": 64, "intermediate": 64, "layers": 2, "vocabulary": 128}
MICRO_TOKENS = 1024
TIME_LIMIT_S = 3600.0
SAMPLE_EVERY_S = 0.002
LOOK_AT_MAPS_EVERY_S = 0.2


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    strategy: str
    length: int
    checkpointing: bool  # of activations
    beside: bool = False  # a checkpoint of the state is uploaded during the second step
    resumed: bool = False  # from a checkpoint of its last step

    @property
    def workers(self) -> int:
        """`ddp` holds the same on every worker; ZeRO is for several."""
        return 1 if self.strategy == "ddp" else 2

    def config(self, base: Path, data: Path) -> dict[str, Any]:
        """Two steps of two micro-batches a worker."""
        micro = MICRO_TOKENS // self.length
        return {
            "model": str(base),
            "data": {"train": str(data), "seq_len": self.length, "pack": "never"},
            "method": self.method,
            "optim": {"batch": {"rows": 2 * micro * self.workers}, "max_steps": 2, "lr": 1e-5},
            "scale": {"workers": self.workers, "strategy": self.strategy},
            "memory": {"micro": micro, "checkpoint_activations": self.checkpointing},
            "checkpoint": {"every": {"steps": 1 if self.beside else 2 if self.resumed else 0}},
        }


@dataclass(frozen=True)
class Row:
    """What came of a case, in bytes."""

    case: Case
    planned: dict[str, int]
    measured: int

    @property
    def error(self) -> float:
        """Planned / measured - 1."""
        return max(self.planned.values()) / self.measured - 1


def main() -> None:
    """Run the chosen cases, or with `--worker` be one worker of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="full,lora,qlora")
    parser.add_argument("--strategies", default="ddp,zero2,zero3")
    parser.add_argument("--lengths", default="128,512")
    parser.add_argument("--checkpointing", default="0,1")
    parser.add_argument("--checkpoint-beside", action="store_true", help="upload a checkpoint during the second step")
    parser.add_argument("--resumed", action="store_true", help="go on from a checkpoint of the last step")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        be_worker(given.worker)
        return
    cases = _cases(given)
    if given.list:
        print("\n".join(map(str, cases)))
        return
    print(f"{'method':7}{'strategy':9}{'length':>7}{'ckpt':>6}{'planned MiB':>13}{'measured':>10}{'error':>9}  peaks")
    rows = []
    for case in cases:
        rows.append(run(case))
        _print(rows[-1])
    _summarise(rows)


def _cases(given: argparse.Namespace) -> list[Case]:
    chosen = (given.methods.split(","), given.strategies.split(","), given.lengths.split(","))
    both = [bool(int(flag)) for flag in given.checkpointing.split(",")]
    product = itertools.product(*chosen, both)
    return [
        Case(method, strategy, int(n), each, given.checkpoint_beside, given.resumed)
        for method, strategy, n, each in product
    ]


def _print(row: Row) -> None:
    case = row.case
    peaks = ", ".join(f"{phase} {size / MIB:.0f}" for phase, size in row.planned.items())
    print(
        f"{case.method:7}{case.strategy:9}{case.length:7}{case.checkpointing:6}{max(row.planned.values()) / MIB:13.0f}"
        f"{row.measured / MIB:10.0f}{row.error:+9.1%}  {peaks}",
        flush=True,
    )


def _summarise(rows: Sequence[Row]) -> None:
    errors = [row.error for row in rows]
    figures = {
        "plan_median_error": statistics.median(map(abs, errors)),
        "plan_worst_error": max(map(abs, errors)),
        "plan_worst_under": max(0.0, -min(errors)),
    }
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


def run(case: Case) -> Row:
    """Plan a case, then measure it."""
    with tempfile.TemporaryDirectory(prefix="plan-error-") as name:
        directory = Path(name)
        jobs, planned = _prepare(case, directory)
        file = directory / "jobs.json"
        file.write_text(json.dumps(jobs))
        peak = _measure(case, file)
        if case.resumed:
            jobs["real"]["attempt"] = 2
            file.write_text(json.dumps(jobs))
            file.with_suffix(".meeting").unlink(missing_ok=True)  # where the first pair met
            planned = {phase: size for phase, size in planned.items() if phase != "train"}
            peak = _measure(case, file)
        return Row(case, planned, peak)


def _prepare(case: Case, directory: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The jobs of the tiny run and of the real one, and what is planned for the latter."""
    import torch
    import transformers

    from service.config import load_run
    from service.runs import Run
    from service.settings import Settings
    from service.training.loop import TrainJob
    from service.training.plan import detailed, make_run_plan

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = Settings(str(directory / "home"), directory / "cache")
    jobs: dict[str, Any] = {}
    planned: dict[str, int] = {}
    for kind, shape in (("tiny", TINY), ("real", MODEL)):
        config = case.config(_save_base(directory / kind, shape), _write_rows(directory / "rows.jsonl", case))
        run_file = directory / f"{kind}.yaml"
        run_file.write_text(yaml.safe_dump(config))
        resolved = load_run(str(run_file))
        plan = make_run_plan(resolved, settings)
        if kind == "real":
            memory = detailed(plan, resolved, settings, probe=False).memory
            assert memory is not None
            planned = memory.peaks
        run = Run.create(settings.home, kind, resolved.text, resolved.as_json())
        jobs[kind] = asdict(
            TrainJob(
                home=settings.home,
                cache=str(settings.cache),
                run_id=run.id,
                attempt=1,
                config=resolved.config.model_dump(mode="json", by_alias=True),
                base_source=str(plan.base.path),
                base_digest=plan.base.digest,
                train_digest=plan.train.digest,
                eval_digest=None,
            )
        )
    return jobs, planned


def _save_base(directory: Path, shape: dict[str, int]) -> Path:
    """A random Llama in bfloat16, with a tokenizer of one token a letter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.integration.tiny import save_tokenizer

    tokenizer = save_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64 * 2,
        num_key_value_heads=shape["hidden"] // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def _write_rows(path: Path, case: Case) -> Path:
    """Rows of exactly so many tokens, the longer part of them answers."""
    around = len("user\n\nassistant\n\n") + 4  # the template's letters, and its two tokens for each turn
    answer = case.length * 3 // 5
    turns = [
        {"role": "user", "content": "q" * (case.length - answer - around)},
        {"role": "assistant", "content": "a" * answer},
    ]
    rows = 4 * (MICRO_TOKENS // case.length) * case.workers
    path.write_text((json.dumps({"messages": turns}) + "\n") * rows)
    return path


def _measure(case: Case, jobs: Path) -> int:
    """The largest of the workers' peaks."""
    workers = [_start(case, rank, jobs) for rank in range(case.workers)]
    peaks = [0] * len(workers)
    threads = []
    for rank, worker in enumerate(workers):
        threads.append(threading.Thread(target=_watch, args=(worker, peaks, rank), daemon=True))
        threads[-1].start()
    for worker, thread in zip(workers, threads, strict=True):
        thread.join(TIME_LIMIT_S)
        assert worker.returncode == 0, f"a worker of {case} failed:\n{jobs.with_suffix('.log').read_text()[-4000:]}"
    return max(peaks)


def _start(case: Case, rank: int, jobs: Path) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.workers)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with jobs.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.plan_error", "--worker", str(jobs)],
            env={**os.environ, **ALLOCATOR, **ranks, **meeting},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def _watch(worker: subprocess.Popen[str], peaks: list[int], rank: int) -> None:
    """The worker prints its baseline when the real run begins. A process that has ended is a zombie until it is polled."""
    from service.training.probe import own_bytes

    assert worker.stdout is not None
    begins = next((line for line in worker.stdout if line.startswith("baseline")), "baseline 0 mapped 0").split()
    baseline, used = int(begins[1]), int(begins[3])
    mapped, looked_at = 0, 0.0
    while worker.poll() is None:
        if time.monotonic() - looked_at > LOOK_AT_MAPS_EVERY_S:
            mapped, looked_at = used_in_place(used, *of_weights(worker.pid)), time.monotonic()
        peaks[rank] = max(peaks[rank], own_bytes(str(worker.pid)) + mapped - baseline)
        time.sleep(SAMPLE_EVERY_S)


def used_in_place(used: int, resident: int, written: int) -> int:
    """What to add to a process's own memory for the `used` bytes of weights that are not copied from their file.

    Of the file's `resident` bytes the process holds the `written` ones itself: DeepSpeed's first broadcast writes into the
    weights of every worker but the first. Other resident pages, of weights that were quantised since, the system takes
    back when it needs them.
    """
    return min(resident - written, max(0, used - written))


def of_weights(pid: int) -> tuple[int, int]:
    """Bytes of weight files that are resident in their mapping, and those of them that were written to and so are anonymous
    (Linux, proc_pid_smaps(5))."""
    totals = {"Rss:": 0, "Anonymous:": 0}
    of_weights = False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0, 0  # it is ending
    for line in lines:
        first, *values = line.split()
        if not first.endswith(":"):
            of_weights = line.endswith(".safetensors")
        elif of_weights and first in totals:
            totals[first] += int(values[0]) * 1024
    return totals["Rss:"], totals["Anonymous:"]


def be_worker(file: Path) -> None:
    """Train the tiny model, tell what the process takes then, and train the real one."""
    import gc

    import torch
    import torch.distributed as dist

    from service.training.loop import TrainJob, train
    from service.training.probe import own_bytes
    from service.training.strategy import World

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        meeting = f"file://{file.with_suffix('.meeting')}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    jobs = json.loads(file.read_text())
    train(TrainJob(**jobs["tiny"]), World.current())
    used = _used_in_place(jobs["real"], World.current())
    gc.collect()
    print(f"baseline {own_bytes()} mapped {used}", flush=True)
    train(TrainJob(**jobs["real"]), World.current())


def _used_in_place(job: dict[str, Any], world: World) -> int:
    """Bytes of the weights that the real run uses where their file is mapped; under zero3, and once quantised, they are copied."""
    from service.config import RunConfig
    from service.training import methods
    from service.training.probe import mapped_bytes

    config = RunConfig.model_validate(job["config"])
    if config.scale.strategy == "zero3":
        return 0
    base, cache = Path(job["base_source"]), Path(job["cache"])
    return mapped_bytes(methods.load_model(base, config, world.device, cache, job["home"]))


if __name__ == "__main__":
    main()
