"""Tokens per second and peak memory of LoRA training, against TRL's SFTTrainer and a plain PEFT loop, on the same packs.

    python -m tests.benchmarks.train_vs_trl [--base DIR] [--steps 6] [--rounds 2] [--threads 2]

Each arm runs in a process of its own, one after the other, in every round; medians over the steps of all rounds. Rows of
128 tokens, four to a sequence of 512, one sequence a micro-batch and two a step; 35 % and 100 % of the tokens supervised;
LoRA r=16 on all linears, compute in bfloat16. TRL has bfloat16 weights and no activation checkpointing. The plain loop
computes the head for supervised rows only. Prints a table, and the ratios as one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.base_models import resolve_base_model
from service.settings import load_settings

ROW, PACK, PACKS_A_STEP, RANK = 128, 512, 2, 16
ARMS = ("ours", "trl", "plain")
SHARES = (0.35, 1.0)


def main() -> None:
    """Run all arms, or with `--arm` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a directory with a causal language model; the bundled SmolLM2 unless given")
    parser.add_argument("--steps", type=int, default=6, help="of each arm in each round; the first one is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--share", type=float)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = Path(given.base or resolve_base_model("smollm2-135m-instruct", load_settings().cache, None).path)
    if given.arm:
        seconds = {"ours": ours, "trl": trl, "plain": plain}[given.arm](base, given.share, given.steps)
        print(json.dumps({"seconds": seconds[1:], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    results: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for share in SHARES:
            for arm in ARMS:
                results.setdefault((arm, share), []).append(_in_a_process(arm, share, base, given))
    _report(results, base, given.threads)


def _in_a_process(arm: str, share: float, base: Path, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.train_vs_trl", "--arm", arm, "--share", str(share)]
    command += ["--base", str(base), "--steps", str(given.steps), "--threads", str(given.threads)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(given.threads)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _report(results: dict[tuple[str, float], list[dict[str, Any]]], base: Path, threads: int) -> None:
    rate = matrix_rate()
    flops = _flops_of_a_token(base)
    speed, peak = {}, {}
    print(f"bf16 matrix rate of this machine, {threads} threads: {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'arm':8}{'supervised':>12}{'tokens/s':>10}{'of matrix rate':>16}{'peak GiB':>10}")
    for (arm, share), runs in results.items():
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        speed[arm, share] = PACK * PACKS_A_STEP / seconds
        peak[arm, share] = statistics.median(run["peak"] for run in runs)
        used = speed[arm, share] * flops(share) / rate
        print(f"{arm:8}{share:12.0%}{speed[arm, share]:10.0f}{used:16.0%}{peak[arm, share] / 2**30:10.2f}")
    ratios = {
        f"train_over_{peer}_{what}{'' if share == SHARES[0] else '_all_supervised'}": round(value, 3)
        for share in SHARES
        for peer, what, value in (
            ("trl", "tokens", speed["ours", share] / speed["trl", share]),
            ("plain", "tokens", speed["ours", share] / speed["plain", share]),
            ("trl", "memory", peak["ours", share] / peak["trl", share]),
        )
    }
    print(json.dumps(ratios))


def matrix_rate(size: int = 2048) -> float:
    """Floating-point operations per second of a bfloat16 matrix product: the best of ten."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _flops_of_a_token(base: Path) -> Any:
    """Of the frozen products alone, forward and to the inputs: 4 a weight; the head for supervised tokens only."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(base)
    head_dim = c.hidden_size // c.num_attention_heads
    attention = 2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * head_dim * c.num_key_value_heads
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    return lambda share: 4 * (layers + share * c.hidden_size * c.vocab_size)


def rows(base: Path, share: float, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """`count` rows of ROW random tokens, and which of them are supervised: the last ones of each row."""
    from transformers import AutoConfig

    ids = np.random.default_rng(0).integers(100, AutoConfig.from_pretrained(base).vocab_size - 100, (count, ROW))
    mask = np.zeros((count, ROW), dtype=np.uint8)
    mask[:, ROW - round(share * ROW) :] = 1
    return ids.astype(np.int32), mask


def ours(base: Path, share: float, steps: int) -> list[float]:
    """The training loop itself, from prepared rows in a home of its own; seconds of each step."""
    from service.config import load_run
    from service.data import shards
    from service.runs import Run
    from service.training.loop import TrainJob, train
    from service.training.strategy import World

    ids, mask = rows(base, share, steps * PACKS_A_STEP * PACK // ROW)
    with tempfile.TemporaryDirectory() as name:
        home, digest = Path(name) / "home", hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest()
        with shards.attempt(digest, home=str(home)) as place:
            writer = shards.ShardWriter(str(home / "datasets"), f"{place}/tokens")
            for number, (row, trained) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True), 1):
                writer.add(row, trained, number)
            index = f"{place}/index.arrow"
            counts = shards.write_index(str(home / "datasets" / index), [writer.close()], writer.shards)
            part = shards.Part("random", digest, len(ids), files=(("random", 0),))
            card = shards.DataCard(
                source="random", digest=digest, source_sha256="", renderer_digest="", rows=len(ids),
                rows_split_by_turn=0, rows_dropped=0, parts=(part,), index=index, **counts,
            )  # fmt: skip
            shards.publish(card, home=str(home))
        file = Path(name) / "run.yaml"
        file.write_text(
            f"model: {base}\ndata: {{train: random, seq_len: {PACK}}}\nmethod: {{type: lora, r: {RANK}, alpha: 32}}\n"
            f"optim: {{batch: {{rows: {PACKS_A_STEP * PACK // ROW}}}}}\nmemory: {{micro: 1}}\nprecision: bf16\n"
        )
        resolved = load_run(str(file))
        run = Run.create(str(home), "bench", resolved.text, resolved.as_json())
        digest_of_base = resolve_base_model(str(base), Path(name), None).digest
        job = TrainJob(
            home=str(home), cache=str(Path(name) / "cache"), run_id=run.id, attempt=1,
            config=resolved.config.model_dump(mode="json", by_alias=True), base_source=str(base),
            base_digest=digest_of_base, train_digest=digest, eval_digest=None,
        )  # fmt: skip
        train(job, World.current())
        return [PACK * PACKS_A_STEP / row["train/tokens_per_s"] for row in run.metrics()]


def trl(base: Path, share: float, steps: int) -> list[float]:
    """TRL's SFTTrainer on the same sequences and labels."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ids, mask = rows(base, share, steps * PACKS_A_STEP * PACK // ROW)
    ids, mask = ids.reshape(-1, PACK), mask.reshape(-1, PACK)
    labels = np.where(mask == 1, ids, -100)
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as name:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
            processing_class=AutoTokenizer.from_pretrained(base),
            args=SFTConfig(
                output_dir=name, max_length=PACK, per_device_train_batch_size=1, bf16=True, use_cpu=True,
                gradient_accumulation_steps=PACKS_A_STEP, max_steps=steps, gradient_checkpointing=False,
                save_strategy="no", report_to=[], logging_steps=10_000, dataset_kwargs={"skip_prepare_dataset": True},
                learning_rate=2e-4, dataloader_pin_memory=False, remove_unused_columns=False, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return clock


def plain(base: Path, share: float, steps: int) -> list[float]:
    """Twenty lines of PyTorch and PEFT, with the head on supervised positions."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ids, mask = rows(base, share, steps * PACKS_A_STEP * PACK // ROW)
    positions = torch.arange(ROW).repeat(PACK // ROW)[None]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    causal, seconds = model.get_base_model(), []
    sequences = list(zip(ids.reshape(-1, 1, PACK), mask.reshape(-1, PACK), strict=True))
    for step in range(steps):
        started = time.perf_counter()
        for sequence, trained in sequences[step * PACKS_A_STEP : (step + 1) * PACKS_A_STEP]:
            tokens, where = torch.from_numpy(sequence).long(), torch.from_numpy(trained[1:]).bool()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = causal.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
                logits = causal.lm_head(hidden[0, :-1][where])
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:][where])
            torch.autograd.backward(loss / PACKS_A_STEP)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
