"""Every key that a run file may hold: its type, its range, its default, and where the default comes from.

Pydantic, frozen and strict. What one block cannot say alone is in `RunConfig.problems_across`; what depends on the model or
on the machine is in `training/compatibility.py`. Import these from `service.config`, which reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from service import kubernetes_names as names
from service.config_values import value_at
from service.domain import ModelRef
from service.errors import ConfigError


class Block(BaseModel):
    """A frozen block of a config: unknown keys and loose types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def problems_across(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """A line for each pair of fields, blocks apart, that cannot go together; whatever else is wrong in `values`."""
        yield from ()


def shorthand(key: str) -> BeforeValidator:
    """`method: lora` for `method: {type: lora}`: a bare string stands for the block's main key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _method(value: Any) -> Any:
    """`method: lora` for `method: {type: lora}`, and LoRA where a block names no type."""
    if isinstance(value, str):
        return {"type": value}
    return {"type": "lora", **value} if isinstance(value, Mapping) else value


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


Format = Literal[
    "auto", "messages", "sharegpt", "prompt", "alpaca", "qa", "text", "preference", "labelled", "tags"
]  # see data/formats.py
Share = Annotated[float, Field(ge=0, lt=1)]


class ReadingBlock(Block):
    """How the rows of a source are understood: their format, which of their columns is which field, a prompt's text.

    `columns` gives our field's name for theirs: `{prompt: question, completion: answer}`. `template` is the text of the
    user's turn, with `{column}` where a column's value goes; `alpaca` is the one of that name.
    """

    format: Format = "auto"
    columns: dict[str, str] = {}
    template: str | None = None


class SourceBlock(ReadingBlock):
    """One of several sources. What it does not say of its rows, `data` says. `weight` is for `data.mix.by: weights`."""

    uri: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)


class MixBlock(Block):
    """How much of an epoch each source has. An epoch is as long as all sources together, whatever their shares.

    proportional: by rows. temperature: by rows ^ (1 / temperature), arXiv:1910.10683 section 3.5.2. weights: as the sources
    say. `cap` counts no source as larger than this many rows.
    """

    by: Literal["proportional", "temperature", "weights"] = "proportional"
    temperature: float = Field(default=1.0, ge=1)
    cap: int | None = Field(default=None, ge=1)


class SplitBlock(Block):
    """Shares of `data.train` that are held out. A row's side follows from a hash of its content, or of its `group` field.

    With `stratify`, a field, every class has these shares of its own rows.
    """

    eval: Share = 0.0
    test: Share = 0.0
    group: str | None = None
    stratify: str | None = None

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.eval + self.test >= 1:
            raise ValueError(f"eval {self.eval} and test {self.test} leave no row to train on; lower them")
        if self.group and self.stratify:
            raise ValueError("group and stratify cannot both be kept; leave one out")
        return self


class FilterBlock(Block):
    """Which rows are left out before training, and counted: by characters of a row's text, by language, by quality."""

    min_chars: int = Field(default=0, ge=0)
    max_chars: int | None = Field(default=None, ge=1)
    languages: Annotated[tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...], Strict(False)] = ()  # ISO 639-1: en
    max_repetition: float = Field(default=1.0, gt=0, le=1)  # share of a text in repeated 10-grams of words

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"min_chars {self.min_chars} is more than max_chars {self.max_chars}; set them in order")
        return self


class AugmentBlock(Block):
    """Changed copies of training rows, beside the rows: so many each, with these shares of the prompt's words changed."""

    copies: int = Field(default=0, ge=0, le=16)
    synonyms: str | None = None  # a file of lines `word<TAB>other,another`
    synonym: Share = 0.0
    swap: Share = 0.0
    delete: Share = 0.0
    insert: Share = 0.0

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        changes = any((self.synonym, self.swap, self.delete, self.insert))
        if changes != bool(self.copies):
            raise ValueError(
                f"copies {self.copies} and the shares go together: set copies and one of synonym, swap, delete, insert"
            )
        if self.synonym and not self.synonyms:
            raise ValueError(
                f"synonym {self.synonym} needs a table; set synonyms to a file of lines word<TAB>other,another"
            )
        if self.synonyms and not (self.synonym or self.insert):
            raise ValueError("synonyms is a table that only synonym and insert read; set one of them, or leave it out")
        return self


