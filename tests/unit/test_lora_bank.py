"""The bank: exact for every token whatever the mixture, columns as pages, and tokens that never reach each other."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from service.errors import ConflictError, NotFoundError
from service.inference.adapter_files import LoraTensors
from service.inference.linear_group import LinearGroup
from service.inference.lora_bank import LoraBank
from service.inference.products import Joined, Packed, Plain, Way, Ways, fastest, joining_pays

LAYER = "model.layers.0."
Q, K, V, OUT = (f"{LAYER}self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down"))
GROUPS = [[Q, K, V], [OUT], [GATE, UP], [DOWN]]
SIZES = {Q: (16, 16), K: (16, 8), V: (16, 8), OUT: (16, 16), GATE: (16, 24), UP: (16, 24), DOWN: (24, 16)}
# What is multiplied, and whether the adapters' second product is joined with the base's (on a CPU, in bfloat16 only).
FORMS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def _model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


class _Joining(Ways):
    """Joins whether it pays or not."""

    def way(self, weight_OI: torch.Tensor) -> Way:
        return Packed

    def joins(self, weight_OI: torch.Tensor, num_columns: int) -> bool:
        return True


class _Apart(Ways):
    """Never joins, also where that would pay just now."""

    def joins(self, weight_OI: torch.Tensor, num_columns: int) -> bool:
        return False


def _bank(
    max_columns: int, dtype: torch.dtype = torch.float32, *, joined: bool = False
) -> tuple[LoraBank, LlamaForCausalLM]:
    model = _model(dtype)
    return LoraBank(model, max_columns, GROUPS, (_Joining if joined else _Apart)(rows=4)), model


def _adapter(
    rank: int, names: tuple[str, ...] = tuple(SIZES), dtype: torch.dtype = torch.float32
) -> Mapping[str, LoraTensors]:
    return {
        name: LoraTensors(torch.randn(rank, SIZES[name][0]).to(dtype), torch.randn(rank, SIZES[name][1]).to(dtype))
        for name in names
    }


def _outputs(model: nn.Module, x: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every linear layer's output for the input of its width, in the order in which a forward calls them."""
    return {name: model.get_submodule(name)(x[SIZES[name][0]]) for name in SIZES}


def _inputs(count: int, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    return {width: torch.randn(1, count, width).to(dtype) for width in (16, 24)}


@pytest.mark.parametrize(("dtype", "joined"), FORMS)
@torch.inference_mode()
def test_every_token_gets_its_own_adapter_and_base_tokens_are_untouched(dtype: torch.dtype, joined: bool) -> None:
    (bank, model), x = _bank(16, dtype, joined=joined), _inputs(4, dtype)
    base = _outputs(_model(dtype), x)
    adapters = {"a": _adapter(2, dtype=dtype), "b": _adapter(5, (UP, K), dtype), "c": _adapter(3, dtype=dtype)}
    for digest, tensors in adapters.items():
        bank.install(digest, tensors)()
    assert bank.is_apart is joined
    bank.join(60.0)
    assert not bank.is_apart
    assert all(group.columns and (group.columns.joined is not None) is joined for group in bank.groups)
    owners: list[str | None] = ["c", None, "b", "a"]
    bank.select(owners)
    seen = _outputs(model, x)
    rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (0.02, 0.1)
    for name, (width, _) in SIZES.items():
        for token, owner in enumerate(owners):
            expected = base[name][0, token].float()
            if owner and name in adapters[owner]:
                pair = adapters[owner][name]
                expected = expected + x[width][0, token].float() @ pair.a_RI.float().T @ pair.b_RO.float()
            torch.testing.assert_close(seen[name][0, token].float(), expected, rtol=rtol, atol=atol)


@torch.inference_mode()
def test_an_adapter_takes_any_free_columns_and_old_numbers_in_them_are_gone() -> None:
    (bank, model), x = _bank(8), _inputs(2)
    for digest, rank in (("a", 2), ("b", 3), ("c", 2)):
        bank.install(digest, _adapter(rank))()
    bank.remove("a")
    narrow = _adapter(3, (Q,))  # where it has no matrices, the columns of `a` must not show
    bank.install("d", narrow)()
    assert [column for column, owner in enumerate(bank.owner) if owner == bank.owner[0]] == [0, 1, 7]
    bank.select([None, "d"])
    seen, base = _outputs(model, x), _outputs(_model(), x)
    for name in SIZES:
        expected = base[name].clone()
        if name == Q:
            expected[0, 1] += x[16][0, 1] @ narrow[Q].a_RI.T @ narrow[Q].b_RO
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "joined"), FORMS)
@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_what_a_token_gets_does_not_depend_on_what_the_others_hold(seed: int, dtype: torch.dtype, joined: bool) -> None:
    """Bit for bit: other inputs with NaN, infinities and overflow, other owners, and other adapters in other columns."""
    draw, (bank, model) = random.Random(seed), _bank(24, dtype, joined=joined)
    torch.manual_seed(seed)
    wild = _adapter(3, dtype=dtype)
    wild = {name: LoraTensors(pair.a_RI * 1e37, pair.b_RO * 1e37) for name, pair in wild.items()}
    adapters = {"mine": _adapter(4, dtype=dtype), "wild": wild, "other": _adapter(5, dtype=dtype)}
    for digest in draw.sample(list(adapters), 3):
        bank.install(digest, adapters[digest])()
    bank.join(60.0)
    mine, count = draw.randrange(6), 6
    x = _inputs(count, dtype)
    for owner in ("mine", None):
        seen = []
        for _ in range(4):
            owners = [draw.choice([None, *adapters]) for _ in range(count)]
            owners[mine] = owner
            others = {width: torch.randn_like(values) for width, values in x.items()}
            for values in others.values():
                values[0, draw.randrange(count)] = draw.choice([float("nan"), float("inf"), 1e38])
            for width, values in x.items():
                others[width][0, mine] = values[0, mine]
            bank.select([None if one is None else str(one) for one in owners])
            seen.append({name: output[0, mine] for name, output in _outputs(model, others).items()})
        for name in SIZES:
            assert seen[0][name].isfinite().all()
            assert all(torch.equal(one[name], seen[0][name]) for one in seen), name


