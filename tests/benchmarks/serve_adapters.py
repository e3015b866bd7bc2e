"""What adapters coming and going costs: first tokens, the rhythm of running streams, and working sets beyond the columns.

    python -m tests.benchmarks.serve_adapters [--base DIR] [--rounds 5] [--threads 2]

One engine in one process, bfloat16, adapters of rank 16 on all linear layers.
- Time to first token of one request on an idle engine: adapter on disk (in the page cache), in host memory, resident.
- 16 streams on 4 adapters, stepping without pause: the 99th percentile of the time between tokens while a fifth adapter
  is loaded and unloaded all the time, over the same without.
- 16 clients that each ask an adapter of the working set in turn, through the replica's own bookkeeping: tokens per second
  with twice as many adapters as fit, over as many as fit.
Prints a table, and the ratios as one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from serve.adapter_sync import AdapterSync
from serve.desired import EndpointFiles
from serve.registration import register
from serve.routing import Registered, Target
from service.base_models import resolve_base_model
from service.inference.engine import Chunk, GenerationRequest, SamplingParams
from service.inference.torch_engine import TorchEngine
from service.registry import ManifestDraft, Registry
from service.settings import load_settings
from tests.benchmarks.serve_mixed import NoText, random_adapters

ROWS, PROMPT, RANK = 16, 60, 16
FITTING = 4
BASE = "0" * 64


def engine_of(base: Path, columns: int) -> TorchEngine:
    """A running engine."""
    engine = TorchEngine(
        base, tokenizer=NoText(), stop_ids=(), dtype=torch.bfloat16, num_slots=ROWS, max_context=512,
        max_lora_columns=columns, host_bytes=2**30,
    )  # fmt: skip
    engine.start()
    return engine


def asked(engine: TorchEngine, name: str, adapter: str | None, tokens: int, on_chunk: Callable[[Chunk], None]) -> None:
    """One greedy request."""
    prompt = tuple(1000 + (hash(name) + 17 * i) % 20_000 for i in range(PROMPT))
    engine.submit(
        GenerationRequest(name, prompt, SamplingParams(max_tokens=tokens, temperature=0.0), adapter), on_chunk
    )


def first_token_s(engine: TorchEngine, name: str, adapter: str, directory: Path | None) -> float:
    """From the wish to the first token, the load included."""
    done = threading.Event()
    started = time.perf_counter()
    if directory:
        engine.load_adapter(adapter, directory)
    asked(engine, name, adapter, 1, lambda chunk: done.set())
    assert done.wait(60)
    return time.perf_counter() - started


def first_tokens(engine: TorchEngine, adapters: dict[str, Path], rounds: int) -> dict[str, float]:
    """Medians in seconds."""
    seen: dict[str, list[float]] = {"disk": [], "host": [], "resident": []}
    directory = next(iter(adapters.values()))
    for number in range(rounds + 1):
        digest = f"fresh{number}"  # one that the host cache does not know
        seen["disk"].append(first_token_s(engine, f"d{number}", digest, directory))
        engine.unload_adapter(digest)
        seen["host"].append(first_token_s(engine, f"h{number}", digest, directory))
        seen["resident"].append(first_token_s(engine, f"r{number}", digest, None))
        engine.unload_adapter(digest)
    return {name: statistics.median(values[1:]) for name, values in seen.items()}


def gaps_s(engine: TorchEngine, adapters: dict[str, Path], name: str, *, swapping: bool) -> list[float]:
    """The times between tokens of 16 streams of 96 tokens, with or without a fifth adapter that comes and goes."""
    mine, other = list(adapters)[:4], list(adapters)[4]
    for digest in mine:
        engine.load_adapter(digest, adapters[digest])
    arrivals: dict[int, list[float]] = {row: [] for row in range(ROWS)}
    ended, stop, swaps = threading.Semaphore(0), threading.Event(), 0

    def listener(row: int) -> Callable[[Chunk], None]:
        def on_chunk(chunk: Chunk) -> None:
            arrivals[row].append(time.perf_counter())
            if chunk.finish_reason:
                ended.release()

        return on_chunk

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            engine.load_adapter(other, adapters[other])
            engine.unload_adapter(other)
            swaps += 1

    thread = threading.Thread(target=swap)
    for row in range(ROWS):
        asked(engine, f"{name}{row}", mine[row % 4], 96, listener(row))
    if swapping:
        thread.start()
    for _ in range(ROWS):
        ended.acquire()
    stop.set()
    if swapping:
        thread.join()
        assert swaps > 3
    # The first tokens come while other prompts are still being read.
    return [b - a for times in arrivals.values() for a, b in itertools.pairwise(times[16:])]


async def served(engine: TorchEngine, sync: AdapterSync, targets: list[Target], name: str, requests: int) -> float:
    """Tokens per second of 16 clients, who ask one adapter after the other, each beginning elsewhere."""
    loop = asyncio.get_running_loop()

    async def client(number: int) -> None:
        for turn in range(requests):
            target = targets[(number + 3 * turn) % len(targets)]
            answering = await sync.admit(target, 0)
            done = asyncio.Event()

            def on_chunk(chunk: Chunk, done: asyncio.Event = done, answering: Target = answering) -> None:
                if chunk.finish_reason:
                    sync.release(answering)
                    loop.call_soon_threadsafe(done.set)

            asked(engine, f"{name}{number}-{turn}", answering.digest, 32, on_chunk)
            await done.wait()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(ROWS)))
    return ROWS * requests * 32 / (time.perf_counter() - started)


def overcommit(base: Path, adapters: dict[str, Path], directory: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens per second with a working set that fits and with one twice as large, in turn."""
    engine = engine_of(base, FITTING * RANK)
    registry = Registry(str(directory))
    files = EndpointFiles(str(directory), "bench")
    wanted = {}
    for name, source in adapters.items():
        draft = ManifestDraft(base_model="b", base_digest=BASE, renderer_digest="1" * 64, rank=RANK, alpha=RANK)
        manifest = registry.publish(name, source, draft)
        wanted[name] = Registered(model=manifest.ref, digest=manifest.digest)
    register(files, wanted)
    sync = AdapterSync(engine, files, BASE, "r1", directory / "cache")
    sync.start()
    targets = [Target(entry.model, entry.digest) for entry in wanted.values()]
    fit, twice = [], []
    for number in range(rounds + 1):
        fit.append(asyncio.run(served(engine, sync, targets[:FITTING], f"f{number}-", 4)))
        twice.append(asyncio.run(served(engine, sync, targets[: 2 * FITTING], f"t{number}-", 4)))
    sync.close()
    engine.close()
    return fit[1:], twice[1:]


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a directory with a causal language model; the bundled SmolLM2 unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = Path(given.base or resolve_base_model("smollm2-135m-instruct", load_settings().cache, None).path)
    directory = Path(tempfile.mkdtemp())
    try:
        adapters = random_adapters(base, directory / "adapters", 2 * FITTING, (RANK,))
        engine = engine_of(base, 6 * RANK)
        firsts = first_tokens(engine, adapters, given.rounds)
        p99: dict[bool, list[float]] = {False: [], True: []}
        for number in range(given.rounds + 1):
            for swapping in (False, True):
                gaps = sorted(gaps_s(engine, adapters, f"g{number}{swapping}", swapping=swapping))
                p99[swapping].append(gaps[int(0.99 * len(gaps))])
        engine.close()
        fit, twice = overcommit(base, adapters, directory / "home", given.rounds)
    finally:
        shutil.rmtree(directory)
    for name, seconds in firsts.items():
        print(f"first token, adapter {name:>9}: {seconds * 1000:7.1f} ms")
    for name, steady in (("steady", False), ("during swaps", True)):
        print(f"99 % of tokens within, {name:>12}: {statistics.median(p99[steady][1:]) * 1000:7.1f} ms")
    print(
        f"working set as large as the columns: {statistics.median(fit):7.1f} tokens/s, twice: {statistics.median(twice):7.1f}"
    )
    ratios = {
        "swap_p99_over_steady": statistics.median(b / a for a, b in zip(p99[False][1:], p99[True][1:], strict=True)),
        "overcommit2_over_fit": statistics.median(b / a for a, b in zip(fit, twice, strict=True)),
        **{f"first_token_{name}_s": seconds for name, seconds in firsts.items()},
    }
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
