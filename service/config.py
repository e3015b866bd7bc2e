"""From a YAML file to a frozen, complete config, or to one error that lists everything wrong with it.

`load_run` reads a run file and its `--set` overrides, `run_from_json` what a run was made with, `load_serve` a serve file.
Unknown keys are errors that name the nearest known key; types are strict (no `"16"` for 16, no `true` for 1). Every field
has one dotted name (`optim.lr`), the same in YAML, on the command line, in `resolved.json` and in a manifest. Nothing here
reads anything but the one file. The keys are in `config_blocks.py`; how YAML becomes values is in `config_values.py`, how
mistakes are told in `config_problems.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from service.config_blocks import (
    DEFAULT_LR,
    METHODS,
    AugmentBlock,
    BatchBlock,
    Block,
    CheckpointBlock,
    DataBlock,
    FilterBlock,
    Format,
    FullBlock,
    KubernetesBlock,
    LoraBlock,
    MemoryBlock,
    MethodBlock,
    MixBlock,
    OptimBlock,
    QloraBlock,
    ReadingBlock,
    RunBlock,
    RunConfig,
    ScaleBlock,
    SourceBlock,
    SplitBlock,
    StopBlock,
    WorkersBlock,
    expanded,
)
from service.config_problems import dotted_names, problem_lines, unknown_key
from service.config_values import leaves, mapping, nest, override, put, read_text, take_out, value_at
from service.errors import ConfigError
from service.serve_config import EngineBlock, ServeConfig

__all__ = [  # what is imported from here
    "CHANGEABLE",
    "DEFAULT_LR",
    "AugmentBlock",
    "BatchBlock",
    "CheckpointBlock",
    "DataBlock",
    "EngineBlock",
    "FilterBlock",
    "Format",
    "FullBlock",
    "KubernetesBlock",
    "LoraBlock",
    "MemoryBlock",
    "MethodBlock",
    "MixBlock",
    "OptimBlock",
    "QloraBlock",
    "ReadingBlock",
    "ResolvedRun",
    "RunBlock",
    "RunConfig",
    "ScaleBlock",
    "ServeConfig",
    "Source",
    "SourceBlock",
    "SplitBlock",
    "StopBlock",
    "WorkersBlock",
    "changed",
    "checked",
    "derived",
    "dotted_names",
    "leaves",
    "load_run",
    "load_serve",
    "read_text",
    "report",
    "run_from_json",
    "run_from_text",
    "sources_of",
    "validated",
]

Source = Literal["default", "auto", "file", "--set"]  # auto: follows from other values
# These may change in a run that goes on: where, how fast and until when it learns, never what one of its steps does.
CHANGEABLE = ("scale", "memory", "checkpoint", "evaluate", "stop", "publish", "kubernetes")


@dataclass(frozen=True)
class ResolvedRun:
    """A run's complete config, the source of every value by dotted name, and the text it came from."""

    config: RunConfig
    sources: dict[str, Source]
    text: str
    overrides: tuple[str, ...] = ()  # the `--set` that were given, in order

    def as_json(self) -> dict[str, Any]:
        """What `resolved.json` holds."""
        config = self.config.model_dump(mode="json", by_alias=True)
        return {"schema": 1, "config": config, "sources": self.sources, "overrides": list(self.overrides)}


def load_run(path: str, overrides: Sequence[str] = ()) -> ResolvedRun:
    """Read a run file. `overrides` are `dotted.key=value`, the value in YAML. Raises ConfigError with every problem.

    An override takes away what the file says to the contrary: `method=full` the file's `method.r`, `optim.batch.tokens=...`
    its `optim.batch.rows`. What another override says stays, and is an error.
    """
    return run_from_text(read_text(path, "run file"), path, overrides)


def run_from_text(text: str, origin: str, overrides: Sequence[str] = ()) -> ResolvedRun:
    """The run of a run file's text; `origin` names it in errors. Otherwise as `load_run`."""
    values = expanded(mapping(text, origin))
    written: dict[str, Source] = dict.fromkeys((key for key, _ in leaves(values)), "file")
    for given in overrides:
        _put_override(values, written, *override(given))
    config = validated(RunConfig, values, origin)
    return ResolvedRun(config, sources_of(config, written), text, tuple(overrides))


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run file's values with some fields set, by dotted name; as with overrides, what they contradict is taken away."""
    values = expanded(values)
    written: dict[str, Source] = dict.fromkeys((key for key, _ in leaves(values)), "file")
    for key, value in changes.items():
        _put_override(values, written, key, value)
    return values


