"""The direction of imports: which package may know of which, and that the command line starts without the heavy ones."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("service", "jobs", "serve", "tune")
HTTP = ("fastapi", "starlette", "uvicorn", "ray.serve", "serve")


def _files(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def _imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _offenders(files: list[Path], *forbidden: str) -> list[str]:
    assert files
    return [f"{f.relative_to(ROOT)}: {m}" for f in files for m in _imports(f) if _within(m, *forbidden)]


def test_the_nouns_and_errors_stand_on_the_standard_library() -> None:
    assert list(_imports(ROOT / "service" / "errors.py")) == ["__future__", "__future__.annotations"]
    known = {*sys.stdlib_module_names, "pydantic"}
    outside = [m for m in _imports(ROOT / "service" / "domain.py") if m.split(".")[0] not in known]
    assert [m for m in outside if not _within(m, "service.errors")] == []


def test_storage_and_registry_know_nothing_of_what_stands_on_them() -> None:
    low = [
        ROOT / "service" / f"{name}.py"
        for name in ("settings", "storage", "s3", "logs", "registry", "runs", "status", "config", "sweep_config")
    ]
    above = [f"service.{name}" for name in ("training", "inference", "data", "evaluation", "cli", "launcher", "render")]
    assert _offenders(low, *above, "torch", "transformers", "ray", "peft") == []


def test_training_knows_nothing_of_http_and_serving() -> None:
    assert _offenders(_files("service/training", "service/data"), *HTTP) == []


def test_serving_knows_nothing_of_training() -> None:
    assert _offenders(_files("serve"), "service.training", "ray.train", "ray.tune", "tune") == []


def test_the_engine_knows_nothing_of_ray_http_or_the_registry() -> None:
    above = ("ray", *HTTP, "service.registry", "service.storage", "service.training", "service.cli")
    assert _offenders(_files("service/inference"), *above) == []


def test_only_entrypoints_reach_up_to_the_jobs_and_the_command_line() -> None:
    library = [file for file in _files("service") if (ROOT / "service" / "cli") not in file.parents]
    assert _offenders(library, "jobs", "service.cli") == []
    assert _offenders(_files("serve"), "jobs", "service.cli") == []


@pytest.mark.parametrize(
    ("library", "owner"),
    [
        ("ray.train", "service/training/trainer.py"),
        ("ray.tune", "tune/tuner.py"),
        ("ray.data", "service/data/workers.py"),
        ("ray.serve", "serve/"),
        ("vllm", "serve/vllm_engine.py"),
        ("kubernetes", "service/kuberay/api.py"),
    ],
    ids=["train", "tune", "data", "serve", "vllm", "kubernetes"],
)
def test_each_of_these_libraries_has_one_owner(library: str, owner: str) -> None:
    users = {str(file.relative_to(ROOT)) for file in _files(*OURS) if any(_within(m, library) for m in _imports(file))}
    assert users and all(user.startswith(owner) for user in users)


def test_training_knows_nothing_of_sweeps_and_sweeps_nothing_of_serving() -> None:
    library = [file for file in _files("service") if (ROOT / "service" / "cli") not in file.parents]
    assert _offenders(library, "tune") == []
    assert _offenders(_files("tune"), *HTTP, "jobs", "service.cli") == []


def test_of_a_sweep_only_its_tuner_knows_ray() -> None:
    assert _offenders([file for file in _files("tune") if file.name != "tuner.py"], "ray") == []


def test_the_training_loop_is_plain_pytorch() -> None:
    outside = {
        ROOT / "service" / "training" / name
        for name in ("trainer.py", "driver.py", "attempts.py", "placement.py", "exported.py")
    }
    assert _offenders([file for file in _files("service/training") if file not in outside], "ray") == []


def test_no_module_takes_the_name_of_a_library_at_the_root() -> None:
    roots = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert roots <= {*OURS, "tests"}


def _loaded_by(module: str) -> set[str]:
    """Every module that importing this one loads, in a process of its own."""
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_command_line_starts_without_torch_ray_and_transformers() -> None:
    heavy = {"torch", "ray", "transformers", "peft", "s3fs", "matplotlib", "fastapi", "numpy"}
    assert heavy & _loaded_by("service.cli.app") == set()


@pytest.mark.parametrize(
    "module", ["service.training.driver", "jobs.train", "jobs.demo", "jobs.doctor", "jobs.prepare", "tune.sweep"]
)
def test_ray_is_loaded_after_its_authentication_is_set(module: str) -> None:
    """Ray reads the mode when it is imported, and what starts a run sets it first: `launcher.use_token_authentication`."""
    assert "ray" not in _loaded_by(module)
