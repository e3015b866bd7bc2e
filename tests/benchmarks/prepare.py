"""Rows and tokens per second from a file to packed sequences, against `datasets.map` with the same tokenizer, 2 processes.

    python -m tests.benchmarks.prepare [--base DIR] [--rows 100000] [--rounds 2] [--memory-rows 100000 1000000]

Each arm runs in a process of its own, in turn, in every round; the best round of each counts, because everything else that
runs on the machine only slows an arm down. Both begin with a JSON-lines file of conversations of log-normal length, render
prompt and whole with the chat template, tokenise both, mark what is trained, and pack whole rows into sequences of SEQ_LEN.
`datasets` maps batches of rows in 2 processes and packs as TRL does (`pack_dataset`, best fit decreasing, also in 2). Ours
is what a run does: the source is hashed and cut, prepared by Ray Data on all CPUs, and planned for an epoch; starting Ray is
in it. Then the cost of each stage a row in one process, the fill of batches in tokens and in rows, and the peak memory of
processes that prepare short rows. Prints tables, and the ratios as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from service import launcher
from service.base_models import resolve_base_model
from service.config import BatchBlock, DataBlock, ReadingBlock
from service.data import checkup, formats, planner, prepare, shards
from service.data.files import open_source, read_piece
from service.data.records import Record
from service.data.rendered import examples_of_rows
from service.data.tokenised import CHUNK_ROWS, Recipe
from service.render import load_renderer
from service.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 2048
BATCH_TOKENS, BATCH_ROWS = 65_536, 128
MEAN_WORDS, SPREAD, SHORT_WORDS = 110, 0.8, 12  # of a row: the median and sigma of its log-normal length
PROCESSES = 2
STAGE_ROWS = 5_000
ARMS = ("ours", "datasets", "memory")


def main() -> None:
    """Run all arms, or with `--arm` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", help="a directory with a tokenizer and its template; the bundled SmolLM2 unless given"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--corpus", type=Path)
    given = parser.parse_args()
    base = Path(given.base or resolve_base_model("smollm2-135m-instruct", load_settings().cache, None).path)
    if given.arm:
        with tempfile.TemporaryDirectory() as home:
            measured = {"ours": ours, "datasets": with_datasets, "memory": memory}[given.arm]
            print(json.dumps(measured(base, given.corpus, Path(home))))
        return
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name) / "corpus.jsonl", given.rows, MEAN_WORDS)
        results: dict[str, list[dict[str, Any]]] = {"ours": [], "datasets": []}
        for _ in range(given.rounds):
            for arm, rounds in results.items():
                rounds.append(_in_a_process(arm, base, corpus))
        report_speed(results, corpus)
        stages(base, corpus, Path(name))
        fill = pack_efficiency(base, corpus, Path(name))
        peaks = [report_memory(base, rows, Path(name)) for rows in given.memory_rows]
    best = {arm: min(run["seconds"] for run in runs) for arm, runs in results.items()}
    ratios = {"prepare_over_datasets": round(best["datasets"] / best["ours"], 3), "pack_efficiency": round(fill, 4)}
    print(json.dumps(ratios | ({"prepare_peak_growth": round(peaks[-1] / peaks[0], 3)} if len(peaks) > 1 else {})))


