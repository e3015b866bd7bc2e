"""The README's tables of sizes are what the planner computes, line by line. Minutes: models of 7 to 405 billion parameters."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import sizing
from tests.k8s.conftest import K8S

GPU_BYTES, TOKENS = 80 * sizing.GIB * sizing.FITS, 4096  # as the README says
README = (K8S / "README.md").read_text().splitlines()


@pytest.mark.parametrize("model", sizing.MODELS)
def test_what_a_gpu_serves_is_what_the_readme_says(model: str) -> None:
    for line in sizing.served(model, GPU_BYTES, TOKENS):
        assert line in README


def test_a_model_that_no_gpu_holds_has_its_line_too() -> None:
    line = sizing.line("405B", "QLoRA", GPU_BYTES, TOKENS)
    assert "QLoRA, ddp | no GPU holds its base of " in line
    assert line in README


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the README's figures are of rehearsals on a CPU")
@pytest.mark.parametrize("method", sizing.METHODS)
@pytest.mark.parametrize("model", ["7B"])  # the others take minutes: `python -m tests.benchmarks.sizing` prints them
def test_what_training_takes_is_what_the_readme_says(model: str, method: str) -> None:
    assert sizing.line(model, method, GPU_BYTES, TOKENS) in README
