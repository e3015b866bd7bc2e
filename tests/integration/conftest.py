"""One real Ray cluster for all integration tests of a session, isolated from whatever else runs on the machine."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the cluster: private HOME and roots, no token left over from elsewhere, no usage report."""
    home = tmp_path_factory.mktemp("ray-home")
    wanted = {
        "HOME": str(home),
        "LORAY_HOME": str(home / "loray"),
        "LORAY_CACHE": str(home / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs call plain `python`
        "HF_HUB_OFFLINE": "1",
    }
    removed = ["RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"]
    removed += [name for name in os.environ if name.startswith("AWS_")]  # a test's store is in ~/.aws/config
    token = (
        home / ".ray" / "auth_token"
    )  # a file, because submitted jobs find it and do not get their parent's variables
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    before = {name: os.environ.get(name) for name in (*wanted, *removed)}
    os.environ.update(wanted)
    for name in removed:
        os.environ.pop(name, None)
    yield wanted
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def ray_context(ray_environment: dict[str, str]) -> Iterator[Any]:
    """A local cluster of 4 (claimed) CPUs, with its dashboard. Shut down at the end of the session."""
    import ray

    # Unix sockets live below it and their paths may have 107 characters at most: pytest's directories are too long.
    directory = tempfile.mkdtemp(prefix="lr-", dir="/tmp")
    context = ray.init(
        num_cpus=4, include_dashboard=True, logging_level="ERROR", log_to_driver=False, _temp_dir=directory
    )
    yield context
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(ray_context: Any) -> str:
    """The cluster's address, as RAY_ADDRESS takes it."""
    return str(ray_context.address_info["address"])


@pytest.fixture(scope="session")
def ray_dashboard(ray_context: Any) -> str:
    """The dashboard's URL, where jobs are submitted."""
    return f"http://{ray_context.address_info['webui_url']}"
