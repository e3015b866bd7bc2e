"""What a directory must look like to be published: PEFT's files, plain names, no links, no pickles.

`registry.py` asks before it claims a version, so that what is refused leaves nothing behind.
"""

from __future__ import annotations

import re
from pathlib import Path

from service.errors import ModelError

REGISTRY_FILES = ("claim.json", "manifest.json")  # written by the registry beside the published ones
_REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def publishable_files(source: Path) -> list[str]:
    """The names of the files to publish, sorted. Raises ModelError with all that is wrong."""
    if not source.is_dir():
        raise ModelError(f"{source} is no directory. Publish a directory with {' and '.join(_REQUIRED)}.")
    entries = sorted(source.iterdir())
    problems = [f"{name} is missing" for name in _REQUIRED if not (source / name).exists()]
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            problems.append(f"{entry.name} is no regular file (links and subdirectories are not published)")
        elif problem := name_problem(entry.name):
            problems.append(problem)
    if problems:
        raise ModelError(f"{source} cannot be published: {'; '.join(problems)}. Correct the directory, then repeat.")
    return [entry.name for entry in entries]


def name_problem(name: str) -> str | None:
    """Why a file of this name is not published, or None."""
    if not _FILE_NAME.fullmatch(name):
        return f"{name!r} is hidden or no plain name (letters, digits, '.', '_', '-')"
    if name in REGISTRY_FILES:
        return f"{name} is a name that the registry writes itself"
    if Path(name).suffix.lower() in _PICKLES:
        return f"{name} may hold a pickle, which runs code when loaded: save weights as safetensors"
    return None