class DataBlock(ReadingBlock):
    """Where the rows are, how they are read and divided, what is trained, and whether rows share a sequence.

    `train` is a source, or several that are mixed: uris, or blocks with a `uri`. What is longer than `seq_len` tokens is an
    error, or is dropped, or loses its end.
    """

    train: (
        Annotated[str, Field(min_length=1)]
        | Annotated[tuple[str | SourceBlock, ...], Strict(False), Field(min_length=1)]
    )
    eval: str | None = None
    test: str | None = None  # read once, after the last step
    train_on: Literal["responses", "all", "last"] = "responses"
    seq_len: int = Field(default=1024, ge=8)
    over_long: Literal["error", "drop", "truncate"] = "error"
    pack: Literal["auto", "never"] = "auto"  # auto: whole rows share a sequence where the model keeps them apart
    mix: MixBlock = MixBlock()
    split: SplitBlock = SplitBlock()
    filter: FilterBlock = FilterBlock()
    augment: AugmentBlock = AugmentBlock()
    curriculum: str | None = None  # `length`, or a field that is a number: every epoch goes from the smallest up

    @property
    def sources(self) -> tuple[SourceBlock, ...]:
        """The sources of `train`, complete: what they leave open is as `data` has it."""
        given = (self.train,) if isinstance(self.train, str) else self.train
        own = [{"uri": one} if isinstance(one, str) else one.model_dump(exclude_unset=True) for one in given]
        mine = {"format": self.format, "columns": self.columns, "template": self.template}
        return tuple(SourceBlock.model_validate({**mine, **block}) for block in own)


class RunBlock(Block):
    """Several trainings as one run, with mean and spread: over `folds` of the data, or over `seeds`, `seed` and those after it."""

    folds: int = Field(default=1, ge=1, le=100)
    fold: int | None = Field(default=None, ge=1)  # train this one of them alone
    seeds: int = Field(default=1, ge=1, le=100)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.folds > 1 and self.seeds > 1:
            raise ValueError(f"folds {self.folds} and seeds {self.seeds} cannot both be more than 1; keep one")
        if self.fold is not None and (self.folds == 1 or self.fold > self.folds):
            raise ValueError(
                f"fold {self.fold} is none of the folds, 1 to {self.folds}; raise folds, or leave fold out"
            )
        return self

    @property
    def held_out(self) -> tuple[int, int] | None:
        """Which fold is not trained on, from 1, and of how many; None where nothing is held out by folds."""
        return None if self.fold is None else (self.fold, self.folds)


class FullBlock(Block):
    """All weights of the base move."""

    type: Literal["full"] = "full"


