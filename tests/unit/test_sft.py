"""The supervised loss against the textbook one, examples that share a sequence, and heads of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from service.config import LoraBlock
from service.training.methods.lora import apply_lora
from service.training.objectives.head import CHUNK, Head, LogitShape
from service.training.objectives.sft import Batch, SupervisedLoss, TokenArrays, collate

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
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **options})).to(dtype).eval()


def _padded(examples: Sequence[TokenArrays]) -> Batch:
    """An example a sequence."""
    return collate([[example] for example in examples], CPU)


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


def _assert_close(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], of_largest: float) -> None:
    """Each within a share of its tensor's largest entry."""
    assert ours.keys() == wanted.keys()
    for name in wanted:
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(ours[name], wanted[name], rtol=0.0, atol=of_largest * largest)


SIZE = CHUNK["cpu"]


@pytest.mark.parametrize("trained", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 3])
@pytest.mark.parametrize("head_is_trained", [True, False])
def test_loss_and_gradients_are_the_dense_ones_over_every_chunk_border(trained: int, head_is_trained: bool) -> None:
    model = _llama()
    model.lm_head.weight.requires_grad_(head_is_trained)
    draw = np.random.Generator(np.random.PCG64(trained))
    each = [len(part) for part in np.array_split(np.arange(trained), 5)]
    batch = _padded([_example(draw, 480, count) for count in each])
    assert len(batch.targets_N) == trained
    objective = SupervisedLoss(model)
    loss, dense = objective(batch), _dense(model, batch)
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=1e-5)
    ours, wanted = _gradients(model, loss * 0.25), _gradients(model, dense * 0.25)
    assert ("lm_head.weight" in ours) == head_is_trained
    _assert_close(ours, wanted, 1e-5)  # float32 sums in another order
    torch.testing.assert_close(-objective.log_probs(batch).sum(), dense.detach(), rtol=1e-6, atol=1e-5)


def _dense_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shape: LogitShape) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight) * shape.scale
    if shape.cap:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _head_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(700, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(500, 32, generator=generator).mul(0.4).to(dtype))
    return hidden, weight, torch.randint(0, 500, (700,), generator=generator)


