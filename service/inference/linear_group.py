"""Linear layers that see the same input, computed as one: q, k and v; gate and up. Small models wait for calls, not bytes.

The members stay where transformers' code calls them. The first one called computes the outputs of all, the others find
theirs; with adapters, the A matrices of all members are one product too, and so are the B matrices (block-diagonal, so
that a member's columns reach its own outputs only). Where that is faster, the B product is later joined with the base's.
`lora_bank.py` owns the columns and says which row may see which.

Shapes: I inputs, O outputs of all members together, M members, R columns; row r * M + m of A and B is column r of member m.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from service.inference.products import Joined, Packed, Plain, Product, Way, Ways

if TYPE_CHECKING:
    from service.inference.adapter_files import LoraTensors
    from service.inference.lora_bank import LoraBank


_USUAL_COLUMNS = 64  # for which it is measured whether to join


@dataclass(frozen=True)
class Columns:
    """What a group adds for the resident adapters: products with A [R * M, I] and with B [O, R * M].

    `joined` does what the base's product and `b` do, once there has been time to make it.
    """

    count: int  # R
    a: Product
    b: Product
    joined: Joined | None = None


class LinearGroup:
    """The base product of the members and the columns of their adapters. `names` are the members' in the model."""

    def __init__(self, linears: Mapping[str, nn.Linear], bank: LoraBank, ways: Ways) -> None:
        self.names = list(linears)
        members = list(linears.values())
        self.in_features = members[0].in_features
        outs = [member.out_features for member in members]
        ends = list(itertools.accumulate(outs))
        self.spans = [slice(end - out, end) for out, end in zip(outs, ends, strict=True)]
        self.out_features = ends[-1]
        self._bank, self._rows = bank, ways.rows
        self._own: list[nn.Linear] = []
        self._base: Product | None = None
        self._way: Way = Plain
        self._joins = False
        if all(type(member) is nn.Linear for member in members):
            weight = torch.cat([member.weight for member in members])
            self._way = ways.way(weight)
            self._base = self._way(weight, _joined_bias(members), rows=ways.rows)
            self._joins = ways.joins(weight, min(bank.max_columns, _USUAL_COLUMNS) * len(members))
        else:  # quantised: each keeps its own product
            self._own = members
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None
        self.columns: Columns | None = None  # replaced as a whole, between two steps
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def output(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """One member's output for x [1, N, I]; those of the others are kept until they are asked for."""
        if x is not self._input or self._outputs[member] is None:
            self._input, self._outputs = x, list(self._compute(x))
        output = self._outputs[member]
        assert output is not None
        self._outputs[member] = None
        if not any(left is not None for left in self._outputs):
            self._input = None
        return output

    def _compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        columns, closed = self.columns, self._bank.closed(len(self.names))
        if columns is None or closed is None:
            y = self._without(x)
        else:
            h = columns.a(x).masked_fill_(closed, 0.0)
            y = columns.joined(x, h) if columns.joined else columns.b.add(h, self._without(x))
        if len(self.spans) == 1:
            return (y,)
        return [y[..., span] for span in self.spans]

    def _without(self, x: torch.Tensor) -> torch.Tensor:
        return self._base(x) if self._base else torch.cat([member(x) for member in self._own], dim=-1)

    @property
    def is_apart(self) -> bool:
        """Whether `join` would change anything."""
        return self._joins and self.columns is not None and self.columns.joined is None

    def join(self) -> None:
        """Have one product for the base and the columns that are computed, between two steps.

        Columns that are being written meanwhile are nobody's: whatever is copied of them is selected by no row.
        """
        if self.columns is not None and isinstance(self._base, Packed) and self._b is not None:
            b_OR = self._b[: self.columns.count * len(self.names)].t()
            self.columns = replace(self.columns, joined=self._base.joined(b_OR, self._rows))

    def with_columns(
        self,
        max_columns: int,
        used: int,
        cleared: Sequence[int],
        written: Mapping[str, tuple[Sequence[int], LoraTensors]],
    ) -> Callable[[], None]:
        """Prepare other columns beside the running steps; calling the answer, between two steps, takes them over.

        The `cleared` columns become zero, then those of `written` (by the member's name) take their tensors. A step
        computes the first `used`.
        """
        mine = {self.names.index(name): page for name, page in written.items() if name in self.names}
        if self._a is None and not mine:
            return lambda: None
        members = len(self.names)
        if self._a is None or self._b is None:
            dtype, device = self._bank.place
            self._a = torch.zeros(max_columns * members, self.in_features, dtype=dtype, device=device)
            self._b = torch.zeros(max_columns * members, self.out_features, dtype=dtype, device=device)
        a, b = self._a, self._b

        def rows_of(columns: Sequence[int], some: Iterable[int]) -> torch.Tensor:
            return torch.tensor([column * members + member for column in columns for member in some], device=a.device)

        emptied = rows_of(cleared, range(members)) if cleared else None
        pages = [
            (rows_of(columns, [member]), self.spans[member], pair.a_RI.to(a.device), pair.b_RO.to(b.device))
            for member, (columns, pair) in mine.items()
        ]

        def write() -> None:
            if emptied is not None:
                a[emptied], b[emptied] = 0, 0
            for rows, span, a_RI, b_RO in pages:
                a[rows] = a_RI
                b[rows, span] = b_RO

        def read() -> Columns | None:
            rows = used * members
            a_RI, b_OR = a[:rows], b[:rows].t()
            if not used:
                return None
            return Columns(used, self._way(a_RI, rows=self._rows), self._way(b_OR, rows=self._rows))

        if self._way is Packed:  # the running steps read copies
            write()
            columns = read()
            return lambda: setattr(self, "columns", columns)

        @torch.inference_mode()
        def write_and_read() -> None:
            write()
            self.columns = read()

        return write_and_read


class GroupedLinear(nn.Module):
    """Stands in the model for one member."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self._group, self._member = (group,), member  # in a tuple: it is no part of this module
        span = group.spans[member]
        self.in_features, self.out_features = group.in_features, span.stop - span.start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, N, in] -> [1, N, out], every token with the adapter that `LoraBank.select` gave it."""
        return self._group[0].output(x, self._member)


def _joined_bias(members: Sequence[Any]) -> torch.Tensor | None:
    if all(member.bias is None for member in members):
        return None
    return torch.cat(
        [member.weight.new_zeros(member.out_features) if member.bias is None else member.bias for member in members]
    )
