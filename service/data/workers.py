"""Blocks of a source on the cluster's CPUs: the only file that imports Ray Data.

Ray Data starves without a word where training holds all CPUs, so this runs before, and is over when it returns.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from service import launcher

BlockT = TypeVar("BlockT")

# Which say what was begun and ended, and that there is no progress bar. What warns of too few resources is heard.
_QUIET = {
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
}


def on_all_cpus(work: Callable[[int], BlockT], number: int, *, here: bool) -> Iterator[BlockT]:
    """`work(0)`, `work(1)` ... `work(number - 1)`, in this order, each on one CPU, no more of them at once than there are.

    `work` pickles. `here`: on this machine's CPUs alone, because no other has the files.
    """
    launcher.connect()
    import ray
    import ray.data

    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # our own errors, as `work` raises them
    context.execution_options.preserve_order = True
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if here else None
    with ray.data.DataContext.current(context):
        # Not `range`, whose reading is a task of its own before each of these where they have a node to go to.
        numbers = ray.data.from_items([{"id": n} for n in range(number)], override_num_blocks=number)
        blocks = numbers.map(_done, fn_args=(pickle.dumps(work),), num_cpus=1, label_selector=node)
        for row in blocks.iter_rows():
            yield pickle.loads(row["block"])  # noqa: S301 - our own workers made it


def _done(row: dict[str, Any], work: bytes) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this task has one CPU
    return {"block": pickle.dumps(_unpickled(work)(int(row["id"])))}


@lru_cache(maxsize=1)
def _unpickled(work: bytes) -> Callable[[int], Any]:
    """Once in a worker: a tokenizer takes a while."""
    function: Callable[[int], Any] = pickle.loads(work)  # noqa: S301 - our own driver made it
    gc.unfreeze()  # the function before this one, if there was one, goes
    gc.collect()
    gc.freeze()  # what is here now stays: looking through it for garbage took a twentieth of the time
    return function
