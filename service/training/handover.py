"""The last act of a run: save the model, free the memory, and have a fresh process reproduce the trainer's own figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from service import storage
from service.config import LoraBlock, RunConfig
from service.data.shards import TokenRows
from service.errors import GateError
from service.runs import Run
from service.training import methods
from service.training.batches import COMPUTE, Batches
from service.training.gate import GateReport, Probe, run_gate
from service.training.methods.initial import fetch_initial_adapter
from service.training.objectives.sft import PROBE_TOKENS, SupervisedLoss, TokenArrays, collate, rounding_noise
from service.training.saved_weights import WeightDigests

PROBE_ROWS = 4


def make_probe(objective: SupervisedLoss, batches: Batches, rows: TokenRows) -> Probe:
    """The trainer's log-probabilities of a few rows, by plain products, and how much a batch alone changes them.

    Raises GateError where the products that it trained with are not the plain ones up to rounding.
    """
    examples = [_beginning(*rows[row]) for row in range(min(PROBE_ROWS, len(rows)))]
    objective.eval()
    with batches.compute():
        _compare_products(objective, batches, examples)
        together = objective.plain_log_probs(collate([[e] for e in examples], batches.world.device))
        alone = [objective.plain_log_probs(collate([[e]], batches.world.device)) for e in examples]
    return Probe(
        examples=[(ids.tolist(), mask.tolist()) for ids, mask in examples],
        log_probs=together.tolist(),
        noise=float((together - torch.cat(alone)).abs().max()),
    )


def _compare_products(objective: SupervisedLoss, batches: Batches, examples: list[TokenArrays]) -> None:
    """At the last tokens of each example, trained or not: a mean over few labels is mostly chance."""
    whole = [(ids, (np.arange(len(ids)) >= len(ids) - PROBE_TOKENS).astype(mask.dtype)) for ids, mask in examples]
    batch = collate([[example] for example in whole], batches.world.device)
    trained, plain = objective.log_probs(batch), objective.plain_log_probs(batch)
    difference, bound = float((trained - plain).abs().mean()), rounding_noise(COMPUTE[batches.precision], plain)
    if not difference <= bound:
        raise GateError(
            f"the products that this run was trained with differ from PEFT's and transformers' own by {difference:.4g} nats a "
            f"token, where rounding explains {bound:.4g}. That is an error in loray: please report it with the base model's name."
        )


def _beginning(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> TokenArrays:
    """As much of a row as has trained tokens to compare: whoever reloads the model computes the logits of every position."""
    end = int(np.flatnonzero(mask[1:])[0]) + 1 + PROBE_TOKENS
    return ids[:end], mask[:end]


def save(
    model: torch.nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    config: RunConfig,
    probe: Probe,
) -> Probe:
    """Write the model into `directory`; the probe, with the digests of a full model's weights as they went by."""
    if isinstance(config.method, LoraBlock):
        methods.save_model(model, weights, directory, config)
        return probe
    digests = WeightDigests(COMPUTE[config.precision])
    methods.save_model(model, digests.watch(weights), directory, config)
    return replace(probe, weights=digests.of)


def check_and_keep(
    directory: Path,
    base: Path,
    probe: Probe,
    config: RunConfig,
    run: Run,
    home: str,
    cache: Path,
    insist: Callable[[Callable[[], object]], object],
) -> GateReport:
    """The gate; what passes it is put into the run's `model/`, by `Patience.insist`. Raises GateError."""
    started_from = None
    if isinstance(config.method, LoraBlock) and config.method.init_from:
        started_from, _ = fetch_initial_adapter(config.method.init_from, cache, home)
    report = run_gate(directory, base, probe, config, started_from)
    for file in sorted(directory.iterdir()):
        insist(partial(storage.put_file, file, run.path("model", file.name)))
    return report
