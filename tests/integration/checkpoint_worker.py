"""A worker that saves and resumes on demand: `python -m tests.integration.checkpoint_worker`, a JSON object a line.

RANK and WORLD_SIZE say which one of how many it is. Each answer is a JSON object a line, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from service.config import CheckpointBlock, RunConfig
from service.errors import ConfigError, LorayError
from service.runs import Run
from service.training import checkpoint_index, checkpoint_saver
from service.training.checkpoint import CheckpointSaver, Identity, newest_checkpoint
from service.training.strategy import World

Tensors = dict[str, torch.Tensor]

IDENTITY = Identity(
    RunConfig.model_validate({"model": "tiny", "data": {"train": "rows.jsonl"}}).model_dump(mode="json", by_alias=True),
    "b" * 64,
    "d" * 64,
)
NUM_PARAMETERS = 8


def tensors_at(step: int, numel: int = 1000) -> dict[str, Tensors]:
    """What a run holds after `step` steps: the same wherever it is asked for."""
    draw = torch.Generator().manual_seed(step)
    return {
        f"layer.{number}.weight": {"weight": torch.randn(numel, generator=draw), "step": torch.tensor(float(step))}
        for number in range(NUM_PARAMETERS)
    }


def run_at(home: str) -> Run:
    """The one run of a home."""
    return Run(home, "20260101-000000-lora-0a1b")


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = COMMANDS[command.pop("do")](**command)
        except LorayError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def save(home: str, step: int, fail_on: int | None = None, shard_bytes: int = 2**29, **block: Any) -> dict[str, Any]:
    """Save what `tensors_at` gives; `fail_on` is a rank whose upload fails, of which the others must not wait long."""
    checkpoint_index.SHARD_BYTES = shard_bytes
    checkpoint_saver.LEAVING_S = 0.5
    world = World.current()
    events: list[str] = []

    def flush() -> None:
        if world.rank == fail_on:
            raise ConfigError("this worker fails")

    block = {"retry_s": 0.0, **block}
    saver = CheckpointSaver(
        run_at(home), world, IDENTITY, CheckpointBlock(**block), lambda kind, text: events.append(kind)
    )
    saver.save(step, iter(tensors_at(step).items()), {}, flush)
    if fail_on is None:
        saver.wait()
    saver.close()
    return {"events": events}


def resume(home: str, cache: str, **identity: Any) -> dict[str, Any]:
    """The newest checkpoint, compared with what it should hold; `identity` is what differs from the one it was made by."""
    wanted_by = replace(IDENTITY, **identity)
    found, passed_over = newest_checkpoint(run_at(home).uri, wanted_by, World.current(), Path(cache))
    if found is None:
        return {"step": None, "passed_over": passed_over}
    with found:
        wanted = tensors_at(found.step)
        same = set(found.names) == wanted.keys() and all(
            torch.equal(tensor, found.read(name)[key]) for name in wanted for key, tensor in wanted[name].items()
        )
        return {"step": found.step, "passed_over": passed_over, "same": same}


def killed_everywhere(home: str, cache: str) -> dict[str, Any]:
    """Save step 10 after step 5, killed at its first rename or deletion, at its second, and so on, until none is left.

    Each time on a copy of the same run: what is found afterwards, and what another attempt at the same step makes of it.
    """
    save(home, 5)
    outcomes: list[dict[str, Any]] = []
    for point in range(1, 1000):
        copy = f"{home}-{point}"
        shutil.copytree(home, copy)
        child = os.fork()
        if child == 0:
            _kill_me_at(point)
            save(copy, 10, shard_bytes=10_000, keep_last=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = {**resume(copy, cache), "half": _half_visible(copy)}
        save(copy, 10, keep_last=1)
        left = sorted(path.name for path in Path(run_at(copy).path("checkpoints", "00000010")).iterdir())
        outcomes.append({**found, "killed": os.WIFSIGNALED(status), "after": resume(copy, cache), "left": len(left)})
        if not outcomes[-1]["killed"]:
            assert status == 0
            return {"outcomes": outcomes}
    raise AssertionError("it never got to its end")


def _half_visible(home: str) -> list[str]:
    """Files that an index names and that are not there."""
    indices = Path(run_at(home).path("checkpoints")).glob("*/checkpoint.json")
    named = [index.parent / name for index in indices for name in json.loads(index.read_text())["files"]]
    return [str(file) for file in named if not file.exists()]


def _kill_me_at(point: int) -> None:
    seen = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def environment(values: dict[str, str]) -> dict[str, Any]:
    """Where the store is, from now on."""
    os.environ.update(values)
    return {}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "environment": environment,
    "save": save,
    "resume": resume,
    "killed_everywhere": killed_everywhere,
}


if __name__ == "__main__":
    main()
