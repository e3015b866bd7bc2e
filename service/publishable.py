"""What a directory must look like to be published: an adapter in PEFT's format or a model in transformers', no pickles.

`registry.py` asks before it claims a version, so that what is refused leaves nothing behind; `base_models.py` asks the
same of every model that it is given. Only names and JSON files are looked at here, never a weight.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from service.domain import ModelKind
from service.errors import ModelError

REGISTRY_FILES = ("claim.json", "manifest.json")  # written by the registry beside the published ones
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_NAMES: dict[ModelKind, str] = {"adapter": "an adapter", "full": "a full model"}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def publishable_files(source: Path, kind: ModelKind) -> list[str]:
    """The names of the files to publish, sorted. Raises ModelError with all that is wrong."""
    if not source.is_dir():
        raise ModelError(f"{source} is no directory. Publish a directory that holds {_wanted(kind)}.")
    entries = sorted(source.iterdir())
    problems = _adapter_problems(source) if kind == "adapter" else _full_problems(source)
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            problems.append(f"{entry.name} is no regular file (links and subdirectories are not published)")
        elif problem := name_problem(entry.name):
            problems.append(problem)
    if problems:
        raise ModelError(
            f"{source} cannot be published as {_NAMES[kind]}: {'; '.join(problems)}. It must hold "
            f"{_wanted(kind)}. Correct the directory, then repeat."
        )
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


def model_problems(directory: Path) -> list[str]:
    """What a directory lacks to be a model in transformers' format, with a fast tokenizer, whose weights are all there."""
    problems: list[str] = []
    config = _json_object(directory / "config.json", problems)
    if "auto_map" in config:
        problems.append("config.json asks for remote code (auto_map), which loray never runs")
    problems += _weight_problems(directory)
    if not (directory / "tokenizer.json").is_file():
        problems.append("tokenizer.json is missing (a fast tokenizer is needed)")
    return problems


def _adapter_problems(directory: Path) -> list[str]:
    """What a directory lacks to be an adapter in PEFT's format."""
    return [f"{name} is missing" for name in ADAPTER_FILES if not (directory / name).exists()]


def _full_problems(directory: Path) -> list[str]:
    problems = model_problems(directory)
    if (directory / "adapter_config.json").exists():
        problems.append("adapter_config.json makes transformers load an adapter on top: publish one or the other")
    return problems


def _weight_problems(directory: Path) -> list[str]:
    """No weights at all, or other shards than the index names."""
    found = {file.name for file in directory.glob("*.safetensors")}
    if not found:
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".pkl"})
        held = f"; {', '.join(pickles)} may hold pickles and are not read" if pickles else ""
        return [f"there is no *.safetensors file{held}"]
    if not (directory / INDEX_FILE).is_file():
        return []
    problems: list[str] = []
    weight_map = _json_object(directory / INDEX_FILE, problems).get("weight_map")
    if problems:
        return problems
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        return [f"{INDEX_FILE} holds no weight_map from tensor names to file names"]
    missing = sorted(set(weight_map.values()) - found)
    return [f"{INDEX_FILE} names shards that are missing: {', '.join(missing[:5])}"] if missing else []


def _json_object(file: Path, problems: list[str]) -> dict[str, object]:
    """The file's content; {} with a line in `problems` where it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file.name} holds a {type(content).__name__}, not an object")
        return {}
    return content


def _wanted(kind: ModelKind) -> str:
    if kind == "adapter":
        return " and ".join(ADAPTER_FILES)
    return "config.json, *.safetensors and tokenizer.json, as transformers' save_pretrained writes them"