def run_from_json(document: Mapping[str, Any], text: str = "", overrides: Sequence[str] = ()) -> ResolvedRun:
    """The run of what `ResolvedRun.as_json` wrote, to go on with; `overrides` of CHANGEABLE blocks are merged and recorded.

    Raises ConfigError with a line for each override that would change what is learnt, and every other problem.
    """
    before = dict(leaves(document["config"]))
    values = dict(document["config"])
    written: dict[str, Source] = dict(document["sources"])
    problems: list[str] = []
    for given in overrides:
        key, value = override(given)
        if key.split(".")[0] in CHANGEABLE:
            _put_override(values, written, key, value)
        else:
            problems += _kept(before, values, key, value)
    config, wrong = checked(RunConfig, values)
    if config is None or problems:
        raise ConfigError(report("--set beside --resume", [*problems, *wrong]))
    return ResolvedRun(config, sources_of(config, written), text, (*document["overrides"], *overrides))


def derived(resolved: ResolvedRun, overrides: Sequence[str]) -> ResolvedRun:
    """Another run, as `resolved` would be with these overrides of any fields behind its own. Raises ConfigError."""
    values = resolved.config.model_dump(mode="json", by_alias=True)
    written = dict(resolved.sources)
    for given in overrides:
        _put_override(values, written, *override(given))
    config = validated(RunConfig, values, f"the run file with {' '.join(overrides)}")
    return ResolvedRun(config, sources_of(config, written), resolved.text, (*resolved.overrides, *overrides))


def _kept(before: Mapping[str, Any], values: Mapping[str, Any], key: str, value: Any) -> Iterator[str]:
    """A line for each field that an override would change, and that stays in a run that goes on."""
    for name, asked in leaves(expanded(nest(key, value))):
        if name in before and before[name] != asked:
            yield (
                f"{name}: the run has {before[name]!r}, asked for {asked!r}, which would change what is learnt. Leave it out, "
                f"or start a new run: loray train RUN.YAML --set {name}={asked}"
            )
        elif name not in before and name in dotted_names(RunConfig):
            yield f"{name}: the run has no such field with method.type {value_at(values, 'method.type')}. Leave it out."
        elif any(known.startswith(f"{name}.") for known in before):
            yield f"{name}: is a block of fields, and a run that goes on keeps them. Leave it out."
        elif name not in before:
            yield unknown_key(RunConfig, name.split("."))


def load_serve(path: str) -> ServeConfig:
    """Read a serve file. Raises ConfigError with every problem."""
    return validated(ServeConfig, mapping(read_text(path, "serve file"), path), path)


BlockT = TypeVar("BlockT", bound=Block)


def validated(model: type[BlockT], values: Mapping[str, Any], origin: str) -> BlockT:
    """`values` as a `model`, or a ConfigError that lists every problem under `origin`."""
    config, problems = checked(model, values)
    if config is None:
        raise ConfigError(report(origin, problems))
    return config


def checked(model: type[BlockT], values: Mapping[str, Any]) -> tuple[BlockT | None, list[str]]:
    """`values` as a `model`, or None and a line for each problem."""
    values = expanded(values)
    across = list(model.problems_across(values))
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        return None, problem_lines(model, error, values) + across
    return None if across else config, across


def report(origin: str, problems: Sequence[str]) -> str:
    """The message of an error that lists every problem of `origin`."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([f"{origin}: {count}. Mend and try again.", *(f"  {line}" for line in problems)])


def sources_of(config: RunConfig, written: Mapping[str, Source]) -> dict[str, Source]:
    """The source of every leaf of `config`: as `written`, else `auto` where it follows from others, else `default`."""
    names = [key for key, _ in leaves(config.model_dump(mode="json", by_alias=True))]
    return {key: written.get(key, "auto" if key == "optim.lr" else "default") for key in names}


def _put_override(values: dict[str, Any], written: dict[str, Source], key: str, value: Any) -> None:
    """Put an override in, in place, and its source; take away what the file says to the contrary."""
    if key == "method" and isinstance(value, str):
        key = "method.type"
    if key == "method.type" and value in METHODS:
        others = {name for block in METHODS.values() for name in block.model_fields} - set(METHODS[value].model_fields)
        _withdraw(values, written, [f"method.{name}" for name in sorted(others)])
    elif key in ("optim.batch.rows", "optim.batch.tokens") and value is not None:
        _withdraw(values, written, ["optim.batch.tokens" if key.endswith("rows") else "optim.batch.rows"])
    elif key in ("scale.workers.min", "scale.workers.max") and isinstance(
        workers := value_at(values, "scale.workers"), int
    ):
        put(values, "scale.workers", {"min": workers, "max": workers})
        source = written.pop("scale.workers")
        written |= {"scale.workers.min": source, "scale.workers.max": source}
    put(values, key, value)
    values.update(expanded(values))
    for name in [name for name in written if name == key or name.startswith(f"{key}.")]:
        del written[name]
    written.update((name, "--set") for name, _ in leaves(expanded(nest(key, value))))


def _withdraw(values: dict[str, Any], written: dict[str, Source], keys: Sequence[str]) -> None:
    for key in keys:
        inside = [name for name in written if name == key or name.startswith(f"{key}.")]
        if inside and all(written[name] == "file" for name in inside):
            take_out(values, key)
            for name in inside:
                del written[name]
