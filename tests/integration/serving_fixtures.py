"""A real endpoint for tests: a tiny base model, its adapters in a registry, and a server on the session's Ray cluster.

Use it with `pytest_plugins = ("tests.integration.serving_fixtures",)`, and import nothing from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.base_models import resolve_base_model
from service.config import ServeConfig
from service.registry import ManifestDraft, Registry
from service.render import load_renderer
from service.settings import Settings
from tests.integration import tiny
from tests.integration.serving import Endpoint, clear, free_port, served


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(str(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the registry's adapters were saved by PEFT, `red1`, `red2`, ...: the endpoint may read URIs below it."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def registry(base: Path, settings: Settings, adapter_root: Path) -> Registry:
    """red@1, red@2, blue@1 fit; wide@1 takes 24 columns; foreign@1, template@1 and dora@1 must be refused."""
    registry, directory = Registry(settings.home), adapter_root
    resolved = resolve_base_model(str(base), settings.cache)
    good = {"base_digest": resolved.digest, "renderer_digest": load_renderer(base).digest}

    def publish(family: str, seed: int, rank: int = 8, overrides: dict[str, str] | None = None, **options: Any) -> None:
        source = tiny.save_adapter(base, directory / f"{family}{seed}", seed, rank, **options)
        draft = {"base_model": "base", **good, **(overrides or {}), "rank": rank, "alpha": 2.0 * rank}
        registry.publish(family, source, ManifestDraft.model_validate(draft))

    publish("red", 1)
    publish("red", 2)
    publish("blue", 3)
    publish("wide", 4, rank=24)
    publish("foreign", 5, overrides={"base_digest": "f" * 64})
    publish("template", 6, overrides={"renderer_digest": "e" * 64})
    publish("dora", 7, use_dora=True)
    return registry


@pytest.fixture(scope="module")
def config(base: Path, adapter_root: Path) -> ServeConfig:
    engine = {"slots": 4, "max_context": 256, "lora_columns": 24, "threads": 1}
    values = {"model": str(base), "endpoint": "test", "precision": "fp32", "port": free_port(), "engine": engine}
    return ServeConfig.model_validate({**values, "adapter_roots": [str(adapter_root)], "adapter_max_bytes": 2**20})


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, config: ServeConfig, registry: Registry, settings: Settings) -> Iterator[Endpoint]:
    with served(config, registry, settings) as endpoint:
        yield endpoint


@pytest.fixture
def loaded(endpoint: Endpoint) -> Iterator[Endpoint]:
    """red@1 and blue@1 resident; everything withdrawn and drained afterwards."""
    assert endpoint.put("red", "red@1").status_code == 200
    assert endpoint.put("blue", "blue@1").status_code == 200
    yield endpoint
    clear(endpoint)
