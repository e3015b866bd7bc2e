"""The tensors of the next micro-batches, made while the last ones are computed, so that no accelerator waits for data.

A thread of its own goes through the steps a few micro-batches ahead, in order: it draws epochs, packs steps, reads rows and
pads them, in host memory. It decides nothing and draws no random number of PyTorch's, so a run has the same bits without it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from service.data.planner import Rows
from service.data.shards import TokenRows
from service.training.batches import Batches, MicroBatch
from service.training.objectives.sft import Batch
from service.training.patience import Patience

AHEAD = 4  # micro-batches that are ready, or being made


@dataclass(frozen=True)
class Share:
    """One step: its rows, all workers' micro-batches, and which of them are this worker's, in turns."""

    rows: Rows
    batches: list[MicroBatch]
    mine: list[int | None]


class Loader:
    """Steps one after the other, each as its share and then a Batch for each of its turns.

    share = loader.begin(step)
    for index in share.mine:
        batch = loader.take()  # None where this worker has no micro-batch, unless `fillers`: then the first one
    """

    def __init__(
        self,
        rows_of: Callable[[int], Rows],
        num_steps: int,
        batches: Batches,
        source: TokenRows,
        patience: Patience,
        *,
        fillers: bool,
    ) -> None:
        self.waited_s = 0.0  # for data, since the step began
        self._rows_of, self._num_steps = rows_of, num_steps
        self._batches, self._source, self._patience, self._fillers = batches, source, patience, fillers
        self._step, self._turns = -1, 0  # which was begun last, and how many turns of it are still to be taken
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: deque[Future[Any]] = deque()

    def begin(self, step: int) -> Share:
        """What is to be computed in a step. One that was abandoned, or is made again, is read again."""
        self.waited_s = 0.0
        if step != self._step + 1 or self._turns or not self._coming:
            self._start(step)
        share: Share = self._next()
        self._step, self._turns = step, len(share.mine)
        return share

    def take(self) -> Batch | None:
        """The micro-batch of the next turn, on the device."""
        self._turns -= 1
        batch: Batch | None = self._next()
        return batch and batch.to(self._batches.world.device)

    def close(self) -> None:
        """End the thread, after what it is doing now."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, step: int) -> None:
        for future in self._coming:
            future.cancel()
        self._items = self._from(step)
        self._coming = deque(self._ask() for _ in range(AHEAD))

    def _ask(self) -> Future[Any]:
        return self._thread.submit(next, self._items, None)

    def _next(self) -> Any:
        began = time.monotonic()
        item = self._coming.popleft().result()
        self._coming.append(self._ask())
        self.waited_s += time.monotonic() - began
        return item

    def _from(self, first: int) -> Iterator[Share | Batch | None]:
        for step in range(first, self._num_steps):
            rows = self._rows_of(step)
            batches = self._batches.of(rows, self._source)
            mine = self._batches.mine(batches, self._source)
            yield Share(rows, batches, mine)
            for index in mine:
                yield None if index is None and not self._fillers else self._on_host(batches[index or 0])

    def _on_host(self, sequences: MicroBatch) -> Batch:
        return self._patience.insist(lambda: self._batches.on_host(sequences, self._source))
