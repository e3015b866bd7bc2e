"""Many LoRA adapters over one base model, any mixture of them in one batch, by masked concatenation.

The matrices of all resident adapters are concatenated along the rank: R columns, of which an adapter of rank r owns any
r free ones; the owner vector is the page table. For a batch,

    h = where(owner[column] == slot[row], x @ A_cat^T, 0);  y += h @ B_cat

Two dense products whatever the mixture. Selected, never multiplied by a mask: NaN and inf of a neighbour would cross
over. Rows are kept apart by that alone; B is finite (checked in `adapter_files.py`) and freed columns are zero. A batch
without adapters skips everything. Only one thread may touch a bank, between two steps: `torch_engine.py` sees to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from service.errors import ConflictError, NotFoundError
from service.inference.adapter_files import LoraTensors
from service.inference.engine import AdapterInfo

_FREE, _BASE = -1, -2  # owner of a free column; slot of a row without adapter: never equal


class LoraBank:
    """Puts itself into every `nn.Linear` of a model (the output head excepted) and holds the resident adapters."""

    def __init__(self, model: PreTrainedModel, max_columns: int) -> None:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        self.closed_BTR: torch.Tensor | None = (
            None  # True where a row may not see a column; None: no row has an adapter
        )
        self.max_columns = max_columns
        self.modules: dict[str, BankedLinear] = {}
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not head:
                self.modules[name] = BankedLinear(module, self)
                model.set_submodule(name, self.modules[name])
        weight = next(iter(self.modules.values())).weight if self.modules else torch.zeros(0)
        self.dtype, self.device = weight.dtype, weight.device
        self.owner = [_FREE] * max_columns
        self.used = 0  # columns beyond this one are free; they are not computed
        self._slots: dict[str, int] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._selected: tuple[str | None, ...] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every module that can carry an adapter."""
        return {name: (module.weight.shape[1], module.weight.shape[0]) for name, module in self.modules.items()}

    @property
    def free_columns(self) -> int:
        """Columns that no adapter owns."""
        return self.owner.count(_FREE)

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters."""
        return dict(self._infos)

    @torch.inference_mode()
    def install(self, digest: str, tensors: Mapping[str, LoraTensors]) -> AdapterInfo:
        """Copy checked tensors into free columns. ConflictError when there are too few: nothing has changed then."""
        rank = max(len(pair.a_RI) for pair in tensors.values())
        if rank > self.free_columns:
            raise ConflictError(
                f"adapter {digest} needs {rank} columns, {self.free_columns} free: unload another first."
            )
        for name in tensors:
            self.modules[name].allocate(self.max_columns)
        slot = next(number for number in range(self.max_columns) if number not in self._slots.values())
        columns = [column for column, owner in enumerate(self.owner) if owner == _FREE][:rank]
        for name, pair in tensors.items():
            self.modules[name].write(digest, columns[: len(pair.a_RI)], pair)
        for column in columns:
            self.owner[column] = slot
        self._slots[digest] = slot
        num_bytes = sum(pair.a_RI.nbytes + pair.b_RO.nbytes for pair in tensors.values())
        self._infos[digest] = AdapterInfo(rank=rank, num_columns=rank, bytes=num_bytes)
        self._columns_changed()
        return self._infos[digest]

    @torch.inference_mode()
    def remove(self, digest: str) -> None:
        """Free an adapter's columns and zero them. The caller has made sure that no row uses it."""
        if digest not in self._slots:
            raise NotFoundError(f"adapter {digest} is not resident. Resident: {', '.join(self._infos) or 'none'}.")
        slot = self._slots.pop(digest)
        del self._infos[digest]
        columns = [column for column, owner in enumerate(self.owner) if owner == slot]
        for module in self.modules.values():
            module.clear(digest, columns)
        for column in columns:
            self.owner[column] = _FREE
        self._columns_changed()

    @torch.inference_mode()
    def select(self, adapters: Sequence[str | None]) -> None:
        """Say which adapter each row of the next forward has. Kept while it stays the same: most steps change nothing."""
        wanted = tuple(adapters)
        if wanted == self._selected:
            return
        self._selected, self.closed_BTR = wanted, None
        if any(wanted):
            slots = [_BASE if digest is None else self._slots[digest] for digest in wanted]
            slots_B11 = torch.tensor(slots, device=self.device)[:, None, None]
            self.closed_BTR = torch.tensor(self.owner[: self.used], device=self.device) != slots_B11

    def _columns_changed(self) -> None:
        self.used = max((column + 1 for column, owner in enumerate(self.owner) if owner != _FREE), default=0)
        self._selected, self.closed_BTR = None, None
        for module in self.modules.values():
            module.view_columns(self.used)


class BankedLinear(nn.Module):
    """`nn.Linear` with the same parameters, plus its share of the bank once an adapter targets it."""

    def __init__(self, linear: nn.Linear, bank: LoraBank) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bank = (bank,)  # in a tuple, because nn.Module looks at every attribute that might be a module
        self._users: set[str] = set()
        self._a_RI: torch.Tensor | None = None
        self._b_RO: torch.Tensor | None = None
        self._a_IR = self._b_read_RO = torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> [B, T, out]; every row with the adapter that `LoraBank.select` gave it."""
        y = functional.linear(x, self.weight, self.bias)
        closed_BTR = self._bank[0].closed_BTR
        if closed_BTR is None or not self._users:
            return y
        h_BTR = (x @ self._a_IR).masked_fill_(closed_BTR, 0.0)
        y.view(-1, self.out_features).addmm_(h_BTR.view(-1, h_BTR.shape[-1]), self._b_read_RO)
        return y

    def allocate(self, max_columns: int) -> None:
        """Room for all columns, when the first adapter targets this module."""
        if self._a_RI is None:
            self._a_RI = self.weight.new_zeros(max_columns, self.in_features)
            self._b_RO = self.weight.new_zeros(max_columns, self.out_features)

    def write(self, digest: str, columns: list[int], pair: LoraTensors) -> None:
        """Fill these columns."""
        assert self._a_RI is not None and self._b_RO is not None
        self._a_RI[columns] = pair.a_RI
        self._b_RO[columns] = pair.b_RO
        self._users.add(digest)

    def clear(self, digest: str, columns: list[int]) -> None:
        """Zero these columns."""
        if self._a_RI is not None and self._b_RO is not None:
            self._a_RI[columns] = 0
            self._b_RO[columns] = 0
        self._users.discard(digest)

    def view_columns(self, used: int) -> None:
        """Compute the first `used` columns only."""
        if self._a_RI is not None and self._b_RO is not None:
            self._a_IR, self._b_read_RO = self._a_RI[:used].t(), self._b_RO[:used]