def write_corpus(path: Path, num_rows: int, median_words: int, seed: int = 0) -> Path:
    """Conversations of one question and one answer in the words of this project's own README."""
    words = np.asarray(re.findall(r"\S+", (ROOT / "README.md").read_text(encoding="utf-8")))
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            length = int(np.clip(draw.lognormal(math.log(median_words), SPREAD), 4, SEQ_LEN // 4))
            text = words[draw.integers(0, len(words), length)]
            cut = max(1, length // 3)
            turns = [("user", text[:cut]), ("assistant", text[cut:])]
            messages = [{"role": role, "content": " ".join(part)} for role, part in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _in_a_process(arm: str, base: Path, corpus: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.prepare",
        "--arm",
        arm,
        "--base",
        str(base),
        "--corpus",
        str(corpus),
    ]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def recipe() -> Recipe:
    """What the rows become in every arm of ours."""
    return Recipe(ReadingBlock(), train_on="responses", seq_len=SEQ_LEN, over_long="error")


def ours(base: Path, corpus: Path, home: Path) -> dict[str, Any]:
    """As a run does it, on Ray's CPUs."""
    renderer = load_renderer(base)
    began = time.perf_counter()
    launcher.connect()
    connected = time.perf_counter()
    source = open_source(str(corpus))
    card = prepare.prepare(source, recipe(), renderer, home=str(home), spread_bytes=0)
    prepared = time.perf_counter()
    _plan(shards.load(card.digest, home=str(home), cache=home), BatchBlock(tokens=BATCH_TOKENS)).rows(0)
    planned = time.perf_counter()
    parts = {"start Ray": connected - began, "prepare": prepared - connected, "pack": planned - prepared}
    return {"seconds": planned - began, "parts": parts, "rows": card.rows, "tokens": card.tokens}


def with_datasets(base: Path, corpus: Path, home: Path) -> dict[str, Any]:
    """The usual way, batched for speed: `datasets.map`, then TRL's packing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(base)

    def tokenised(rows: dict[str, Any]) -> dict[str, Any]:
        chats = rows["messages"]
        prompts = tokenizer.apply_chat_template(
            [chat[:-1] for chat in chats], tokenize=False, add_generation_prompt=True
        )
        wholes = tokenizer.apply_chat_template(chats, tokenize=False)
        before = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
        return {
            "input_ids": ids,
            "completion_mask": [[0] * n + [1] * (len(i) - n) for i, n in zip(ids, before, strict=True)],
        }

    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(home))
    read = time.perf_counter()
    mapped = rows.map(tokenised, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
    done = time.perf_counter()
    pack_dataset(mapped, SEQ_LEN, "bfd", {"num_proc": PROCESSES})
    packed = time.perf_counter()
    tokens = sum(map(len, mapped.with_format("numpy")["input_ids"]))
    parts = {"read": read - began, "map": done - read, "pack": packed - done}
    return {"seconds": packed - began, "parts": parts, "rows": len(rows), "tokens": tokens}


def report_speed(results: dict[str, list[dict[str, Any]]], corpus: Path) -> None:
    """The best round of each arm."""
    print(f"{corpus.stat().st_size / 2**20:,.0f} MiB of conversations, {os.cpu_count()} CPUs")
    print(f"{'arm':10}{'rows/s':>10}{'tokens/s':>12}{'seconds':>10}  of these")
    for arm, runs in results.items():
        best = min(runs, key=lambda run: float(run["seconds"]))
        seconds, parts = best["seconds"], ", ".join(f"{name} {s:.1f}" for name, s in best["parts"].items())
        rates = f"{best['rows'] / seconds:10,.0f}{best['tokens'] / seconds:12,.0f}{seconds:10.1f}"
        print(f"{arm:10}{rates}  {parts}")


def stages(base: Path, corpus: Path, directory: Path) -> None:
    """What a row costs in each stage, by the processor's clock, all in this process."""
    head = directory / "head.jsonl"
    with corpus.open() as lines, head.open("w") as out:
        out.writelines(line for line, _ in zip(lines, range(STAGE_ROWS), strict=False))
    renderer, reading = load_renderer(base), ReadingBlock()
    examples_of_rows([], renderer)
    costs: dict[str, float] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = do()
        costs[name] = (time.process_time() - began) / STAGE_ROWS
        return result

    source = timed("hash and cut", lambda: open_source(str(head)))
    records = timed("read", lambda: [r for piece in source.pieces for r in read_piece(piece) if isinstance(r, Record)])
    rows = timed("parse", lambda: [formats.parse(record, "messages", reading) for record in records])
    timed("check up", lambda: checkup.check(rows, renderer=None, data=DataBlock(train=str(head))))
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    examples = timed("render, tokenise", lambda: [e for chunk in chunks for e in examples_of_rows(chunk, renderer)])
    writer = shards.ShardWriter(str(directory), "stage")

    def written() -> None:
        for number, (example,) in enumerate(examples, 1):
            writer.add(example.ids, example.mask, number)
        writer.close()

    timed("write", written)
    print(f"\n{'stage':20}{'us a row':>10}   ({sum(len(e[0].ids) for e in examples) / len(examples):.0f} tokens a row)")
    for name, seconds in costs.items():
        print(f"{name:20}{1e6 * seconds:10.1f}")


def pack_efficiency(base: Path, corpus: Path, directory: Path) -> float:
    """Tokens of an epoch as a share of those that its sequences have room for; printed for batches in rows too."""
    card = prepare.prepare(
        open_source(str(corpus)), recipe(), load_renderer(base), home=str(directory), spread_bytes=2**60
    )
    rows = shards.load(card.digest, home=str(directory), cache=directory)
    print(f"\n{'batches in':12}{'fill of sequences':>20}{'seconds to plan':>18}")
    fills = {}
    for name, batch in {"tokens": BatchBlock(tokens=BATCH_TOKENS), "rows": BatchBlock(rows=BATCH_ROWS)}.items():
        began = time.perf_counter()
        plan = _plan(rows, batch)
        steps = [plan.rows(step) for step in range(plan.num_steps)]
        seconds = time.perf_counter() - began
        cut = [planner.micro_batches(step, rows.lengths, micro=1, capacity=SEQ_LEN, world_size=1) for step in steps]
        tokens = sum(int(rows.lengths[step].sum()) for step in steps)
        packs = sum(len(batches) for batches in cut)
        fills[name] = tokens / (plan.num_steps * BATCH_TOKENS if name == "tokens" else packs * SEQ_LEN)
        print(f"{name:12}{fills[name]:20.2%}{seconds:18.2f}")
    return fills["tokens"]


def _plan(rows: shards.TokenRows, batch: BatchBlock) -> planner.Plan:
    return planner.make_plan(rows.lengths, batch, capacity=SEQ_LEN, epochs=1, seed=0, max_steps=None)


def report_memory(base: Path, num_rows: int, directory: Path) -> float:
    """Peak bytes of a process that prepares so many short rows by itself."""
    corpus = write_corpus(directory / f"short-{num_rows}.jsonl", num_rows, SHORT_WORDS)
    found = _in_a_process("memory", base, corpus)
    size = corpus.stat().st_size / 2**20
    print(f"{num_rows:,} rows, {size:,.0f} MiB: peak {found['peak'] / 2**20:,.0f} MiB, of which {found['before'] / 2**20:,.0f} "
          f"with its libraries; {found['rows'] / found['seconds']:,.0f} rows/s in one process")  # fmt: skip
    corpus.unlink()
    return float(found["peak"])


def memory(base: Path, corpus: Path, home: Path) -> dict[str, Any]:
    """Everything in this process, as a worker does its part."""
    renderer = load_renderer(base)
    before, began = _peak(), time.perf_counter()
    card = prepare.prepare(open_source(str(corpus)), recipe(), renderer, home=str(home), spread_bytes=2**60)
    seconds = time.perf_counter() - began
    return {"peak": _peak(), "before": before, "seconds": seconds, "rows": card.rows}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