class LoraBlock(Block):
    """LoRA, arXiv:2106.09685. The update is scaled by alpha / r, so `alpha: 32` with `r: 16` doubles it."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases train too, as PEFT defines it
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}  # a module's name or its end -> its own r
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    dora: bool = False  # arXiv:2402.09353
    rslora: bool = False  # arXiv:2312.03732: alpha / sqrt(r)
    lora_plus_ratio: float = Field(default=1.0, ge=1)  # arXiv:2402.12354: B learns this many times faster than A
    init_from: str | None = None  # an adapter to go on from: tickets@3, a directory or an s3:// URI
    base_bits: Literal[16, 8] = 16  # 8: the frozen base in int8, arXiv:2208.07339


class QloraBlock(LoraBlock):
    """QLoRA, arXiv:2305.14314: LoRA on a frozen base in 4-bit NormalFloat."""

    type: Literal["qlora"] = "qlora"  # type: ignore[assignment]  # narrowed on purpose: the union's tag
    base_bits: Literal[4] = 4  # type: ignore[assignment]
    double_quant: bool = True  # quantise the quantisation constants too (section 3)


MethodBlock = Annotated[FullBlock | LoraBlock | QloraBlock, Field(discriminator="type")]
METHODS: dict[str, type[Block]] = {"full": FullBlock, "lora": LoraBlock, "qlora": QloraBlock}


class BatchBlock(Block):
    """The global batch of one optimizer step, in rows or in tokens; workers and micro-batches never change it."""

    rows: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=8)

    @model_validator(mode="before")
    @classmethod
    def _sixteen_rows(cls, values: Any) -> Any:
        given = not isinstance(values, dict) or any(values.get(key) is not None for key in ("rows", "tokens"))
        return values if given else {**values, "rows": 16}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.rows is not None and self.tokens is not None:
            raise ValueError(f"rows {self.rows} and tokens {self.tokens} are both given; keep one of the two")
        return self


class OptimBlock(Block):
    """The optimizer and its schedule. `lr` follows from the method where it is not given: see DEFAULT_LR."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    lr: float = Field(default=2.0e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: Annotated[int | str, AfterValidator(_warmup)] = "10%"
    decay: Annotated[int | str, AfterValidator(_warmup)] = "20%"  # of wsd: the last steps, arXiv:2404.06395 section 4
    batch: BatchBlock = BatchBlock(rows=16)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0 = off


# LoRA and QLoRA: QLoRA's rate for models of 7B and 13B (it halves it above), arXiv:2305.14314 table 9. Full: Llama 2's for
# supervised fine-tuning, arXiv:2307.09288 section 3.1.
DEFAULT_LR = {"lora": 2.0e-4, "qlora": 2.0e-4, "full": 2.0e-5}