@torch.inference_mode()
def test_a_removed_adapter_frees_its_columns_and_trimming_computes_no_more_than_are_used() -> None:
    (bank, model), x = _bank(8), _inputs(1)
    bank.install("a", _adapter(2))()
    bank.install("b", _adapter(5))()
    bank.select(["a"])
    before = _outputs(model, x)
    bank.remove("b")
    assert bank.free_columns == 6 and list(bank.adapters()) == ["a"] and bank.used == 2
    for _ in range(2):
        bank.select(["a"])
        after = _outputs(model, x)
        for name in SIZES:
            torch.testing.assert_close(after[name], before[name])
        bank.trim()()
    bank.remove("a")
    bank.trim()()
    assert all(group.columns is None for group in bank.groups)
    bank.select([None])
    base = _outputs(_model(), x)
    for name, output in _outputs(model, x).items():
        torch.testing.assert_close(output, base[name])


@torch.inference_mode()
def test_nothing_changes_before_an_adapter_is_taken_over() -> None:
    (bank, model), x = _bank(8), _inputs(1)
    bank.install("a", _adapter(2))()
    bank.select(["a"])
    before = _outputs(model, x)
    finish = bank.install("b", _adapter(5))
    assert list(bank.adapters()) == ["a"] and bank.free_columns == 6
    during = _outputs(model, x)
    assert all(torch.equal(during[name], before[name]) for name in SIZES)
    assert finish().num_columns == 5
    assert bank.free_columns == 1


@torch.inference_mode()
def test_members_of_a_group_called_with_different_inputs_are_right_too() -> None:
    bank, model = _bank(4)
    bank.install("a", _adapter(2))()
    bank.select(["a"])
    first, second = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    q, k = model.get_submodule(Q), model.get_submodule(K)
    expected = q(first), k(second)
    assert torch.equal(k(second), expected[1]) and torch.equal(q(first), expected[0])
    mixed = q(first), k(second), k(first), q(second)
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], expected[1])


def test_too_little_room_is_a_conflict_that_changes_nothing() -> None:
    bank, _ = _bank(8)
    bank.install("a", _adapter(5))()
    with pytest.raises(ConflictError, match="needs 4 columns, 3 free"):
        bank.install("b", _adapter(4))
    assert bank.free_columns == 3 and list(bank.adapters()) == ["a"]


