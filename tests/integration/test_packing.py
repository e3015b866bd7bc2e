"""Examples that share a sequence are trained as if each stood alone: by model family, by attention, through whole runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from service.config import BatchBlock, LoraBlock
from service.data.planner import make_plan, micro_batches, share_of_rank
from service.training.methods.lora import apply_lora
from service.training.objectives.attention import BY_EXAMPLE, SHORT
from service.training.objectives.sft import SupervisedLoss, TokenArrays, collate

VOCABULARY = 96
CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
LLAMA = COMMON | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 8, "head_dim": 8}  # shorter than the examples
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
BERT = COMMON | {"intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 256}

KEEP_APART = {
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "mistral with a window": MistralConfig(**LLAMA, **WINDOW),
    "phi3": Phi3Config(**LLAMA),
    "gemma2": Gemma2Config(**LLAMA, **WINDOW),
    "gemma3": Gemma3TextConfig(**LLAMA, **WINDOW),
    "gpt2": GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "cohere": CohereConfig(**LLAMA),
    "granite": GraniteConfig(**LLAMA, logits_scaling=3.0),
}
LEAK = {
    "encoder": (BertConfig(**BERT), "BertLMHeadModel"),
    "state space": (MambaConfig(**COMMON, state_size=4), "takes no position ids"),
    "convolution": (Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]), "sees the one before it"),
}


def _model(config: Any, attention: str = "sdpa") -> Any:
    if attention == "sdpa" and isinstance(config, Gemma2Config | MambaConfig):
        attention = "eager"  # transformers has no other for these
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _examples(*lengths: int, seed: int = 0) -> list[TokenArrays]:
    """Random ids, the second half trained."""
    draw = np.random.Generator(np.random.PCG64(seed))
    return [
        (draw.integers(0, VOCABULARY, n, dtype=np.int32), (np.arange(n) >= n // 2).astype(np.uint8)) for n in lengths
    ]


def _log_probs_and_gradients(
    objective: SupervisedLoss, packs: Sequence[Sequence[TokenArrays]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    objective.model.zero_grad()
    batches = (
        [collate([pack], CPU) for pack in packs] if all(len(pack) == 1 for pack in packs) else [collate(packs, CPU)]
    )
    for batch in batches:
        objective(batch).backward()
    gradients = {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}
    return torch.cat([objective.log_probs(batch) for batch in batches]), gradients


def _assert_packed_is_alone(objective: SupervisedLoss) -> None:
    a, b, c, d = _examples(30, 41, 17, 2)
    alone, wanted = _log_probs_and_gradients(objective, [[a], [b], [d], [c]])
    packed, ours = _log_probs_and_gradients(objective, [[a, b, d], [c]])
    torch.testing.assert_close(packed, alone, rtol=0.0, atol=1e-5)
    assert ours.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=0.0, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", KEEP_APART)
def test_a_packed_example_has_the_log_probabilities_and_gradients_of_itself_alone(family: str, attention: str) -> None:
    objective = SupervisedLoss(_model(KEEP_APART[family], attention))
    _assert_packed_is_alone(objective)  # as transformers finds packing: by a mask from the positions
    assert objective.probe_packing(_examples(30, 41, 17)) is None
    _assert_packed_is_alone(objective)  # as the probe has chosen


@pytest.mark.parametrize("family", LEAK)
def test_a_model_that_does_not_keep_examples_apart_is_refused_with_the_reason(family: str) -> None:
    config, reason = LEAK[family]
    for attention in ("sdpa", "eager"):
        found = SupervisedLoss(_model(config, attention)).probe_packing(_examples(30, 41, 17))
        assert found is not None and reason in found


def test_a_model_that_ignores_positions_is_refused() -> None:
    """Examples would be kept apart, but each would begin where the last one ended."""

    class Ignoring(type(_model(KEEP_APART["gpt2"]).transformer.wpe)):  # type: ignore[misc]
        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(torch.arange(positions.shape[-1]).expand_as(positions))
            return result

    model = _model(KEEP_APART["gpt2"])
    model.transformer.wpe.__class__ = Ignoring
    reason = SupervisedLoss(model).probe_packing(_examples(30, 41, 17))
    assert reason is not None and "differs from itself alone" in reason


def test_one_example_is_enough_to_probe_and_long_ones_are_cut() -> None:
    objective = SupervisedLoss(_model(KEEP_APART["llama"]))
    assert objective.probe_packing(_examples(30)) is None
    assert objective.probe_packing(_examples(2, 5000)) is None  # positions end at 256


def test_a_model_that_gives_nan_is_not_packed() -> None:
    model = _model(KEEP_APART["llama"])
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    reason = SupervisedLoss(model).probe_packing(_examples(9, 9))
    assert reason is not None and "not finite" in reason


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_attention_by_example_is_chosen_on_a_cpu_and_changes_no_bit_of_an_example(family: str) -> None:
    model = _model(KEEP_APART[family])
    objective = SupervisedLoss(model)
    examples = _examples(30, 41, SHORT + 20)

    def alone() -> torch.Tensor:
        return torch.cat([objective.log_probs(collate([[example]], CPU)) for example in examples])

    before = alone()
    assert objective.probe_packing(examples) is None
    assert model.config._attn_implementation == BY_EXAMPLE
    packed = objective.log_probs(collate([examples], CPU))
    assert torch.equal(packed, alone())
    torch.testing.assert_close(packed, before, rtol=0.0, atol=1e-5)
    assert torch.equal(packed[-len(examples[-1][0]) // 2 :], before[-len(examples[-1][0]) // 2 :])  # no short one
    plain = [objective.plain_log_probs(collate([[example]], CPU)) for example in examples]
    assert torch.equal(torch.cat(plain), before)


def test_a_window_shorter_than_examples_keeps_its_mask() -> None:
    model = _model(KEEP_APART["mistral with a window"])
    assert SupervisedLoss(model).probe_packing(_examples(30, 41, 17)) is None
    assert model.config._attn_implementation == "sdpa"


def test_a_probed_model_still_generates_the_same_from_padded_prompts(tmp_path: Any) -> None:
    """And what is saved says nothing of how it was trained."""
    model = _model(KEEP_APART["llama"])
    prompts = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = model.generate(prompts, **options)
    assert SupervisedLoss(model).probe_packing(_examples(30, 41, 17)) is None
    assert torch.equal(model.generate(prompts, **options), before)
    model.save_pretrained(tmp_path)
    assert BY_EXAMPLE not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("packed_attention", ["sdpa", BY_EXAMPLE])
def test_activation_checkpointing_computes_the_same_packed_gradients(packed_attention: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _model(KEEP_APART["llama"])
        objective = SupervisedLoss(model)
        assert objective.probe_packing(_examples(30, 41, 17)) is None
        model.set_attn_implementation(packed_attention)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        gradients.append(_log_probs_and_gradients(objective, [_examples(30, 41), _examples(17, 20)])[1])
    for name, wanted in gradients[0].items():
        assert torch.equal(gradients[1][name], wanted), name


def test_flash_attention_finds_exactly_our_examples() -> None:
    """It takes packing from the positions of a single sequence only, so packs go to it one behind the other."""
    a, b, c = _examples(5, 3, 4)
    batch = collate([[a, b], [c]], CPU)
    assert batch.positions_BT is not None
    assert not _is_packed_sequence(batch.positions_BT, batch_size=2)  # two rows: it would attend across examples
    flat = batch.positions_BT.reshape(1, -1)
    assert _is_packed_sequence(flat, batch_size=1)
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(flat)
    assert bounds.tolist() == [0, 5, 8, 12, 16] and int(longest) == 5  # the last four are padding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_passes_the_probe_under_autocast(dtype: torch.dtype) -> None:
    model = apply_lora(_model(KEEP_APART["llama"]).to(dtype), LoraBlock(r=4), seed=0).eval()
    with torch.autocast("cpu", dtype=dtype):
        assert SupervisedLoss(model).probe_packing(_examples(30, 41, 17)) is None


def _plain_losses(model: Any, steps: Sequence[Sequence[TokenArrays]]) -> list[float]:
    """The oracle: one example at a time, all logits, plain PyTorch; loss per trained token of the step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for examples in steps:
        total, count = torch.zeros(()), 0
        for ids, mask in examples:
            tokens, trained = torch.from_numpy(ids).long(), torch.from_numpy(mask).bool()
            logits = model(input_ids=tokens[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits[trained[1:]], tokens[1:][trained[1:]], reduction="sum"
            )
            count += int(trained[1:].sum())
        optimizer.zero_grad()
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()) / count)
    return losses


