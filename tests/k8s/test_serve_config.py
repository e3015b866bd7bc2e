"""The serve config that RayServices carry: Ray Serve takes it, and it builds our application."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.api_keys import new_key
from service.config import ServeConfig, validated
from tests.integration.tiny import save_base
from tests.k8s.conftest import K8S, Build
from tests.k8s.objects import of_kind

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # of Ray Serve's import
DIRECTORIES = {"base": K8S / "base", "local-cpu": K8S / "overlays" / "local-cpu", "gpu": K8S / "overlays" / "gpu"}


def _application(name: str, build: Build) -> Any:
    """The one application of a RayService's config, as Ray Serve reads it."""
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(build(DIRECTORIES[name]), "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert config.http_options is not None
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)  # noqa: S104 - policies close it
    (application,) = config.applications
    return application


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_arguments_are_a_serve_file_and_the_deployments_ours(name: str, build: Build) -> None:
    application = _application(name, build)
    validated(ServeConfig, application.args, name)
    assert {deployment.name for deployment in application.deployments} <= {"Engine", "Gateway"}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_builds_our_application(name: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base model and keys of this machine in place of the cluster's."""
    application = _application(name, build)
    module, function = application.import_path.split(":")
    keys = tmp_path / "keys.yaml"
    keys.write_text(new_key("ops", ("admin",))[1])
    base = save_base(tmp_path / "base")
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "cache"))
    built = getattr(importlib.import_module(module), function)(
        {**application.args, "model": str(base), "keys": str(keys)}
    )
    assert built._bound_deployment.name == "Gateway"