def test_removing_what_is_not_resident_names_what_is() -> None:
    bank, _ = _bank(8)
    bank.install("a", _adapter(1))()
    with pytest.raises(NotFoundError, match=r"b is not resident\. Resident: a"):
        bank.remove("b")


@torch.inference_mode()
def test_an_adapter_that_is_taken_over_in_part_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (bank, model), x = _bank(8), _inputs(2)
    bank.install("a", _adapter(2))()
    bank.select(["a", None])
    before = _outputs(model, x)
    finish = bank.install("b", _adapter(5))
    with monkeypatch.context() as patch:
        real = LinearGroup.__setattr__

        def fails(group: LinearGroup, name: str, value: object) -> None:
            if group is bank.groups[2] and name == "columns":
                patch.undo()
                raise RuntimeError("no memory left")
            real(group, name, value)

        patch.setattr(LinearGroup, "__setattr__", fails)
        with pytest.raises(RuntimeError, match="no memory left"):
            finish()
    assert list(bank.adapters()) == ["a"] and bank.free_columns == 6
    bank.select(["a", None])
    after = _outputs(model, x)
    assert all(torch.equal(after[name], before[name]) for name in SIZES)
    bank.install("b", _adapter(5))()
    assert bank.free_columns == 1


@torch.inference_mode()
def test_a_packed_product_is_the_plain_one_up_to_rounding() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 64).bfloat16(), torch.randn(40).bfloat16()
    plain, packed = Plain(weight, bias), Packed(weight, bias, rows=4)
    for rows in (1, 4, 50):
        x, y = torch.randn(1, rows, 64).bfloat16(), torch.randn(1, rows, 40).bfloat16()
        torch.testing.assert_close(packed(x), plain(x), rtol=0.02, atol=0.1)
        added = Plain(weight).add(x, y.clone())
        torch.testing.assert_close(Packed(weight, rows=4).add(x, y.clone()), added, rtol=0.02, atol=0.1)


@torch.inference_mode()
def test_products_are_joined_only_where_that_is_right_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 64).bfloat16()
    monkeypatch.setattr("service.inference.products._is_faster", lambda *_, **__: True)
    if not joining_pays(weight, 24, rows=4):
        pytest.skip("this processor rounds joined products otherwise: they stay apart here")
    assert not joining_pays(weight, 0, rows=4)
    assert not joining_pays(torch.zeros(4096, 4096, dtype=torch.bfloat16), 24, rows=4)  # held twice, for nothing
    real = Joined.__call__
    for wrong in (
        lambda self, x, h: real(self, x, h) * 1.01,  # rows without adapter
        lambda self, x, h: real(self, x, -h),  # rows with one
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Joined, "__call__", wrong)
            assert not joining_pays(weight, 24, rows=4)

    def refuses(*_: object) -> torch.Tensor:
        raise RuntimeError("no such layout")

    with monkeypatch.context() as patch:
        patch.setattr(Joined, "__call__", refuses)
        assert not joining_pays(weight, 24, rows=4)
    monkeypatch.setattr("service.inference.products._is_faster", lambda *_, **__: False)
    assert not joining_pays(weight, 24, rows=4)


@torch.inference_mode()
def test_joined_products_come_apart_when_another_adapter_is_taken_over() -> None:
    (bank, model), x = _bank(8, torch.bfloat16, joined=True), _inputs(2, torch.bfloat16)
    bank.install("a", _adapter(2, dtype=torch.bfloat16))()
    bank.join(60.0)
    bank.select(["a", None])
    joined = _outputs(model, x)
    bank.install("b", _adapter(3, dtype=torch.bfloat16))()
    assert bank.is_apart
    bank.select(["a", None])
    for name, apart in _outputs(model, x).items():
        torch.testing.assert_close(apart, joined[name], rtol=0.02, atol=0.1)
    bank.join(0.0)
    assert bank.is_apart, "no time was given"


def test_float32_and_other_devices_keep_pytorchs_own_product() -> None:
    assert fastest(torch.zeros(8, 8), rows=4) is Plain
    assert Ways(rows=4).way(torch.zeros(8, 8, device="meta", dtype=torch.bfloat16)) is Plain
