"""The last act of a run: save the model, free the memory, and have a fresh process reproduce the trainer's own figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from service import storage
from service.config import LoraBlock, RunConfig
from service.data.prepare import TokenRows
from service.runs import Run
from service.training import methods
from service.training.batches import COMPUTE, Batches
from service.training.gate import GateReport, Probe, run_gate
from service.training.methods.initial import fetch_initial_adapter
from service.training.objectives.sft import SupervisedLoss, collate
from service.training.saved_weights import WeightDigests

PROBE_ROWS = 4


def make_probe(objective: SupervisedLoss, batches: Batches, rows: TokenRows) -> Probe:
    """The trainer's own log-probabilities of a few rows, and how much they change with what changes nothing but rounding:
    the batch, and the road by which the products are computed."""
    examples = [rows[row] for row in range(min(PROBE_ROWS, len(rows)))]
    device = batches.world.device
    objective.eval()
    with batches.compute():
        together = objective.log_probs(collate([[e] for e in examples], device))
        alone = torch.cat([objective.log_probs(collate([[e]], device)) for e in examples])
        plain = objective.plain_log_probs(collate([[e] for e in examples], device))
    return Probe(
        examples=[(ids.tolist(), mask.tolist()) for ids, mask in examples],
        log_probs=together.tolist(),
        noise=float(torch.stack([together - alone, together - plain]).abs().max().item()),
    )


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
    directory: Path, base: Path, probe: Probe, config: RunConfig, run: Run, home: str, cache: Path
) -> GateReport:
    """The gate; what passes it is put into the run's `model/`. Raises GateError."""
    started_from = None
    if isinstance(config.method, LoraBlock) and config.method.init_from:
        started_from, _ = fetch_initial_adapter(config.method.init_from, cache, home)
    report = run_gate(directory, base, probe, config, started_from)
    for file in sorted(directory.iterdir()):
        storage.put_file(file, run.path("model", file.name))
    return report
