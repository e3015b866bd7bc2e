"""What HTTP through Ray Serve costs: tokens per second of 16 streams, over the same engine in this process.

    python -m tests.benchmarks.serve_http [--base DIR] [--rounds 5] [--threads 2]

Both arms run in turn, round after round, on this machine's own Ray cluster: 16 chat requests with prompts of some 60
tokens, 128 new tokens each, greedy, bfloat16, no adapters. The client reads bytes from sockets and parses no JSON while the
clock runs. Beside the ratio: the longest time that a stream went without a token, the processor time that every process
took for a token, and that of all but the engine's own threads and the client. Prints a table, and the ratios as one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import re
import socket
import statistics
import tempfile
import time
import timeit
from pathlib import Path

import torch

from serve.routing import Arm, Routes, Split, resolve
from service.base_models import resolve_base_model
from service.inference.engine import Chunk, GenerationRequest, SamplingParams
from service.inference.torch_engine import TorchEngine
from service.render import load_renderer
from service.settings import Settings, load_settings

ROWS, NEW = 16, 128
TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Streams:
    """What the client saw of all streams."""

    tokens: int
    seconds: float
    longest_gap_s: float


def question(row: int) -> str:
    """Some 30 tokens; the template adds as many."""
    return (
        f"Number {row}: describe a walk along the river in the early morning, what you see, hear and smell, in detail."
    )


async def streamed(port: int, body: bytes, gaps: list[float]) -> int:
    """One answer: its number of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1", "host: 127.0.0.1", "content-type: application/json",
        f"content-length: {len(body)}", "connection: close", "", "",
    )  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    last, blocks = 0.0, []
    while block := await reader.read(65536):
        now = time.perf_counter()
        blocks.append(block)
        if block.count(b'"content": "') > block.count(b'"content": ""'):
            if last:
                gaps.append(now - last)
            last = now
    writer.close()
    found = re.search(rb'"completion_tokens": (\d+)', b"".join(blocks))
    assert found, b"".join(blocks)
    return int(found[1])


async def http_arm(port: int, name: str) -> Streams:
    """All streams at once."""
    bodies = [
        json.dumps(
            {
                "model": name, "messages": [{"role": "user", "content": question(row)}], "max_tokens": NEW,
                "temperature": 0, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
            }
        ).encode()
        for row in range(ROWS)
    ]  # fmt: skip
    gaps: list[float] = []
    began = time.perf_counter()
    tokens = sum(await asyncio.gather(*(streamed(port, body, gaps) for body in bodies)))
    assert tokens == ROWS * NEW
    return Streams(tokens, time.perf_counter() - began, max(gaps))


def engine_arm(engine: TorchEngine, prompts: list[tuple[int, ...]]) -> Streams:
    """The same requests in this process, on the engine's own thread."""
    import threading

    sampling = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    left, done, lock = [len(prompts)], threading.Event(), threading.Lock()
    seen: dict[int, float] = {}
    gaps: list[float] = []

    def listener(row: int):  # type: ignore[no-untyped-def]
        def on_chunk(chunk: Chunk) -> None:
            now = time.perf_counter()
            if row in seen:
                gaps.append(now - seen[row])
            seen[row] = now
            if chunk.finish_reason:
                with lock:
                    left[0] -= 1
                if not left[0]:
                    done.set()

        return on_chunk

    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{row}", prompt, sampling), listener(row))
    assert done.wait(600)
    return Streams(ROWS * NEW, time.perf_counter() - began, max(gaps))


def routing_us() -> float:
    """Microseconds from a public name and a key to a split's arm, of four."""
    arms = {f"arm{number}": Arm(model=f"tickets@{number}", digest=str(number), weight=25) for number in range(4)}
    routes = Routes("base", "0", splits={"tickets": Split(arms=arms, salt="salt", key=("user",))})
    times = timeit.repeat(lambda: resolve("tickets", routes, "user-1234"), number=2000, repeat=9)
    return 1e6 * statistics.median(times) / 2000


