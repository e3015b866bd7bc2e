"""The gate in its fresh process, for every method; and merging, from a published adapter to a base to go on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from service.base_models import resolve_base_model
from service.config import RunConfig, ServeConfig
from service.domain import Manifest, ManifestDraft, ModelRef, RunState
from service.errors import ConfigError, GateError, ModelError
from service.evaluation.answers import compare
from service.merging import merge, summary
from service.registry import Registry
from service.render import load_renderer
from service.settings import Settings
from service.training.gate import Probe, check, job_of, run_gate
from tests.integration.small_runs import make_job, write_rows, write_run_file
from tests.integration.tiny import save_base
from tests.integration.trained import base_with, leave_adapter, leave_full

pytest_plugins = ("tests.s3_endpoint",)
pytestmark = [
    # PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # bitsandbytes 0.50 and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]

_WEIGHTS = "adapter_model.safetensors"
Q_0, V_0 = (f"base_model.model.model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "bias": {"bias": "all"},
    "bias of the targets": {"bias": "lora_only"},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
}
NUM_PARTS = {"dora": 28, "dora and rslora": 28, "bias": 22, "bias of the targets": 22}  # else 14


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose attention has biases, in float32."""
    return base_with(tmp_path_factory.mktemp("base"), attention_bias=True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Empty roots."""
    return Settings(str(tmp_path / "home"), tmp_path / "cache")


def _config(base: Path, precision: str = "fp32", method: str = "lora", **options: Any) -> RunConfig:
    values = {"model": {"id": str(base)}, "data": {"train": "x"}, "precision": precision}
    return RunConfig.model_validate({**values, "method": {"type": method, **options}})


def _reasons(model: Path, base: Path, probe: Probe, config: RunConfig, start: Path | None = None) -> str:
    return " ".join(check(job_of(model, base, probe, config, start))[1])


def _edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = directory / _WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_fresh_process_gives_the_verdict(base: Path, tmp_path: Path, kind: str) -> None:
    leave = leave_adapter if kind == "lora" else leave_full
    probe, config = leave(base, tmp_path / "x", "fp32"), _config(base, method=kind)
    report = run_gate(tmp_path / "x", base, probe, config)
    assert report == check(job_of(tmp_path / "x", base, probe, config))[0]
    assert json.loads(json.dumps(asdict(report))) == asdict(report)
    assert report.alive == report.total and report.largest_difference <= 1e-4 < report.change_from_base


def test_a_refusal_holds_every_reason_and_says_that_nothing_is_published(base: Path, tmp_path: Path) -> None:
    probe = leave_adapter(base, tmp_path / "x", "fp32")
    _edited(tmp_path / "x", lambda t: [t[f"{Q_0}.lora_B.weight"].zero_(), t[f"{V_0}.lora_B.weight"].mul_(-3)])
    with pytest.raises(GateError) as caught:
        run_gate(tmp_path / "x", base, probe, _config(base))
    for reason in (f"1 of 14 updates are zero: {Q_0}.", "log-probabilities differ by", "It is not published."):
        assert reason in str(caught.value)


def test_a_process_that_cannot_answer_is_no_passed_gate(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"(?s)its files cannot be read"):
        run_gate(tmp_path / "none", tmp_path, Probe([([1, 2], [0, 1])], [-1.0], 0.0), _config(tmp_path))
    (tmp_path / "broken").write_text("{")
    done = subprocess.run([sys.executable, "-m", "service.training.gate", str(tmp_path / "broken")], check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_lora_passes_with_all_its_parts_alive(
    base: Path, tmp_path: Path, options: str, precision: str
) -> None:
    probe = leave_adapter(base, tmp_path / "x", precision, **OPTIONS[options])
    report, reasons = check(job_of(tmp_path / "x", base, probe, _config(base, precision)))
    assert reasons == [] and report is not None
    assert report.alive == report.total == NUM_PARTS.get(options, 14)
    assert report.largest_difference <= report.tolerance < report.change_from_base


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "bits"), [("qlora", 4), ("lora", 8)])
def test_an_adapter_on_a_quantised_base_passes_on_a_base_quantised_alike_only(
    base: Path, tmp_path: Path, method: str, bits: int, precision: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    probe = leave_adapter(base, tmp_path / "x", precision, bits=bits)
    config = _config(base, precision, method, base_bits=bits)
    report, reasons = check(job_of(tmp_path / "x", base, probe, config))
    assert reasons == [] and report is not None and report.largest_difference <= report.tolerance
    if bits == 4:  # int8 is closer to the weights than its own noise
        assert "log-probabilities differ by" in _reasons(tmp_path / "x", base, probe, _config(base, precision))


@pytest.mark.parametrize(("method", "bits"), [("lora", 16), ("qlora", 4)])
def test_a_magnitude_that_never_moved_is_named(base: Path, tmp_path: Path, method: str, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    config = _config(base, "bf16", method, base_bits=bits)
    probe = leave_adapter(base, tmp_path / "x", "bf16", bits=bits, use_dora=True)
    name = f"{Q_0}.lora_magnitude_vector"
    before = _magnitudes_before_training(base, tmp_path / "x", bits)[name]
    _edited(tmp_path / "x", lambda tensors: tensors.update({name: before}))
    assert f"1 of 28 parts are exactly as in the base: {name}." in _reasons(tmp_path / "x", base, probe, config)


def _magnitudes_before_training(base: Path, adapter: Path, bits: int) -> dict[str, torch.Tensor]:
    """Of an adapter trained for no step at all, which PEFT itself saves."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=torch.bfloat16) if bits == 4 else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    fresh = get_peft_model(model, LoraConfig.from_pretrained(adapter))
    return {
        name.replace(".default.weight", ""): parameter.detach().float()
        for name, parameter in fresh.named_parameters()
        if "magnitude" in name
    }


def test_a_bias_that_never_moved_or_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    probe = leave_adapter(base, tmp_path / "x", "fp32", bias="all")
    name, before = f"{Q_0}.base_layer.bias", load_file(base / "model.safetensors")
    _edited(tmp_path / "x", lambda t: t.update({name: before["model.layers.0.self_attn.q_proj.bias"]}))
    assert f"1 of 22 parts are exactly as in the base: {name}." in _reasons(tmp_path / "x", base, probe, _config(base))
    _edited(tmp_path / "x", lambda t: t.pop(name))
    assert f"1 tensors are missing: {name}" in _reasons(tmp_path / "x", base, probe, _config(base))
    _edited(tmp_path / "x", lambda t: t.update({"base_model.model.model.layers.9.bias": torch.ones(2)}))
    assert "1 tensors belong to nothing in the base: base_model.model.model.layers.9.bias." in _reasons(
        tmp_path / "x", base, probe, _config(base)
    )


@pytest.mark.parametrize("options", ["plain", "dora", "bias"])
def test_an_adapter_that_went_on_from_another_must_differ_from_that_one(
    base: Path, tmp_path: Path, options: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = leave_adapter(base, first, "fp32", **OPTIONS[options])
    probe = leave_adapter(base, second, "fp32", start=first)
    config, parts = _config(base, init_from=str(first)), NUM_PARTS.get(options, 14)
    report, reasons = check(job_of(second, base, probe, config, first))
    assert reasons == [] and report is not None and report.alive == report.total == parts
    said = _reasons(first, base, before, config, first)
    assert f"{parts} of {parts} parts are exactly as in the adapter that training began with" in said
    _edited(
        second, lambda t: t.update({n: v for n, v in load_file(first / _WEIGHTS).items() if n.startswith(Q_0 + ".l")})
    )
    stuck = 2 if options == "dora" else 1
    assert f"{stuck} of {parts} parts are exactly as in the adapter" in _reasons(second, base, probe, config, first)


def _published(
    home: str,
    base: Path,
    adapter: Path,
    *,
    method: str = "lora",
    run: str = "",
    template: str | None = None,
    **options: Any,
) -> Manifest:
    config = _config(base, method=method, **options).model_dump(mode="json", by_alias=True)
    config["model"]["chat_template"] = template
    draft = ManifestDraft(
        method=method,
        base_model=str(base),
        base_digest=resolve_base_model(str(base), adapter.parent / "digests").digest,
        base_bits=options.get("base_bits", 4 if method == "qlora" else 16),
        renderer_digest=load_renderer(base, Path(template).read_text() if template else None).digest,
        rank=4,
        alpha=8.0,
        config=config,
        run=run,
    )
    return Registry(home).publish("tickets", adapter, draft)


def _in_bfloat16(base: Path) -> Path:
    """The base as most are published: all weights in bfloat16, but for one norm."""
    tensors = {
        n: t if n == "model.norm.weight" else t.bfloat16() for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return base


@pytest.mark.parametrize("options", OPTIONS)
def test_a_merged_model_answers_as_the_adapter_on_its_base(
    base: Path, tmp_path: Path, settings: Settings, options: str
) -> None:
    leave_adapter(base, tmp_path / "x", "fp32", **OPTIONS[options])
    adapter = _published(settings.home, base, tmp_path / "x")
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    merged = merge(ModelRef.parse("tickets@1"), "tickets-merged", settings, data=str(rows))
    record = merged.merged_from
    assert (merged.ref, merged.kind, merged.rank, merged.base_digest) == (
        "tickets-merged@1",
        "full",
        0,
        adapter.base_digest,
    )
    assert record is not None and (record.adapter, record.digest) == ("tickets@1", adapter.digest)
    assert (
        record.kl_mean < 1e-6 and record.kl_max < 1e-5
    )  # what float32's rounding of log-probabilities leaves of nothing
    assert record.tokens > 100 and record.data == str(rows)
    assert merged.metrics == {"merge/kl_mean": record.kl_mean, "merge/kl_max": record.kl_max}


def test_the_merged_model_is_stored_as_its_base_and_what_no_update_touches_is_the_base_bit_for_bit(
    tmp_path: Path, settings: Settings
) -> None:
    base = _in_bfloat16(save_base(tmp_path / "base"))
    leave_adapter(base, tmp_path / "x", "bf16")
    _published(settings.home, base, tmp_path / "x")
    merged = merge(
        ModelRef.parse("tickets@1"), "merged", settings, data=str(write_rows(tmp_path / "rows.jsonl", 8)), max_kl=0.01
    )
    record = merged.merged_from
    assert record is not None and 1e-6 < record.kl_mean < 0.01  # rounding to bfloat16
    path = resolve_base_model("merged@1", settings.cache, home=settings.home).path
    before, after = load_file(base / "model.safetensors"), load_file(path / "model.safetensors")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_an_update_that_rounds_badly_is_refused_with_its_figures_and_nothing_is_published(
    tmp_path: Path, settings: Settings
) -> None:
    base = _in_bfloat16(save_base(tmp_path / "base"))
    leave_adapter(base, tmp_path / "x", "bf16")
    _published(settings.home, base, tmp_path / "x")
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    with pytest.raises(
        ModelError, match=r"KL\(adapter \|\| merged\) is \S+ nats per token, at most .* wanted 1e-09 or less"
    ):
        merge(ModelRef.parse("tickets@1"), "merged", settings, data=rows, max_kl=1e-9)
    assert Registry(settings.home).models() == ["tickets"]
    assert Registry(settings.home).unfinished() == []
    assert not list(settings.cache.glob("merging-*"))


def test_an_adapter_of_a_quantised_base_is_merged_into_the_unquantised_one_and_says_what_that_costs(
    base: Path, tmp_path: Path, settings: Settings
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'loray[quant]'")
    leave_adapter(base, tmp_path / "x", "fp32", bits=4)
    _published(settings.home, base, tmp_path / "x", method="qlora")
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    with pytest.raises(ModelError, match="trained on a base in 4 bits and merged into the unquantised one"):
        merge(ModelRef.parse("tickets@1"), "merged", settings, data=rows, max_kl=1e-4)
    merged = merge(ModelRef.parse("tickets@1"), "merged", settings, data=rows, max_kl=10)
    assert merged.base_bits == 4 and merged.merged_from is not None and merged.merged_from.kl_mean > 1e-4
    assert "what quantisation had changed" in " ".join(summary(merged))
    before = load_file(base / "model.safetensors")
    path = resolve_base_model("merged@1", settings.cache, home=settings.home).path
    expected = before["model.layers.0.self_attn.q_proj.weight"] + _update(tmp_path / "x", Q_0)
    assert torch.allclose(
        load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-6
    )


def _update(adapter: Path, module: str) -> torch.Tensor:
    """alpha / r B A, LoRA's equation 3."""
    tensors = load_file(adapter / _WEIGHTS)
    return 8 / 4 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def test_rows_come_from_the_adapters_run_while_it_is_there(base: Path, tmp_path: Path, settings: Settings) -> None:
    run, job = make_job(write_run_file(tmp_path / "run", base), settings)
    run.set_state(RunState.RUNNING, train_digest=job.train_digest, eval_digest=job.eval_digest)
    leave_adapter(base, tmp_path / "x", "fp32")
    _published(settings.home, base, tmp_path / "x", run=run.id)
    merged = merge(ModelRef.parse("tickets@1"), "merged", settings)
    assert merged.merged_from is not None and merged.merged_from.data == f"evaluation data of {run.id}"
    assert merged.run == run.id
    _published(settings.home, base, tmp_path / "x", run="20200101-000000-gone-0000")
    with pytest.raises(ConfigError, match="Give a data file: --data FILE"):
        merge(ModelRef.parse("tickets@2"), "merged", settings)


def test_a_template_of_its_own_goes_into_the_merged_model(base: Path, tmp_path: Path, settings: Settings) -> None:
    template = tmp_path / "template.jinja"
    template.write_text((base / "chat_template.jinja").read_text().replace("<|im_end|>", " <|im_end|>"))
    leave_adapter(base, tmp_path / "x", "fp32")
    adapter = _published(settings.home, base, tmp_path / "x", template=str(template))
    merge(ModelRef.parse("tickets@1"), "merged", settings, data=str(write_rows(tmp_path / "rows.jsonl", 8)))
    path = resolve_base_model("merged@1", settings.cache, home=settings.home).path
    assert load_renderer(path).digest == adapter.renderer_digest != load_renderer(base).digest


def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, settings: Settings
) -> None:
    leave_adapter(base, tmp_path / "x", "fp32")
    _published(settings.home, base, tmp_path / "x")
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    with pytest.raises(ConfigError, match="names a version or alias"):
        merge(ModelRef.parse("tickets@1"), "merged@3", settings, data=rows)
    merge(ModelRef.parse("tickets@1"), "merged", settings, data=rows)
    with pytest.raises(ModelError, match="merged@1 is a full model: there is nothing to merge"):
        merge(ModelRef.parse("merged@1"), "twice", settings, data=rows)
    foreign = Registry(settings.home).manifest(ModelRef.parse("tickets@1")).model_copy(update={"base_digest": "f" * 64})
    draft = ManifestDraft(**{k: v for k, v in foreign.model_dump().items() if k in ManifestDraft.model_fields})
    Registry(settings.home).publish("foreign", tmp_path / "x", draft)
    with pytest.raises(ModelError, match="Restore the base it was trained on"):
        merge(ModelRef.parse("foreign@1"), "merged", settings, data=rows)


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # importing ray.serve 2.60
def test_the_command_merges_publishes_and_the_result_is_trained_and_served_on(
    base: Path, tmp_path: Path, home: str
) -> None:
    from serve.app import prepare  # here, because importing ray.serve warns, and only a test may let it

    settings = Settings(home, tmp_path / "cache")
    leave_adapter(base, tmp_path / "x", "fp32")
    adapter = _published(home, base, tmp_path / "x")
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    command = ["models", "merge", "tickets@1", "--publish", "tickets-merged", "--data", rows]
    said = json.loads(_loray(settings, *command, "--json"))
    assert (said["ref"], said["kind"], said["merged_from"]["digest"]) == ("tickets-merged@1", "full", adapter.digest)
    printed = _loray(settings, *command)
    assert "KL(adapter || merged)" in printed and "Published tickets-merged@2" in printed
    shown = _loray(settings, "models", "show", "tickets-merged@1")
    assert "full" in shown and "merged_from" in shown and "rank" not in shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAY_HOME", home)
        _, job = make_job(write_run_file(tmp_path / "run", Path("tickets-merged@1")), settings)
        served = prepare(ServeConfig.model_validate({"model": "tickets-merged@1"}), settings)
    assert (
        job.base_digest
        == served.base.digest
        == resolve_base_model("tickets-merged@1", settings.cache, home=home).digest
    )
    assert served.base.renderer_digest == adapter.renderer_digest


def test_a_published_full_model_answers_with_its_own_weights_beside_its_base(
    base: Path, tmp_path: Path, settings: Settings
) -> None:
    leave_full(base, tmp_path / "x", "fp32", lr=0.1)
    draft = ManifestDraft(
        kind="full",
        method="full",
        base_model=str(base),
        base_digest=resolve_base_model(str(base), settings.cache).digest,
        renderer_digest=load_renderer(base).digest,
        config=_config(base, method="full").model_dump(mode="json", by_alias=True),
    )
    Registry(settings.home).publish("whole", tmp_path / "x", draft)
    found = compare(ModelRef.parse("whole@1"), str(write_rows(tmp_path / "rows.jsonl", 3)), settings)
    length = max(len(row.reference()) for row in found.rows) * 3 // 2 + 16
    renderer = load_renderer(base)
    for directory, answers in ((base, found.base_answers), (tmp_path / "x", found.tuned_answers)):
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for row, answer in zip(found.rows, answers, strict=True):
            prompt = torch.tensor([renderer.prompt_ids(row.prompt())])
            ids = model.generate(prompt, max_new_tokens=length, do_sample=False)[0, prompt.shape[1] :]
            assert answer == renderer.tokenizer.decode(ids, skip_special_tokens=True)
    assert found.base_answers != found.tuned_answers


def _loray(settings: Settings, *arguments: str) -> str:
    environ = {**os.environ, "LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache)}
    code = "from service.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout
