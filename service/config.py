"""From a YAML file to a frozen, complete config, or to one error that lists everything wrong with it.

`load_run` reads a run file and its `--set` overrides, `load_serve` a serve file. Unknown keys are errors that name the
nearest known key; types are strict (no `"16"` for 16, no `true` for 1). Every field has one dotted name (`optim.lr`),
the same in YAML, on the command line, in `resolved.json` and in a manifest. Nothing here reads anything but the one file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from service.domain import ModelRef, check_name
from service.errors import ConfigError

Source = Literal["default", "file", "--set"]


class Block(BaseModel):
    """A frozen block of a config: unknown keys and loose types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _shorthand(key: str) -> BeforeValidator:
    """`method: lora` for `method: {type: lora}`: a bare string stands for the block's main key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _warmup(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError("must be 0 or more steps")
    elif not re.fullmatch(r"\d+(\.\d+)?\s?%", value) or float(value.rstrip("% ")) > 100:
        raise ValueError("must be a number of steps or a share of all steps such as 10%")
    return value


def _family(value: str) -> str:
    try:
        if ModelRef.parse(value).selector is not None:
            raise ValueError("must be a bare name such as tickets: the version is given when it is published")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


class ModelBlock(Block):
    """The base model: a hub id, a local path, an s3:// URI or a bundled name."""

    id: str = Field(min_length=1)
    revision: str | None = None  # of a hub id: branch, tag or commit
    chat_template: str | None = None  # path of a Jinja file, instead of the model's own template


class DataBlock(Block):
    """Where the rows are, and what becomes of those longer than `seq_len` tokens."""

    train: str = Field(min_length=1)
    eval: str | None = None
    seq_len: int = Field(default=1024, ge=8)
    over_long: Literal["error", "drop"] = "error"


class LoraBlock(Block):
    """LoRA, arXiv:2106.09685. The update is scaled by alpha / r, so `alpha: 32` with `r: 16` doubles it."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] = "all-linear"


class BatchBlock(Block):
    """The global batch of one optimizer step; workers and micro-batches never change it."""

    rows: int = Field(default=16, ge=1)


class OptimBlock(Block):
    """AdamW (arXiv:1711.05101) and its schedule. `lr` defaults to 2e-4, LoRA's rate in QLoRA (arXiv:2305.14314, table 9)."""

    lr: float = Field(default=2.0e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int | str, AfterValidator(_warmup)] = "10%"
    batch: BatchBlock = BatchBlock()
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0 = off


class ScaleBlock(Block):
    """How many Ray Train workers share one run, and how."""

    workers: int = Field(default=1, ge=1)
    strategy: Literal["ddp"] = "ddp"


class MemoryBlock(Block):
    """The micro-batch, in rows; `auto` divides a step evenly over the workers, within a budget of tokens."""

    micro: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


class EveryBlock(Block):
    """A period in optimizer steps; 0 = off."""

    steps: int = Field(default=0, ge=0)


class CheckpointBlock(Block):
    """Resumable state: how often, and how many are kept."""

    every: EveryBlock = EveryBlock(steps=50)
    keep_last: int = Field(default=2, ge=1)


class EvaluateBlock(Block):
    """Held-out loss on `data.eval`: always after the last step, and when asked here."""

    at_start: bool = False
    every: EveryBlock = EveryBlock()


class PublishBlock(Block):
    """The registry name under which the result becomes the next version."""

    name: Annotated[str, AfterValidator(_family)]


class RunConfig(Block):
    """One training run, complete. `loray plan` prints it with the source of every value."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: Annotated[ModelBlock, _shorthand("id")]
    data: DataBlock
    objective: Literal["sft"] = "sft"
    method: Annotated[LoraBlock, _shorthand("type")] = LoraBlock(type="lora")
    optim: OptimBlock = OptimBlock()
    scale: ScaleBlock = ScaleBlock()
    memory: MemoryBlock = MemoryBlock()
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpoint: CheckpointBlock = CheckpointBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    publish: Annotated[PublishBlock, _shorthand("name")] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)


class EngineBlock(Block):
    """The serving engine's fixed sizes: slots (concurrent rows), tokens per row, LoRA columns, CPU threads (0 = all)."""

    slots: int = Field(default=16, ge=1, le=1024)
    max_context: int = Field(default=2048, ge=16)
    lora_columns: int = Field(default=256, ge=0)
    threads: int = Field(default=0, ge=0)