def processor_s(threads: int) -> dict[str, float]:
    """Processor seconds so far of every process below this one, by kind; the engine's own threads (the busiest) apart."""
    found: dict[str, float] = {}
    for pid in _descendants():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
            spent = sorted((_ticks(task / "stat") for task in Path(f"/proc/{pid}/task").iterdir()), reverse=True)
        except (FileNotFoundError, ProcessLookupError):
            continue
        kind = Path(words[0]).name if words else "?"
        if kind.startswith("ray::"):
            kind = kind.removeprefix("ray::").removeprefix("ServeReplica:loray-bench:")
        elif kind.startswith("python"):
            kind = next((Path(word).name for word in words[1:] if word.endswith(".py")), kind)
        if kind == "Engine":
            found["Engine (its threads)"] = sum(spent[:threads]) / TICKS
            spent = spent[threads:]
        found[kind] = found.get(kind, 0.0) + sum(spent) / TICKS
    return found


def _descendants() -> list[int]:
    parents = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                parents[int(directory.name)] = int((directory / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    mine, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in mine} - mine
        grown = bool(more)
        mine |= more
    return sorted(mine - {os.getpid()})


def _ticks(file: Path) -> int:
    fields = file.read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def main() -> None:
    """Run both arms in turn and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    from service import launcher

    launcher.prepare_environment()
    import ray

    from serve import app
    from service.config import ServeConfig

    settings = load_settings()
    launcher.connect()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    block = {"slots": ROWS, "max_context": 512, "threads": given.threads, "prefix_bytes": 0}
    config = ServeConfig.model_validate({"model": given.base, "endpoint": "bench", "port": port, "engine": block})
    with tempfile.TemporaryDirectory() as home:
        base = resolve_base_model(given.base, settings.cache, None)
        app.start(config, Settings(home, settings.cache))
        renderer = load_renderer(base.path)
        prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": question(row)}])) for row in range(ROWS)]
        engine = TorchEngine(
            base.path, tokenizer=renderer.tokenizer, stop_ids=renderer.stop_ids, dtype=torch.bfloat16, num_slots=ROWS,
            max_context=512,
        )  # fmt: skip
        engine.start()
        over: list[float] = []
        speeds: dict[str, list[Streams]] = {"engine": [], "http": []}
        spent: dict[str, list[float]] = {}
        for number in range(given.rounds + 1):  # the first warms up
            alone = engine_arm(engine, prompts)
            before = processor_s(given.threads)
            whole = asyncio.run(http_arm(port, given.base))
            after = processor_s(given.threads)
            if number:
                speeds["engine"].append(alone)
                speeds["http"].append(whole)
                over.append((whole.tokens / whole.seconds) / (alone.tokens / alone.seconds))
                for kind in after:
                    spent.setdefault(kind, []).append((after[kind] - before.get(kind, 0.0)) / whole.tokens)
        engine.close()
        app.stop("bench")
    ray.shutdown()
    print(f"{'arm':>8}  tokens/s (median of {given.rounds})  longest time without a token")
    for arm, seen in speeds.items():
        speed = statistics.median(one.tokens / one.seconds for one in seen)
        gap = statistics.median(one.longest_gap_s for one in seen)
        print(f"{arm:>8}  {speed:8.1f}  {1000 * gap:8.0f} ms")
    each = {kind: 1000 * statistics.median(values) for kind, values in spent.items()}
    for kind, ms in sorted(each.items(), key=lambda item: -item[1]):
        if ms >= 0.01:
            print(f"{kind:>24}  {ms:6.2f} ms of processor a token")
    system = sum(ms for kind, ms in each.items() if kind != "Engine (its threads)")
    routing = routing_us()
    print(f"a split's arm is found in {routing:.1f} microseconds")
    ratios = {"http_over_engine": round(statistics.median(over), 3), "system_ms_per_token": round(system, 2)}
    print(json.dumps({**ratios, "routing_us": round(routing, 1)}))


if __name__ == "__main__":
    main()