SHAPES = [LogitShape(), LogitShape(scale=0.25), LogitShape(cap=3.0), LogitShape(scale=2.0, cap=5.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "scaled", "soft-capped", "both"])
def test_the_chunked_head_is_the_dense_one_to_a_millionth_in_float32(shape: LogitShape) -> None:
    hidden, weight, targets = _head_case(torch.float32)
    exact = _dense_head(hidden.double(), weight.double(), targets, shape)
    wanted = torch.autograd.grad(exact, (hidden, weight))
    loss = Head(weight, shape)(hidden, targets, True)
    got = torch.autograd.grad(loss, (hidden, weight))
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    _assert_close(dict(enumerate(got)), dict(enumerate(wanted)), 1e-6)  # type: ignore[arg-type]
    log_p = Head(weight, shape)(hidden, targets, False)
    assert log_p.shape == (700,) and abs(-log_p.sum().item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "scaled", "soft-capped", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_chunked_head_is_no_further_from_float64_than_the_dense_one(
    dtype: torch.dtype, shape: LogitShape
) -> None:
    hidden, weight, targets = _head_case(torch.float32)
    exact = torch.autograd.grad(_dense_head(hidden.double(), weight.double(), targets, shape), (hidden, weight))
    scale = (
        1024.0 if dtype == torch.float16 else 1.0
    )  # as a loss scale does; the dense gradients would underflow without
    with torch.autocast("cpu", dtype=dtype):
        dense = torch.autograd.grad(_dense_head(hidden, weight, targets, shape) * scale, (hidden, weight))
        ours = torch.autograd.grad(Head(weight, shape)(hidden, targets, True) * scale, (hidden, weight))
    for got, usual, wanted in zip(ours, dense, exact, strict=True):
        assert got.dtype == torch.float32
        errors = [float((gradient / scale - wanted).norm() / wanted.norm()) for gradient in (got, usual)]
        assert errors[0] < 1.05 * errors[1] and errors[0] < 0.02, errors


def test_a_scaled_loss_scales_bfloat16_gradients_without_rounding_the_scale() -> None:
    """1.2305 is 1.2266 in bfloat16: gradients scaled by that would be 0.3 % off, all in one direction."""
    hidden, weight, targets = _head_case(torch.bfloat16)
    (plain,) = torch.autograd.grad(Head(weight, LogitShape())(hidden, targets, True), hidden)
    (scaled,) = torch.autograd.grad(Head(weight, LogitShape())(hidden, targets, True) * 1.2305, hidden)
    assert abs(float(scaled.float().norm() / plain.float().norm()) / 1.2305 - 1) < 5e-4


def test_logits_of_all_positions_never_stand_in_memory() -> None:
    hidden, weight, targets = _head_case(torch.float32)
    seen: list[int] = []
    with _Allocations(seen):
        Head(weight, LogitShape(cap=3.0))(hidden, targets, True).backward()
        Head(weight, LogitShape(cap=3.0))(hidden, targets, False)
    assert max(seen) == SIZE * 500 < 700 * 500


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its class hooks untyped
    """Collects the number of elements of every tensor that an operation gives."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [
            t.numel() for t in (result if isinstance(result, tuple | list) else [result]) if hasattr(t, "numel")
        ]
        return result


def test_the_objective_adds_no_parameter_and_shares_the_heads() -> None:
    """So an optimizer or ZeRO over the objective's parameters has each weight once."""
    for tied in (True, False):
        model = _llama(tie_word_embeddings=tied)
        objective = SupervisedLoss(model)
        assert objective.head is not None and objective.head.weight is model.lm_head.weight
        assert [id(p) for p in objective.parameters()] == [id(p) for p in model.parameters()]
        assert [name for name, _ in objective.named_children()] == ["model", "head"]


def test_the_loss_is_right_against_float64() -> None:
    model = _llama(torch.float64)
    batch = _padded(_examples(40, 17, 33))
    loss, exact = SupervisedLoss(model)(batch), _dense(model, batch)
    assert abs(loss.item() / exact.item() - 1) < 1e-6  # logits are taken in float32
    _assert_close(_gradients(model, loss), _gradients(model, exact), 1e-5)


def test_padding_changes_no_loss() -> None:
    objective = SupervisedLoss(_llama())
    examples = _examples(9, 60, 23, 2)
    together = objective(_padded(examples))
    alone = torch.stack([objective(_padded([example])) for example in examples]).sum()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_padding_stands_on_the_right_and_is_not_trained() -> None:
    short, long = _examples(3, 7)
    batch = _padded([short, long])
    assert batch.ids_BT[0].tolist() == [*short[0].tolist(), 0, 0, 0, 0]
    assert not batch.trained_BT[0, 3:].any()


def test_a_first_token_is_never_a_target() -> None:
    objective = SupervisedLoss(_llama())
    ((ids, mask),) = _examples(12)
    marked = mask.copy()
    marked[0] = 1
    with_first, without = _padded([(ids, marked)]), _padded([(ids, mask)])
    assert with_first.targets_N.tolist() == without.targets_N.tolist() == ids[mask.astype(bool)].tolist()
    assert torch.equal(objective(with_first), objective(without))


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
        losses.append(objective(_padded([(changed, mask)])).item())
    assert losses[0] == losses[1] != losses[2]


def test_a_plain_head_is_probed_and_takes_the_fast_road() -> None:
    model = apply_lora(_llama(), LoraBlock(type="lora", r=2), seed=0)
    objective = SupervisedLoss(model)
    assert objective.probe_head(_padded(_examples(20, 31)), 1e-4) <= 1e-4
    assert not objective.own_forward


def _special_heads() -> dict[str, Any]:
    torch.manual_seed(0)
    phi = {name: value for name, value in SIZES.items() if name != "tie_word_embeddings"}
    return {
        "soft-capped": Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
        "multiplied": CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
        "divided": GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
        "with a bias": PhiForCausalLM(PhiConfig(**phi)),
        "multiplied where others divide": HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SIZES, logits_scaling=4.0)),
    }