class ServeConfig(Block):
    """One endpoint: a base model and the adapters it starts with. It listens on the loopback interface only."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    endpoint: Annotated[str, AfterValidator(lambda value: check_name(value, "endpoint"))] = "default"
    model: Annotated[ModelBlock, _shorthand("id")]
    adapters: Annotated[tuple[str, ...], Strict(False)] = ()
    port: int = Field(default=8000, ge=1, le=65535)
    precision: Literal["bf16", "fp32"] = "bf16"
    engine: EngineBlock = EngineBlock()
    replicas: int = Field(default=1, ge=1)


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
    """Read a run file. `overrides` are `dotted.key=value`, the value in YAML. Raises ConfigError with every problem."""
    text = read_text(path, "run file")
    values = _mapping(text, path)
    written: dict[str, Source] = dict.fromkeys((key for key, _ in leaves(_expanded(values))), "file")
    for override in overrides:
        key, value = _override(override)
        _set(values, key, value)
        written = {k: s for k, s in written.items() if not k.startswith(f"{key}.")}
        written.update((k, "--set") for k, _ in leaves(_expanded(_nest(key, value))))
    config = validated(RunConfig, values, path)
    return ResolvedRun(config, sources_of(config, written), text, tuple(overrides))


def run_from_json(document: Mapping[str, Any], text: str = "") -> ResolvedRun:
    """The same from what `ResolvedRun.as_json` wrote, for a resumed run."""
    config = validated(RunConfig, document["config"], "resolved.json")
    return ResolvedRun(config, dict(document["sources"]), text, tuple(document["overrides"]))


def load_serve(path: str) -> ServeConfig:
    """Read a serve file. Raises ConfigError with every problem."""
    return validated(ServeConfig, _mapping(read_text(path, "serve file"), path), path)


BlockT = TypeVar("BlockT", bound=Block)


def validated(model: type[BlockT], values: Mapping[str, Any], origin: str) -> BlockT:
    """`values` as a `model`, or a ConfigError that lists every problem under `origin`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_problem(model, details)}" for details in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n".join([f"{origin}: {count}. Mend and try again.", *lines])) from None


def sources_of(config: RunConfig, written: Mapping[str, Source]) -> dict[str, Source]:
    """The source of every leaf of `config`: what was `written` by hand, else `default`."""
    return {key: written.get(key, "default") for key, _ in leaves(config.model_dump(mode="json", by_alias=True))}


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every leaf of a config model by its dotted name, in order."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        block = _block_of(field.annotation)
        if block is None:
            yield key
        else:
            yield from dotted_names(block, f"{key}.")


def read_text(path: str, what: str) -> str:
    """The file's text, or ConfigError that says which file is missing or unreadable."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {path!r} does not exist under {Path.cwd()}. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path!r} cannot be read as UTF-8 text: {error}.") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats (`1e-4` is a number) and without duplicate keys."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, see above
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is no valid YAML: {' '.join(str(error).split())}") from None


def _mapping(text: str, origin: str) -> dict[str, Any]:
    values = _yaml(text, origin)
    if not isinstance(values, dict):
        seen = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{origin} is {seen}, and must be a mapping of keys such as model, data and optim.")
    return {str(key): value for key, value in values.items()}


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"--set {text!r} is no dotted.key=value. Write for example --set optim.max_steps=4.")
    return key, _yaml(value, f"the value of --set {text!r}")


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = _expanded(values).get(parent)
        values[parent] = dict(child) if isinstance(child, dict) else {}
        values = values[parent]
    values[last] = value


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The top level with its shorthands written out, so that overrides and sources see one form."""
    main_key = {"model": "id", "method": "type", "publish": "name"}
    return {k: {main_key[k]: v} if k in main_key and isinstance(v, str) else v for k, v in values.items()}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted name, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _block_of(annotation: Any) -> type[Block] | None:
    """The config block inside an annotation such as `Annotated[Block, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _block_of(part)
        if found:
            return found
    return None


def _problem(model: type[BaseModel], details: ErrorDetails) -> str:
    path = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        return _unknown_key(model, path)
    keys = [name for name in path if name in _known_words(model) or name.isdigit()]
    key = ".".join(keys) or "(file)"
    if details["type"] == "missing":
        return f"{key}: missing. It has no default."
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    seen = details["input"]
    shown = _shown(seen)
    if isinstance(seen, float) and not math.isfinite(seen):
        message = "must be a finite number"
    return f"{key}: {message[0].lower()}{message[1:]}, not {shown}."


def _shown(value: Any) -> str:
    try:
        return "a mapping" if isinstance(value, dict) else repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _unknown_key(model: type[BaseModel], path: list[str]) -> str:
    names = list(dotted_names(model))
    key = ".".join(path)
    parent = ".".join(path[:-1])
    siblings = {n[len(parent) + 1 if parent else 0 :].split(".")[0] for n in names if n.startswith(parent)}
    near = difflib.get_close_matches(path[-1], sorted(siblings), n=1, cutoff=0.5)
    exact = sorted((n for n in names if n.split(".")[-1] == path[-1]), key=lambda n: not n.startswith(f"{parent}."))
    here = [".".join([*path[:-1], near[0]])] if near else []
    for guess in (*exact, *here, *difflib.get_close_matches(key, names, n=1)):
        return f"{key}: unknown key. Did you mean {guess}?"
    return f"{key}: unknown key. Known here: {', '.join(sorted(siblings))}."


def _known_words(model: type[BaseModel]) -> set[str]:
    return {part for name in dotted_names(model) for part in name.split(".")}