@pytest.fixture(scope="module")
def data() -> list[TokenArrays]:
    """40 examples of 4 to 60 tokens."""
    draw = np.random.Generator(np.random.PCG64(9))
    return _examples(*draw.integers(4, 60, 40).tolist(), seed=10)


@pytest.mark.parametrize("batch", [BatchBlock(rows=10), BatchBlock(tokens=256)], ids=["rows", "tokens"])
def test_losses_of_a_run_do_not_depend_on_packing_micro_batch_or_workers(
    data: list[TokenArrays], batch: BatchBlock
) -> None:
    lengths = np.array([len(ids) for ids, _ in data])
    plan = make_plan(lengths, batch, capacity=64, epochs=2, seed=1, max_steps=None)
    steps = [plan.rows(step).tolist() for step in range(plan.num_steps)]
    wanted = _plain_losses(_model(KEEP_APART["llama"]), [[data[row] for row in rows] for rows in steps])
    for capacity, micro, world in ((None, 4, 1), (64, 1, 1), (64, 3, 2), (None, 2, 3)):
        model = _model(KEEP_APART["llama"])
        objective = SupervisedLoss(model)
        assert objective.probe_packing(data[:3]) is None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for rows in steps:
            supervised = sum(int(data[row][1][1:].sum()) for row in rows)
            total = 0.0
            optimizer.zero_grad()
            for packs in _turns(rows, lengths, micro, capacity, world):
                loss = objective(collate([[data[row] for row in pack] for pack in packs], CPU))
                (loss / supervised).backward()
                total += loss.item()
            optimizer.step()
            losses.append(total / supervised)
        assert losses == pytest.approx(wanted, rel=1e-4)  # the same sums in another order, over two epochs of updates


def _turns(
    rows: list[int], lengths: np.ndarray[Any, Any], micro: int, capacity: int | None, world: int
) -> Iterator[list[list[int]]]:
    """All workers' micro-batches, one worker after the other."""
    cut = micro_batches(rows, lengths, micro=micro, capacity=capacity, world_size=world)
    for rank in range(world):
        for index in share_of_rank(cut, lengths, rank, world):
            if index is not None:
                yield cut[index]
