"""What is tried on this very model and machine before the first step: the head's fast road, packing, memory.

Each answers with a line for the run's events. All workers make the same calls and come to the same conclusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from service.data.shards import TokenRows
from service.errors import ModelError, OutOfMemoryError
from service.training.batches import Batches
from service.training.objectives.sft import PROBE_TOKENS, SupervisedLoss, TokenArrays, collate
from service.training.strategy import Strategy, World

HEAD_TOLERANCE = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.25}  # nats, see SupervisedLoss.probe_head
HEAD_ROWS = 2
PACKED_ROWS = 3


def head_examples(rows: TokenRows, first: Sequence[int]) -> list[list[TokenArrays]]:
    """What the head is tried on: the beginnings of two rows, all of it trained. The model's own logits cover every position,
    and must not need more memory than training does."""
    cut = [(ids[:PROBE_TOKENS], mask[:PROBE_TOKENS]) for ids, mask in (rows[int(row)] for row in first[:HEAD_ROWS])]
    return [[(ids, np.ones_like(mask))] for ids, mask in cut]


def check_head(objective: SupervisedLoss, batches: Batches, rows: TokenRows, first: list[int], precision: str) -> str:
    """By which road the loss goes: the fast one, if it gives what the model's own forward gives."""
    batch = collate(head_examples(rows, first), batches.world.device)
    with _evaluating(objective), batches.compute():
        difference = objective.probe_head(batch, HEAD_TOLERANCE[precision])
    objective.own_forward = batches.world.any(objective.own_forward)
    road = "the model's own forward" if objective.own_forward else "supervised positions"
    return f"{road} (differs from the model's own forward by {difference:.2g} nats)"


def check_causal(objective: SupervisedLoss, batches: Batches, rows: TokenRows, first: list[int]) -> None:
    """A model that sees the token it is to predict would learn nothing. Raises ModelError."""
    with _evaluating(objective), batches.compute():
        reason = objective.probe_causality(rows[first[0]])
    if batches.world.any(reason is not None):
        raise ModelError(f"{reason or 'another worker found no causal model'}. Take a decoder as the base model.")


def check_packing(objective: SupervisedLoss, batches: Batches, rows: TokenRows, first: list[int], seq_len: int) -> str:
    """Whether rows may share a sequence: only if this model keeps them apart to the last bit. Sets `batches.capacity`."""
    with _evaluating(objective), batches.compute():
        reason = objective.probe_packing([rows[row] for row in first[:PACKED_ROWS]])
    if batches.world.any(reason is not None):
        return f"a row a sequence, padded: {reason or 'another worker found a leak'}"
    batches.capacity = seq_len
    return f"rows share sequences of up to {seq_len} tokens"


def check_memory(objective: SupervisedLoss, strategy: Strategy, batches: Batches, rows: TokenRows) -> None:
    """The largest micro-batch of the run, forward and backward, so that what does not fit is found before any step.

    Not where collectives must be equal: a worker that failed alone would leave the others waiting in one.
    """
    if strategy.equal_rounds:
        return
    with out_of_memory_as_ours(batches.micro, batches.world):
        strategy.begin(1)
        with batches.compute():
            loss = objective(batches.tensors(batches.largest(rows), rows))
        strategy.backward(loss, last=True)
        strategy.begin(1)


@contextmanager
def out_of_memory_as_ours(micro: int, world: World) -> Iterator[None]:
    """Turns PyTorch's ways of saying so into an OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator has no class of its own for this, and cuBLAS says it in a RuntimeError.
        said = any(words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
        if not said and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise OutOfMemoryError(
            f"a micro-batch of {micro} sequence(s) does not fit worker {world.rank}: "
            f"{what}. Lower memory.micro, or set memory.checkpoint_activations: true.",
            micro,
        ) from error


@contextmanager
def _evaluating(objective: torch.nn.Module) -> Iterator[None]:
    objective.eval()
    yield
    objective.train()