class Bounds(Block):
    """From `min` to `max`."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; set them in order")
        return self


class WorkersBlock(Bounds):
    """An elastic number of workers: starts with what there is, shrinks when a node goes, grows when one comes."""


class ScaleBlock(Block):
    """How many Ray Train workers share one run, and how. See `training/strategy.py` for what each strategy is for."""

    workers: Annotated[int, Field(ge=1)] | WorkersBlock = 1
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    offload: Literal["none", "optimizer", "all"] = "none"  # to host memory, under ZeRO; all: parameters too (zero3)
    wait_s: float = Field(default=1800.0, ge=0, le=10_000_000)  # for the cluster to have the resources; --no-wait is 0
    max_failures: int = Field(default=3, ge=0)  # lost workers in a row, without a new checkpoint in between
    stall_s: float = Field(default=600.0, gt=0)  # without progress: every worker's stacks are written to its log

    @property
    def min_workers(self) -> int:
        """The fewest that the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """As many as it takes where they are to be had."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


class MemoryBlock(Block):
    """The micro-batch, in sequences (rows, or packs of rows); `auto` divides a step evenly, within a budget of tokens."""

    micro: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    checkpoint_activations: bool = False  # computed again in the backward pass, arXiv:1604.06174


class EveryBlock(Block):
    """A period in optimizer steps; 0 = off."""

    steps: int = Field(default=0, ge=0)


class CheckpointEveryBlock(EveryBlock):
    """A period in optimizer steps or in minutes, whichever comes first; 0 = off."""

    minutes: float = Field(default=0.0, ge=0)


class CheckpointBlock(Block):
    """Resumable state: how often, and how many are kept: the newest, and those of lowest `stop.metric`."""

    every: CheckpointEveryBlock = CheckpointEveryBlock(steps=50)
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(
        default=0, ge=0
    )  # with 1 or more, or stop.patience, the best one is what is saved as the model
    retry_s: float = Field(default=300.0, ge=0)  # how long storage may be away before the run fails


class EvaluateBlock(Block):
    """Held-out loss on `data.eval`: always after the last step, and when asked here."""

    at_start: bool = False
    every: EveryBlock = EveryBlock()


class StopBlock(Block):
    """Early stopping: after `patience` evaluations in a row without a `metric` lower by `min_delta`. 0 = off."""

    patience: int = Field(default=0, ge=0)
    metric: Literal["eval/loss"] = "eval/loss"
    min_delta: float = Field(default=0.0, ge=0)


class PublishBlock(Block):
    """The registry name under which the result becomes the next version."""

    name: Annotated[str, AfterValidator(_family)]


class KubernetesBlock(Block):
    """How `--kuberay` runs it: a RayJob with a cluster of its own. A worker pod holds `gpus` workers, or one on `cpus`.

    `queue` is a LocalQueue of Kueue, which starts the job when all of it fits. `nodes` are labels that the workers' nodes
    must have. `retries` are whole attempts, each on a new cluster, each from the newest checkpoint.
    """

    namespace: str = Field(default="loray", pattern=names.DNS_LABEL)
    queue: str | None = Field(default=None, pattern=names.DNS_LABEL)
    image: Annotated[str, AfterValidator(names.image)] | None = None  # loray's own, of this version
    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=1, ge=1)  # for each worker
    nodes: dict[
        Annotated[str, BeforeValidator(names.quoted), AfterValidator(names.label_key)],
        Annotated[str, BeforeValidator(names.quoted), AfterValidator(names.label_value)],
    ] = {}
    retries: int = Field(default=3, ge=0, le=names.INT32)
    deadline_s: int = Field(default=3 * 86400, ge=1, le=names.INT32)  # for each attempt


class RunConfig(Block):
    """One training run, complete. `loray plan` prints it with the source of every value."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: Annotated[ModelBlock, shorthand("id")]
    data: DataBlock
    run: RunBlock = RunBlock()
    objective: Literal["sft"] = "sft"
    method: Annotated[MethodBlock, BeforeValidator(_method)] = LoraBlock()
    optim: OptimBlock = OptimBlock()
    scale: ScaleBlock = ScaleBlock()
    memory: MemoryBlock = MemoryBlock()
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    checkpoint: CheckpointBlock = CheckpointBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    stop: StopBlock = StopBlock()
    publish: Annotated[PublishBlock, shorthand("name")] | None = None
    kubernetes: KubernetesBlock = KubernetesBlock()
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_method(cls, values: Any) -> Any:
        """`optim.lr` from DEFAULT_LR where it is not written."""
        optim = values.get("optim", {}) if isinstance(values, Mapping) else None
        if not isinstance(optim, Mapping) or "lr" in optim:
            return values
        method = value_at(expanded(values), "method.type")
        lr = DEFAULT_LR.get(method if isinstance(method, str) else "lora", DEFAULT_LR["lora"])
        return {**values, "optim": {**optim, "lr": lr}}

    @classmethod
    def problems_across(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What counts evaluations needs some to count, evaluations need rows, and rows come from one place only."""
        held_out = has_rows_to_evaluate(values)
        if not held_out:
            for key in ("evaluate.at_start", "evaluate.every.steps"):
                value = value_at(values, key)
                if value is True or (type(value) is int and value > 0 and key.endswith("steps")):
                    yield f"{key}: there are no rows to evaluate on. Set data.eval or data.split.eval, or leave {key} out."
        every = value_at(values, "evaluate.every.steps")
        needed = {"data.eval": held_out, "evaluate.every.steps": _is_positive(every)}
        missing = [key for key, there in needed.items() if not there]
        for key in ("stop.patience", "checkpoint.keep_best"):
            value = value_at(values, key)
            if _is_positive(value) and missing:
                yield f"{key}: {value} goes by evaluations during the run. Set {' and '.join(missing)} too, or {key}: 0."
        yield from _divided(values)
        yield from _mixed(values)
        yield from _repeated(values, held_out)


def has_rows_to_evaluate(values: Mapping[str, Any]) -> bool:
    """Of the values of a run file, shorthands written out: a file of them, a share of the rows, or folds."""
    return any(
        (
            value_at(values, "data.eval") is not None,
            _is_positive(value_at(values, "data.split.eval")),
            _is_several(value_at(values, "run.folds")),
        )
    )


def several_trainings(values: Mapping[str, Any]) -> str | None:
    """The field by which these values of a run file ask for more than one training."""
    if _is_several(value_at(values, "run.folds")) and value_at(values, "run.fold") is None:
        return "run.folds"
    return "run.seeds" if _is_several(value_at(values, "run.seeds")) else None


def _divided(values: Mapping[str, Any]) -> Iterator[str]:
    """Each side of the data is given once: by a file, by a share, or by folds."""
    folds = value_at(values, "run.folds")
    for side in ("eval", "test"):
        share = value_at(values, f"data.split.{side}")
        if _is_positive(share) and value_at(values, f"data.{side}") is not None:
            yield f"data.split.{side}: {share}, and data.{side} names a file of such rows. Leave one of the two out."
    for key in ("data.eval", "data.split.eval"):
        value = value_at(values, key)
        if _is_several(folds) and value is not None and value != 0:
            yield f"{key}: {value!r}, and with run.folds each fold is evaluated on in turn. Leave one of the two out."
    shares = (value_at(values, f"data.split.{side}") for side in ("eval", "test"))
    if not _is_several(folds) and not any(map(_is_positive, shares)):
        for key in ("data.split.group", "data.split.stratify"):
            if value_at(values, key) is not None:
                yield f"{key}: nothing is divided. Set data.split.eval, data.split.test or run.folds, or leave {key} out."


def _mixed(values: Mapping[str, Any]) -> Iterator[str]:
    """Of `data.mix` and the sources' weights, what its rule does not read."""
    by = value_at(values, "data.mix.by") or MixBlock().by
    temperature, cap, train = (value_at(values, key) for key in ("data.mix.temperature", "data.mix.cap", "data.train"))
    if by != "temperature" and temperature not in (None, 1):
        yield f"data.mix.temperature: {temperature}, and data.mix.by is {by}. Set by: temperature, or leave it out."
    if by == "weights" and cap is not None:
        yield f"data.mix.cap: {cap} counts rows, and data.mix.by is weights. Leave one of the two out."
    sources = train if isinstance(train, list | tuple) else ()
    if by != "weights" and any(isinstance(source, Mapping) and source.get("weight", 1) != 1 for source in sources):
        yield f"data.train: a source has a weight, and data.mix.by is {by}. Set by: weights, or leave the weights out."


def _repeated(values: Mapping[str, Any], held_out: bool) -> Iterator[str]:
    """One version is published of a run: of several seeds the best one, and of folds none has seen all rows."""
    if value_at(values, "publish") is None:
        return
    folds, seeds = value_at(values, "run.folds"), value_at(values, "run.seeds")
    if _is_several(folds) and value_at(values, "run.fold") is None:
        yield (
            f"publish: with run.folds: {folds} every training has seen only a part of the rows, and none is the one to "
            "serve. Leave publish out, or publish a run over all rows without run.folds."
        )
    if _is_several(seeds) and not held_out:
        yield (
            f"publish: with run.seeds: {seeds} the one of lowest eval/loss is published, and there are no rows to evaluate "
            "on. Set data.eval or data.split.eval, or leave publish out."
        )


def _is_several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The top level with its shorthands written out, so that overrides and sources see one form."""
    main_key = {"model": "id", "method": "type", "publish": "name"}
    return {k: {main_key[k]: v} if k in main_key and isinstance(v, str) else v for k, v in values.items()}
