"""Which engine a config means on a machine. What the engines do is in tests/contract."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from serve.engines import backend_of
from service.config import EngineBlock, ServeConfig, validated
from service.errors import ConfigError
from service.serve_config import VllmBlock


def _machine(monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool) -> None:
    monkeypatch.setattr("serve.engines.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_auto_is_vllm_on_cuda_where_it_is_installed_and_the_embedded_engine_elsewhere(
    monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool
) -> None:
    _machine(monkeypatch, installed, cuda)
    assert backend_of(EngineBlock()) == ("vllm" if (installed, cuda) == (True, True) else "torch")
    assert backend_of(EngineBlock(backend="torch")) == "torch"


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"base_bits": 4}, "torch"),
        ({"lora_columns": 16}, "torch"),
        ({"lora_columns": 32}, "vllm"),
        ({"lora_columns": 16, "vllm": VllmBlock(max_rank=16)}, "vllm"),
        ({"lora_columns": 0}, "vllm"),
    ],
    ids=str,
)
def test_auto_leaves_to_the_embedded_engine_what_vllm_does_not_take(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], wanted: str
) -> None:
    _machine(monkeypatch, installed=True, cuda=True)
    assert backend_of(EngineBlock(**sizes)) == wanted


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here: make test-vllm runs it")
def test_vllm_that_is_not_installed_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'loray\[vllm\]'"):
        backend_of(EngineBlock(backend="vllm"))


def test_a_quantised_base_under_vllm_is_refused_with_the_config() -> None:
    values = {"model": "base", "engine": {"backend": "vllm", "base_bits": 4}}
    with pytest.raises(ConfigError, match=r"engine.base_bits: 4 is not served by vLLM here"):
        validated(ServeConfig, values, "serve.yaml")


@pytest.mark.parametrize(
    ("engine", "numbers"),
    [({"lora_columns": 16}, "16, .* 32"), ({"vllm": {"max_rank": 320}}, "256, .* 320")],
    ids=["columns", "rank"],
)
def test_fewer_columns_than_one_adapter_takes_under_vllm_are_refused_with_the_config(
    engine: dict[str, Any], numbers: str
) -> None:
    with pytest.raises(ConfigError, match=f"engine.lora_columns: {numbers}"):
        validated(ServeConfig, {"model": "base", "engine": {"backend": "vllm", **engine}}, "serve.yaml")
    validated(ServeConfig, {"model": "base", "engine": {"backend": "auto", **engine}}, "serve.yaml")
