"""The supervised loss against the textbook one, and the heads that make it take the model's own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from service.config import LoraBlock
from service.training.methods.lora import apply_lora
from service.training.objectives.sft import CHUNK, Batch, SupervisedLoss, TokenArrays, collate

VOCABULARY = 24
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, **options)).to(dtype).eval()


def _example(draw: np.random.Generator, length: int, trained: int | None = None) -> TokenArrays:
    """Random ids; `trained` random positions, never the first, else about half."""
    mask = np.zeros(length, dtype=np.uint8)
    mask[1 + draw.permutation(length - 1)[: length // 2 if trained is None else trained]] = 1
    return draw.integers(0, VOCABULARY, length, dtype=np.int32), mask


def _examples(*lengths: int, seed: int = 0) -> list[TokenArrays]:
    draw = np.random.Generator(np.random.PCG64(seed))
    return [_example(draw, length) for length in lengths]


def _dense(model: Any, batch: Batch) -> torch.Tensor:
    """-log p of each supervised token, summed, from all logits: the definition."""
    logits_BTV = model(input_ids=batch.ids_BT).logits
    log_p = logits_BTV[:, :-1].log_softmax(-1).gather(-1, batch.ids_BT[:, 1:, None])[..., 0]
    loss: torch.Tensor = -(log_p * batch.trained_BT[:, 1:]).sum()
    return loss


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("head_is_trained", [True, False])
def test_loss_and_gradients_are_the_dense_ones_over_every_chunk_border(trained: int, head_is_trained: bool) -> None:
    model = _llama()
    model.lm_head.weight.requires_grad_(head_is_trained)
    draw = np.random.Generator(np.random.PCG64(trained))
    each = [len(part) for part in np.array_split(np.arange(trained), 5)]
    batch = collate([_example(draw, 480, count) for count in each], CPU)
    assert len(batch.targets_N) == trained
    objective = SupervisedLoss(model)
    loss, dense = objective.loss_sum(batch), _dense(model, batch)
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-4)  # float32 sums in another order
    ours, wanted = _gradients(model, loss * 0.25), _gradients(model, dense * 0.25)
    assert ours.keys() == wanted.keys() and ("lm_head.weight" in ours) == head_is_trained
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=1e-3 * float(wanted[name].abs().max()))
    torch.testing.assert_close(-objective.log_probs(batch).sum(), dense.detach(), rtol=1e-5, atol=1e-4)


def test_the_loss_is_right_against_float64() -> None:
    model = _llama(torch.float64)
    batch = collate(_examples(40, 17, 33), CPU)
    loss, exact = SupervisedLoss(model).loss_sum(batch), _dense(model, batch)
    assert abs(loss.item() / exact.item() - 1) < 1e-6  # logits are taken in float32
    ours, wanted = _gradients(model, loss), _gradients(model, exact)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()))


def test_padding_changes_no_loss() -> None:
    objective = SupervisedLoss(_llama())
    examples = _examples(9, 60, 23, 2)
    together = objective.loss_sum(collate(examples, CPU))
    alone = torch.stack([objective.loss_sum(collate([example], CPU)) for example in examples]).sum()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_padding_stands_on_the_right_and_is_not_trained() -> None:
    short, long = _examples(3, 7)
    batch = collate([short, long], CPU)
    assert batch.ids_BT[0].tolist() == [*short[0].tolist(), 0, 0, 0, 0]
    assert not batch.trained_BT[0, 3:].any()


def test_a_first_token_is_never_a_target() -> None:
    objective = SupervisedLoss(_llama())
    ((ids, mask),) = _examples(12)
    marked = mask.copy()
    marked[0] = 1
    with_first, without = collate([(ids, marked)], CPU), collate([(ids, mask)], CPU)
    assert with_first.targets_N.tolist() == without.targets_N.tolist() == ids[mask.astype(bool)].tolist()
    assert torch.equal(objective.loss_sum(with_first), objective.loss_sum(without))


def test_only_supervised_tokens_count() -> None:
    """Changing the last token, untrained and seen by nobody, changes nothing; a trained one does."""
    objective = SupervisedLoss(_llama())
    ids = np.arange(8, dtype=np.int32)
    mask = np.array([0, 0, 0, 1, 1, 1, 1, 0], dtype=np.uint8)
    losses = []
    for place in (None, 7, 6):
        changed = ids.copy()
        if place is not None:
            changed[place] = 20
        losses.append(objective.loss_sum(collate([(changed, mask)], CPU)).item())
    assert losses[0] == losses[1] != losses[2]


def test_a_plain_head_is_probed_and_takes_the_fast_road() -> None:
    model = apply_lora(_llama(), LoraBlock(type="lora", r=2), seed=0)
    objective = SupervisedLoss(model)
    assert objective.probe(collate(_examples(20, 31), CPU), 1e-4) <= 1e-4
    assert not objective.own_forward


def _special_heads() -> list[Any]:
    torch.manual_seed(0)
    phi = {name: value for name, value in SIZES.items() if name != "tie_word_embeddings"}
    return [
        Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
        GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
        PhiForCausalLM(PhiConfig(**phi)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["soft-capped", "scaled", "with a bias"])
def test_a_head_that_does_more_is_found_and_its_own_forward_taken(which: int) -> None:
    model = _special_heads()[which].eval()
    if which == 2:
        torch.nn.init.normal_(model.lm_head.bias)
    objective = SupervisedLoss(model)
    batch = collate(_examples(20, 31), CPU)
    difference = objective.probe(batch, 1e-4)
    assert objective.own_forward and (difference > 0.01 or which == 2)
    torch.testing.assert_close(objective.loss_sum(batch), _dense(model, batch), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(-objective.log_probs(batch).sum(), _dense(model, batch).detach(), rtol=1e-5, atol=1e-4)


def test_a_model_that_gives_nan_never_passes_the_probe() -> None:
    model = _llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    objective = SupervisedLoss(model)
    objective.probe(collate(_examples(9), CPU), 1e-4)
    assert objective.own_forward
