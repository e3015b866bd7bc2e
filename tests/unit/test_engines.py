"""Which engine a config means on a machine. What the engines do is in tests/contract."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from serve.engines import backend_of
from service.config import EngineBlock, ServeConfig, validated
from service.errors import ConfigError


def test_auto_is_vllm_on_cuda_where_it_is_installed_and_the_embedded_engine_elsewhere() -> None:
    wanted = "vllm" if torch.cuda.is_available() and find_spec("vllm") else "torch"
    assert backend_of(EngineBlock()) == wanted
    assert backend_of(EngineBlock(backend="torch")) == "torch"
    assert backend_of(EngineBlock(base_bits=4)) == "torch"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here: make test-vllm runs it")
def test_vllm_that_is_not_installed_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'loray\[vllm\]'"):
        backend_of(EngineBlock(backend="vllm"))


def test_a_quantised_base_under_vllm_is_refused_with_the_config() -> None:
    values = {"model": "base", "engine": {"backend": "vllm", "base_bits": 4}}
    with pytest.raises(ConfigError, match=r"engine.base_bits: 4 is not served by vLLM here"):
        validated(ServeConfig, values, "serve.yaml")