@pytest.mark.parametrize("which", ["soft-capped", "multiplied", "divided"])
def test_scaled_and_soft_capped_heads_take_the_fast_road(which: str) -> None:
    model = _special_heads()[which].eval()
    objective = SupervisedLoss(model)
    batch = _padded(_examples(20, 31))
    assert objective.probe_head(batch, 1e-4) <= 1e-4 and not objective.own_forward
    plain = -Head(model.get_output_embeddings().weight, LogitShape())(
        model.get_decoder()(input_ids=batch.ids_BT).last_hidden_state[:, :-1][batch.trained_BT[:, 1:]],
        batch.targets_N,
        False,
    ).sum()
    loss, dense = objective(batch), _dense(model, batch)
    assert abs(plain - dense) > 1.0  # the shape matters here
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=1e-5)
    _assert_close(_gradients(model, loss), _gradients(model, dense), 1e-5)


@pytest.mark.parametrize("which", ["with a bias", "multiplied where others divide"])
def test_a_head_that_does_more_is_found_and_its_own_forward_taken(which: str) -> None:
    model = _special_heads()[which].eval()
    if which == "with a bias":
        torch.nn.init.normal_(model.lm_head.bias)
    objective = SupervisedLoss(model)
    batch = _padded(_examples(20, 31))
    difference = objective.probe_head(batch, 1e-4)
    assert objective.own_forward and (difference > 0.01 or which == "with a bias")
    torch.testing.assert_close(objective(batch), _dense(model, batch), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(-objective.log_probs(batch).sum(), _dense(model, batch).detach(), rtol=1e-5, atol=1e-4)


def test_a_model_that_gives_nan_never_passes_the_probe() -> None:
    model = _llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    objective = SupervisedLoss(model)
    objective.probe_head(_padded(_examples(9)), 1e-4)
    assert objective.own_forward


def test_positions_begin_again_with_every_example_and_with_the_padding() -> None:
    a, b, c = _examples(3, 4, 2)
    batch = collate([[a, b], [c]], CPU)
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.ids_BT.tolist() == [[*a[0].tolist(), *b[0].tolist()], [*c[0].tolist(), 0, 0, 0, 0, 0]]
    assert collate([[a], [c]], CPU).positions_BT is None


def test_collating_holds_every_token_and_its_mask_once_whatever_the_packs() -> None:
    draw = np.random.Generator(np.random.PCG64(7))
    for _ in range(50):
        examples = [_example(draw, int(draw.integers(1, 30)), trained=0) for _ in range(int(draw.integers(1, 20)))]
        examples = [(ids, draw.integers(0, 2, len(ids), dtype=np.uint8)) for ids, _ in examples]
        bounds = sorted({0, len(examples), *draw.integers(0, len(examples), 4).tolist()})
        packs = [examples[a:b] for a, b in pairwise(bounds)]
        batch = collate(packs, CPU)
        for row, pack in enumerate(packs):
            ids = np.concatenate([ids for ids, _ in pack])
            mask = np.concatenate([[0, *mask[1:]] for _, mask in pack]).astype(bool)  # never an example's first token
            assert batch.ids_BT[row].tolist() == [*ids.tolist(), *[0] * (batch.ids_BT.shape[1] - len(ids))]
            assert batch.trained_BT[row, : len(ids)].tolist() == mask.tolist()
            assert not batch.trained_BT[row, len(ids) :].any()


def test_an_examples_first_token_is_not_predicted_from_the_example_before() -> None:
    objective = SupervisedLoss(_llama())
    first, (ids, mask) = _examples(9, 12)
    marked = mask.copy()
    marked[0] = 1
    losses = [objective(collate([[first, (ids, m)]], CPU)).item() for m in (mask, marked)]
    assert losses[0] == losses[1]
