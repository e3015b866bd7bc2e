"""Which choices of a run go together, what is said of those that do not, and what is advised of those that do."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from service.config import RunConfig
from service.errors import ConfigError
from service.training.compatibility import Figures, advice, is_installed, refuse, refuse_steps

GIB = 2**30
ROOMY = Figures(trainable_bytes=2**20, frozen_bytes=GIB, worker_bytes=16 * GIB, on_gpu=True)
TIGHT = Figures(trainable_bytes=2**20, frozen_bytes=14 * GIB, worker_bytes=16 * GIB, on_gpu=True)


def _config(**blocks: Any) -> RunConfig:
    return RunConfig.model_validate({"model": "base", "data": {"train": "rows.jsonl"}, **blocks})


def _reasons(
    config: RunConfig, architecture: Any = None, missing: tuple[str, ...] = (), on_gpu: bool | None = False
) -> list[str]:
    """What `refuse` says, without its first line, on a machine without a GPU and without the packages `missing`."""
    try:
        refuse(config, architecture, on_gpu=on_gpu, installed=lambda package: package not in missing)
    except ConfigError as error:
        first, *reasons = str(error).splitlines()
        count = f"{len(reasons)} reason{'s' if len(reasons) > 1 else ''}"
        assert first == f"this run cannot be done as configured, for {count}."
        return [reason.strip() for reason in reasons]
    return []


@pytest.mark.parametrize(
    ("blocks", "said", "works"),
    [
        (
            {"optim": {"name": "adafactor"}, "scale": {"strategy": "zero2"}},
            "optim.name adafactor with zero2",
            {"scale": {"strategy": "zero2"}},
        ),
        (
            {"optim": {"name": "adamw8bit"}, "scale": {"strategy": "zero1"}},
            "optim.name adamw8bit with zero1",
            {"optim": {"name": "adamw8bit"}},
        ),
        (
            {"scale": {"offload": "optimizer"}},
            "scale.offload optimizer: ddp",
            {"scale": {"offload": "optimizer", "strategy": "zero2"}},
        ),
        (
            {"scale": {"offload": "all", "strategy": "zero2"}},
            "scale.offload all: zero2",
            {"scale": {"offload": "all", "strategy": "zero3"}},
        ),
        ({"method": "qlora", "scale": {"strategy": "zero1"}}, "method.type qlora with zero1", {"method": "qlora"}),
        (
            {"method": {"base_bits": 8}, "scale": {"strategy": "zero1"}},
            "method.base_bits 8 with zero1",
            {"method": {"base_bits": 8}},
        ),
        (
            {"method": {"base_bits": 8}, "scale": {"strategy": "zero3"}},
            "method.base_bits 8 with zero3",
            {"method": "qlora", "scale": {"strategy": "zero3"}},
        ),
        (
            {"method": {"base_bits": 8, "dora": True}},
            "method.dora with method.base_bits 8",
            {"method": {"type": "qlora", "dora": True}},
        ),
        (
            {"method": {"type": "qlora", "dora": True}, "scale": {"strategy": "zero3"}},
            "method.dora with qlora under zero3",
            {"method": {"type": "qlora", "dora": True}, "scale": {"strategy": "zero2"}},
        ),
        (
            {"method": {"type": "qlora", "bias": "all"}},
            "method.bias all with method.type qlora",
            {"method": {"type": "lora", "bias": "all"}},
        ),
    ],
)
def test_a_choice_that_cannot_work_is_refused_once_and_the_choice_it_names_works(
    blocks: dict[str, Any], said: str, works: dict[str, Any]
) -> None:
    (reason,) = _reasons(_config(**blocks))
    assert reason.startswith(said) and "Set " in reason
    assert _reasons(_config(**works)) == []


def test_everything_that_is_offered_together_is_accepted() -> None:
    """Each method under each strategy that the table above leaves it, at each precision, on any number of workers."""
    strategies = ("ddp", "zero1", "zero2", "zero3")
    methods: list[dict[str, Any]] = [
        {"type": "full"},
        {"type": "lora", "dora": True, "rslora": True, "lora_plus_ratio": 4.0, "bias": "all"},
        {"type": "lora", "rank_pattern": {"q_proj": 8}, "init_from": "tickets@3"},
    ]
    offered = [(method, strategy) for method, strategy in product(methods, strategies)]
    offered += [({"type": "qlora"}, strategy) for strategy in ("ddp", "zero2", "zero3")]
    offered += [({"type": "lora", "base_bits": 8}, strategy) for strategy in ("ddp", "zero2")]
    for (method, strategy), precision in product(offered, ("bf16", "fp16", "fp32")):
        scale = {"strategy": strategy, "workers": {"min": 1, "max": 4}}
        assert _reasons(_config(method=method, scale=scale, precision=precision)) == []


def test_what_only_a_gpu_can_is_refused_where_there_is_none_for_certain() -> None:
    config = _config(method={"base_bits": 8, "dora": True})
    assert _reasons(config, on_gpu=True) == _reasons(config, on_gpu=None) == []
    assert len(_reasons(config, on_gpu=False)) == 1


def test_all_reasons_are_told_at_once() -> None:
    config = _config(
        method={"base_bits": 8, "dora": True, "bias": "all"},
        optim={"name": "adamw8bit"},
        scale={"strategy": "zero1", "offload": "all"},
    )
    reasons = _reasons(config, LlamaConfig(quantization_config={"quant_method": "fp8"}), missing=("deepspeed",))
    starts = (
        "scale.strategy zero1: deepspeed",
        "scale.offload",
        "optim.name",
        "method.base_bits 8 with zero1",
        "method.dora",
        "method.bias",
        "model.id base: its weights are stored quantised (fp8)",
    )
    assert len(reasons) == len(starts)
    for reason, start in zip(reasons, starts, strict=True):
        assert reason.startswith(start)


@pytest.mark.parametrize(
    ("blocks", "package", "said"),
    [
        ({"scale": {"strategy": "zero3"}}, "deepspeed", "'loray[zero]', or take scale.strategy: ddp"),
        ({"method": "qlora"}, "bitsandbytes", "'loray[quant]', or take method.type: lora"),
        ({"method": {"base_bits": 8}}, "bitsandbytes", "'loray[quant]', or take method.base_bits: 16"),
        ({"optim": {"name": "adamw8bit"}}, "bitsandbytes", "'loray[quant]', or take optim.name: adafactor"),
    ],
)
def test_a_missing_package_is_named_with_its_extra_and_the_choice_without_it(
    blocks: dict[str, Any], package: str, said: str
) -> None:
    (reason,) = _reasons(_config(**blocks), missing=(package,))
    assert f"{package} is not installed" in reason and said in reason
    assert _reasons(_config(), missing=(package,)) == []


def test_installed_means_that_it_could_be_imported() -> None:
    assert is_installed("torch") and not is_installed("no_such_package")


def _step_reasons(config: RunConfig, num_steps: int, longest: int = 8, architecture: Any = None) -> str:
    try:
        refuse_steps(config, num_steps, longest, architecture)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("optim", "num_steps", "said"),
    [
        ({"warmup": 5}, 4, "optim.warmup 5: the run has 4 steps"),
        ({"warmup": 4}, 4, ""),
        ({"warmup": "100%"}, 4, ""),
        ({"schedule": "wsd", "warmup": 2, "decay": 3}, 4, "optim.warmup 2 and optim.decay 3 are 5 steps together"),
        ({"schedule": "wsd", "warmup": 2, "decay": 2}, 4, ""),
        ({"schedule": "wsd", "warmup": "60%", "decay": "50%"}, 100, "are 110 steps together, and the run has 100"),
        ({"schedule": "wsd"}, 1, ""),  # 10% and 20% are a step each when rounded up, and there is one
        ({"schedule": "cosine", "warmup": 2, "decay": 3}, 4, ""),
    ],
)
def test_a_schedule_must_fit_the_steps_of_the_run(optim: dict[str, Any], num_steps: int, said: str) -> None:
    reasons = _step_reasons(_config(optim=optim), num_steps)
    assert said in reasons if said else reasons == ""


@pytest.mark.parametrize("architecture", [LlamaConfig(max_position_embeddings=64), GPT2Config(n_positions=64)])
def test_a_row_longer_than_the_base_knows_positions_is_refused(architecture: Any) -> None:
    assert _step_reasons(_config(), 100, 64, architecture) == ""
    said = _step_reasons(_config(optim={"warmup": 200}), 100, 65, architecture)
    assert "for 2 reasons" in said and "the longest row has 65 tokens, and the base model knows 64 positions" in said


@pytest.mark.parametrize(
    ("blocks", "figures", "said"),
    [
        ({"scale": {"strategy": "zero3", "workers": 2}}, ROOMY, "zero3 is slower than ddp, and is not needed"),
        (
            {"scale": {"strategy": "zero2", "workers": 2}},
            TIGHT,
            "zero2 spreads an adapter's state only, 4.0 MiB in all",
        ),
        ({"scale": {"strategy": "zero3"}}, TIGHT, "zero3 with one worker spreads nothing"),
        (
            {"method": "qlora", "scale": {"strategy": "zero3", "workers": 2}},
            TIGHT,
            "every worker first loads the whole quantised base (14.0 GiB)",
        ),
        (
            {"scale": {"strategy": "zero3", "workers": 2, "offload": "all"}},
            Figures(2**20, 14 * GIB, 16 * GIB, on_gpu=False),
            "scale.offload all moves to host memory what is there already",
        ),
        ({"precision": "fp16"}, Figures(2**20, GIB, 16 * GIB, on_gpu=False), "precision fp16 without a GPU"),
        ({"method": "full", "optim": {"lr": 2e-4}}, ROOMY, "optim.lr 0.0002 is 10 times what method.type full"),
        ({"checkpoint": {"every": {"steps": 0}}}, ROOMY, "checkpoint.every is off"),
        ({"method": "full", "publish": "tickets"}, ROOMY, "a full model is served as a base model of its own"),
        ({"method": {"dora": True}, "publish": "tickets"}, ROOMY, "will not hot-swap this adapter: DoRA"),
        ({"method": {"bias": "lora_only"}, "publish": "tickets"}, ROOMY, "will not hot-swap this adapter: biases"),
        (
            {"method": {"rank_pattern": {".*q_proj": 4}}, "publish": "tickets"},
            ROOMY,
            "will not hot-swap this adapter: module names must be plain names, not patterns such as '.*q_proj'",
        ),
        (
            {"method": {"targets": ["lm_head"]}, "publish": "tickets"},
            ROOMY,
            "will not hot-swap this adapter: the output head",
        ),
        ({"method": {"r": 512}, "publish": "tickets"}, ROOMY, "engine.lora_columns: 512 or more; the default is 256"),
    ],
)
def test_what_works_badly_is_advised_on_in_one_line(blocks: dict[str, Any], figures: Figures, said: str) -> None:
    config = _config(**blocks)
    assert _reasons(config) == []
    (line,) = advice(config, figures)
    assert said in line


@pytest.mark.parametrize(
    "blocks",
    [
        {"publish": "tickets", "scale": {"workers": 2}},
        {"method": {"dora": True}},  # not published: nobody serves it
        {"method": "full", "scale": {"strategy": "zero2", "workers": 2}},
        {"scale": {"strategy": "zero3", "workers": 2, "offload": "all"}},
    ],
)
def test_nothing_is_advised_on_a_good_choice(blocks: dict[str, Any]) -> None:
    full = Figures(trainable_bytes=4 * GIB, frozen_bytes=0, worker_bytes=16 * GIB, on_gpu=True)
    assert advice(_config(**blocks), full if blocks.get("method") == "full" else TIGHT) == []
