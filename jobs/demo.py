"""The whole road on one machine: train, publish, serve, load the adapter over HTTP, compare. `make demo` runs it.

    python -m jobs.demo [--prompts N]

Everything goes through the doors that users have: a run file, the registry, HTTP, the official OpenAI client. The last
line printed is the comparison; whatever was started is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console

from service import launcher, storage
from service.config import ServeConfig, load_run
from service.data.formats import read_rows
from service.data.rows import Row
from service.domain import RunState
from service.errors import LorayError
from service.evaluation.answers import Comparison, compared, read_prompt, side_by_side, summary, with_prompt
from service.render import Message
from service.runs import Run
from service.settings import Settings, load_settings
from service.training.driver import train_run

RECIPES = Path(__file__).parent / "recipes"
CONCURRENT = 16  # the engine's slots: base and adapter share every batch
SHOWN = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0, or 1 with the reason."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description="Train, serve and compare `tickets`.")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to compare on (default: %(default)s)")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.monotonic()
    launcher.prepare_environment()  # before anything imports Ray, which reads the mode once
    try:
        settings = load_settings()
        resolved = load_run(str(RECIPES / "tickets.yaml"))
        run = train_run(resolved, settings, console)
        if run.status().state is not RunState.SUCCEEDED:
            return 130  # stopped by hand
        trained = time.monotonic()
        comparison = _serve_and_compare(resolved.config.model.id, run, settings, console, given.prompts)
    except LorayError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        return 1
    finally:
        _stop_ray()
    _add_to_report(run, comparison)
    console.print(side_by_side(comparison, SHOWN))
    took = f"trained in {trained - started:.0f} s, served and compared in {time.monotonic() - trained:.0f} s"
    console.print(f"Report with the loss curve: {run.path('report.md')}  ({took})", highlight=False, soft_wrap=True)
    console.print(summary(comparison), markup=False, highlight=False, soft_wrap=True)
    return 0


def _serve_and_compare(base: str, run: Run, settings: Settings, console: Console, prompts: int) -> Comparison:
    """Start the server with the base alone, load the adapter while it runs, ask both."""
    from serve import app as serve_app

    model = str(run.status().details["model"])
    port = _free_port()
    config = ServeConfig.model_validate({"endpoint": "demo", "model": base, "port": port})
    url = serve_app.start(config, settings)
    try:
        console.print(f"Serving {base} at {url}/v1; loading {model} while it runs ...", highlight=False)
        return _compare(url, base, model, prompts, console)
    finally:
        serve_app.stop(config.endpoint)


def _compare(url: str, base: str, model: str, prompts: int, console: Console) -> Comparison:
    adapter = f"{url}/v1/adapters/{model.split('@')[0]}"
    _call("PUT", f"{adapter}?wait=resident", {"model": model})
    rows = read_rows(str(RECIPES / "data" / "tickets.eval.jsonl"))[:prompts]
    before = read_prompt(str(RECIPES / "data" / "tickets.base-prompt.jsonl"))
    console.print(f"Asking both {len(rows)} held-out prompts, {CONCURRENT} at a time ...", highlight=False)
    base_answers, answers = asyncio.run(_ask_both(url, base, model, rows, before))
    _call("DELETE", adapter)
    return compared(model, rows, base_answers, answers)


async def _ask_both(
    url: str, base: str, model: str, rows: Sequence[Row], before: Sequence[Message]
) -> tuple[list[str], list[str]]:
    """Streamed answers of both. Base and adapter rows are in flight together, so they share the engine's batches."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600)
    slots = asyncio.Semaphore(CONCURRENT)

    async def ask(model: str, messages: Sequence[Message]) -> str:
        async with slots:
            stream = await client.chat.completions.create(
                model=model,
                messages=cast(list[ChatCompletionMessageParam], messages),
                temperature=0,
                max_tokens=64,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    # The schema and an example stand in the base's prompt only: the tuned model has learnt them.
    pairs = [(ask(base, with_prompt(row.prompt(), before)), ask(model, row.prompt())) for row in rows]
    answers = await asyncio.gather(*(question for pair in pairs for question in pair))
    await client.close()
    return answers[0::2], answers[1::2]


def _call(method: str, url: str, body: dict[str, str] | None = None) -> None:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - our own URL
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        answer.read()


def _add_to_report(run: Run, comparison: Comparison) -> None:
    rows = zip(comparison.rows, comparison.base_answers, comparison.tuned_answers, strict=True)
    lines = ["", "## Held-out prompts, over HTTP", "", f"`{summary(comparison)}`", ""]
    lines += [f"| message | reference | base | {comparison.model} |", "|---|---|---|---|"]
    for row, base, tuned in list(rows)[:SHOWN]:
        cells = [row.prompt()[-1]["content"], row.reference(), base, tuned]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|")[:240] for cell in cells) + " |")
    uri = run.path("report.md")
    storage.write_bytes(uri, storage.read_bytes(uri) + "\n".join([*lines, ""]).encode())


def _free_port() -> int:
    """8000, or a free one when somebody else has it."""
    for port in (8000, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise LorayError("no port is free on 127.0.0.1.")


def _stop_ray() -> None:
    """The cluster that the demo started, or its connection to another."""
    import ray

    ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the bundled base needs no hub
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
