"""y = x W^T + b for a weight that never changes, in the fastest of the ways there are here: `fastest` and `joining_pays`.

`Plain` is PyTorch's own linear. `Packed` holds the weight in oneDNN's blocked layout for a CPU, as PyTorch's compiler
would: SmolLM2-135M's linears over 16 rows in bfloat16 on two cores took 14 ms a step for 22. `Joined` adds a second
product without a second call, which takes 12 microseconds however little there is to do. Shapes: I inputs, O outputs, R
columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch
from torch.nn import functional

_REPEATS = 9
_MARGIN = 0.95  # another way must take at most this share of the time to be chosen
_JOINED_BYTES = 8 << 20  # a larger weight is read for so long that a call more is nothing, and is not held twice


class Product(Protocol):
    """One weight [O, I], and what is done with it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + x W^T; y [..., O] may be written over, and is not to be used afterwards."""


class Plain:
    """PyTorch's linear; the weight is used where it lies."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, rows: int = 1) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight_OI, self._bias_O)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y.view(-1, y.shape[-1]).addmm_(x.view(-1, x.shape[-1]), self._weight_OI.t())
        return y


class Packed:
    """A copy in oneDNN's layout, best for about `rows` rows at a time and right for any number."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, rows: int = 1) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)
        self._bias_O = bias_O

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias_O, "none", [], "")  # type: ignore[no-any-return]

    def joined(self, b_OR: torch.Tensor, rows: int) -> Joined:
        """This product and one with B, in one."""
        weight_OI: torch.Tensor = self._weight.to_dense()
        return Joined(Packed(torch.cat([weight_OI, b_OR], dim=1), self._bias_O, rows=rows))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, self._weight, None, "add")  # type: ignore[no-any-return]


class Joined:
    """x W^T + b + h B^T as one product, of [x, h] with [W | B]: rounded once."""

    def __init__(self, product: Packed) -> None:
        self._product = product

    def __call__(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """x [..., I], h [..., R] -> [..., O]."""
        return self._product(torch.cat([x, h], dim=-1))


Way = type[Plain] | type[Packed]


class Ways:
    """The fastest way for each shape, measured once; `rows` is how many rows a step usually has."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._chosen: dict[tuple[int, ...], Way] = {}
        self._joins: dict[tuple[int, ...], bool] = {}

    def way(self, weight_OI: torch.Tensor) -> Way:
        """`Plain` or `Packed` for a weight of this shape; the caller may drop the weight if the answer is `Packed`."""
        shape = tuple(weight_OI.shape)
        if shape not in self._chosen:
            self._chosen[shape] = fastest(weight_OI, self.rows)
        return self._chosen[shape]

    def product(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Product:
        """The product with this weight, that way."""
        return self.way(weight_OI)(weight_OI, bias_O, rows=self.rows)

    def joins(self, weight_OI: torch.Tensor, num_columns: int) -> bool:
        """Whether so many columns are best added in the product with a weight of this shape."""
        shape = (*weight_OI.shape, num_columns)
        if shape not in self._joins:
            self._joins[shape] = self.way(weight_OI) is Packed and joining_pays(weight_OI, num_columns, self.rows)
        return self._joins[shape]


def fastest(weight_OI: torch.Tensor, rows: int) -> Way:
    """Which way to multiply `rows` rows by a weight of this shape, type and device."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not _can_pack():
        return Plain
    x = torch.zeros(1, rows, weight_OI.shape[1], dtype=weight_OI.dtype)
    plain, packed = Plain(weight_OI, rows=rows), Packed(weight_OI, rows=rows)
    return Packed if _is_faster(lambda: packed(x), than=lambda: plain(x)) else Plain


def joining_pays(weight_OI: torch.Tensor, num_columns: int, rows: int) -> bool:
    """Whether one product with [W | B] is right and faster than one with W and one with B after it. It costs a second copy
    of W. Right: rows without adapter get the very bits that the product with W gives them, whatever the number of rows or
    of columns; others what the two products give, but for rounding."""
    if not num_columns or weight_OI.nbytes > _JOINED_BYTES:
        return False
    outs, ins = weight_OI.shape
    seeded = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=seeded).to(weight_OI.dtype)

    b_OR = random(outs, num_columns)
    try:
        base, b = Packed(weight_OI, rows=rows), Packed(b_OR, rows=rows)
        joined, with_few = base.joined(b_OR, rows), base.joined(random(outs, 3), rows)
        for count in (rows, 1, 7 * rows + 1):
            x, h = random(1, count, ins), random(1, count, num_columns)
            expected, nothing = base(x), torch.zeros_like(h)
            same = torch.equal(joined(x, nothing), expected) and torch.equal(with_few(x, nothing[..., :3]), expected)
            apart = b.add(h, expected).float()
            if not (same and torch.allclose(joined(x, h).float(), apart, rtol=0.02, atol=0.02 * float(apart.std()))):
                return False
    except RuntimeError:  # another PyTorch lays weights out otherwise
        return False
    x, h = random(1, rows, ins), random(1, rows, num_columns)
    return _is_faster(lambda: joined(x, h), than=lambda: b.add(h, base(x)))


def _is_faster(work: Callable[[], object], *, than: Callable[[], object]) -> bool:
    """By a margin, in the median of calls in turn."""
    times = [(_seconds(work), _seconds(than)) for _ in range(_REPEATS)]
    return median(mine for mine, _ in times) < _MARGIN * median(theirs for _, theirs in times)


def _can_pack() -> bool:
    """Whether this PyTorch has oneDNN's products, which are no documented interface: tried on numbers known before."""
    try:
        weight, x = torch.eye(16, dtype=torch.bfloat16) * 2, torch.ones(1, 3, 16, dtype=torch.bfloat16)
        product = Packed(weight, torch.ones(16, dtype=torch.bfloat16), rows=3)
        y = product(x)
        return bool((y == 3).all() and (Packed(weight, rows=3).add(x, y) == 5).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
