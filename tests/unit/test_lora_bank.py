"""The bank: exact for every row whatever the mixture, columns as pages, and rows that never reach each other."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.errors import ConflictError, NotFoundError
from service.inference.adapter_files import LoraTensors
from service.inference.lora_bank import LoraBank

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _adapter(rank: int, names: tuple[str, ...] = (Q, UP)) -> dict[str, LoraTensors]:
    outs = {Q: 16, UP: 24}
    return {name: LoraTensors(torch.randn(rank, 16), torch.randn(rank, outs[name])) for name in names}


def _delta(x: torch.Tensor, adapter: Mapping[str, LoraTensors], name: str) -> torch.Tensor:
    return x @ adapter[name].a_RI.T @ adapter[name].b_RO


@torch.inference_mode()
def test_every_row_gets_its_own_adapter_and_base_rows_are_untouched(model: LlamaForCausalLM) -> None:
    bank, x = LoraBank(model, max_columns=16), torch.randn(4, 1, 16)
    adapters = {"a": _adapter(2), "b": _adapter(5, (UP,)), "c": _adapter(3)}
    base = {name: bank.modules[name](x) for name in (Q, UP)}
    for digest, tensors in adapters.items():
        bank.install(digest, tensors)
    rows: list[str | None] = ["c", None, "b", "a"]
    bank.select(rows)
    for name in (Q, UP):
        y = bank.modules[name](x)
        for row, wanted in enumerate(rows):
            expected = base[name][row].clone()
            if wanted and name in adapters[wanted]:
                expected += _delta(x[row], adapters[wanted], name)
            torch.testing.assert_close(y[row], expected)
        assert torch.equal(y[1], base[name][1])


@torch.inference_mode()
def test_an_adapter_takes_any_free_columns(model: LlamaForCausalLM) -> None:
    bank, x = LoraBank(model, max_columns=8), torch.randn(2, 1, 16)
    for digest, rank in (("a", 2), ("b", 3), ("c", 2)):
        bank.install(digest, _adapter(rank))
    bank.remove("a")
    wide = _adapter(3)
    bank.install("d", wide)
    assert [column for column, owner in enumerate(bank.owner) if owner == bank.owner[0]] == [0, 1, 7]
    bank.select([None, "d"])
    y = bank.modules[Q](x)
    weight = bank.modules[Q].weight
    torch.testing.assert_close(y[0], x[0] @ weight.T)
    torch.testing.assert_close(y[1], x[1] @ weight.T + _delta(x[1], wide, Q))


@torch.inference_mode()
def test_overflow_in_one_row_does_not_reach_another(model: LlamaForCausalLM) -> None:
    bank, x = LoraBank(model, max_columns=8), torch.randn(3, 1, 16)
    mild, wild = _adapter(2), _adapter(2)
    wild = {name: LoraTensors(pair.a_RI * 1e38, pair.b_RO * 1e38) for name, pair in wild.items()}
    bank.install("mild", mild)
    bank.select(["mild", None, None])
    alone = bank.modules[Q](x)
    bank.install("wild", wild)
    bank.select(["mild", "wild", None])
    mixed = bank.modules[Q](x)
    assert not mixed[1].isfinite().all()
    assert torch.equal(mixed[2], alone[2])
    torch.testing.assert_close(mixed[0], alone[0])


@torch.inference_mode()
def test_a_removed_adapter_leaves_zeros_and_free_columns(model: LlamaForCausalLM) -> None:
    bank = LoraBank(model, max_columns=8)
    bank.install("a", _adapter(5))
    assert bank.free_columns == 3
    bank.remove("a")
    assert bank.free_columns == 8 and bank.adapters() == {} and bank.used == 0
    for module in bank.modules.values():
        for tensor in (module._a_RI, module._b_RO):
            assert tensor is None or not tensor.any()


def test_too_little_room_is_a_conflict_that_changes_nothing(model: LlamaForCausalLM) -> None:
    bank = LoraBank(model, max_columns=8)
    bank.install("a", _adapter(5))
    with pytest.raises(ConflictError, match="needs 4 columns, 3 free"):
        bank.install("b", _adapter(4))
    assert bank.free_columns == 3 and list(bank.adapters()) == ["a"]


def test_removing_what_is_not_resident_names_what_is(model: LlamaForCausalLM) -> None:
    bank = LoraBank(model, max_columns=8)
    bank.install("a", _adapter(1))
    with pytest.raises(NotFoundError, match=r"b is not resident\. Resident: a"):
        bank.remove("b")


def test_the_output_head_carries_no_adapter(model: LlamaForCausalLM) -> None:
    assert "lm_head" not in LoraBank(model, max_columns=8).shapes
