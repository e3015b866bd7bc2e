"""y = x W^T + b for a weight that never changes, in the fastest of the ways there are here: the rule is `fastest`.

`Plain` is PyTorch's own linear. `Packed` holds the weight in oneDNN's blocked layout for a CPU, as PyTorch's compiler
would: SmolLM2-135M's linears over 16 rows in bfloat16 on two cores took 14 ms a step for 22. Shapes: I inputs, O outputs.
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

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, self._weight, None, "add")  # type: ignore[no-any-return]


Way = type[Plain] | type[Packed]


class Ways:
    """The fastest way for each shape, measured once; `rows` is how many rows a step usually has."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._chosen: dict[tuple[int, ...], Way] = {}

    def way(self, weight_OI: torch.Tensor) -> Way:
        """`Plain` or `Packed` for a weight of this shape; the caller may drop the weight if the answer is `Packed`."""
        shape = tuple(weight_OI.shape)
        if shape not in self._chosen:
            self._chosen[shape] = fastest(weight_OI, self.rows)
        return self._chosen[shape]

    def product(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Product:
        """The product with this weight, that way."""
        return self.way(weight_OI)(weight_OI, bias_O, rows=self.rows)


def fastest(weight_OI: torch.Tensor, rows: int) -> Way:
    """Which way to multiply `rows` rows by a weight of this shape, type and device."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.bfloat16 or not _can_pack():
        return Plain
    x = torch.zeros(1, rows, weight_OI.shape[1], dtype=weight_OI.dtype)
    products: dict[Way, Product] = {way: way(weight_OI, rows=rows) for way in (Plain, Packed)}
    times: dict[Way, list[float]] = {way: [] for way in products}
    for _ in range(_REPEATS):
        for way, product in products.items():
            times[way].append(_seconds(lambda product=product: product(x)))  # type: ignore[misc]
    return Packed if median(times[Packed]) < _MARGIN * median(times[Plain]) else Plain


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
