"""Runs that train in one process on one copy of their frozen base, a step of one after a step of another.

Each run has a model of its own, as it would alone, with adapters, optimizer, data and logs; only the base's tensors are the
same ones. One computes at a time, in turns: what a step draws and sums is what it would alone, so the losses are equal.
Loading, evaluation and the last look at the model are turns too; checkpoints, storage and the gate's process are not.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from service.config import LoraBlock, QloraBlock, RunConfig
from service.errors import ConfigError
from service.training.methods.loading import load_base


class Together:
    """What the runs of one process share."""

    def __init__(self) -> None:
        self._base: tuple[object, Any] | None = None
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # the first one has the turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, nobody else computes. Who has waited longest is next: a plain lock would go back to whoever let it go."""
        mine = threading.Event()
        with self._guard:
            self._waiting.append(mine)
            if self._waiting[0] is mine:
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                self._waiting.popleft()
                if self._waiting:
                    self._waiting[0].set()

    def base(self, path: Path, config: RunConfig, device: torch.device) -> Any:
        """A model of its own structure whose tensors are those of all runs here; call it within a turn.

        Raises ConfigError where a run would change the base, or needs another one than the first had.
        """
        method = config.method
        if not isinstance(method, LoraBlock) or method.bias != "none":
            raise ConfigError(
                "runs can share a frozen base only: set method.type to lora or qlora, and method.bias to none."
            )
        quantised = method.double_quant if isinstance(method, QloraBlock) else None
        key = (str(path), config.precision, method.base_bits, quantised, device)
        if self._base is None:
            self._base = key, load_base(path, config, device).requires_grad_(False)
        if self._base[0] != key:
            raise ConfigError(f"this run needs the base {key}, and those that it trains with have {self._base[0]}.")
        base = self._base[1]
        tensors = [*base.parameters(), *base.buffers()]
        return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
