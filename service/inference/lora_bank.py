"""Many LoRA adapters over one base model, any mixture of them in one batch, by masked concatenation.

The matrices of all resident adapters are concatenated along the rank: R columns, of which an adapter of rank r owns any
r free ones; the owner vector is the page table. For the tokens of a step,

    h = where(owner[column] == slot[token], x @ A_cat^T, 0);  y += h @ B_cat

Two dense products whatever the mixture, the second in one with the base's where that is faster (`join`). Selected, never multiplied by a mask: NaN and inf of a neighbour would cross
over. Tokens are kept apart by that alone; B is finite (checked in `adapter_files.py`). Columns are zeroed before another
adapter gets them. A step without adapters skips everything. An adapter is written beside the running steps and taken over
between two of them: `install` and `trim` return that last part, and only one thread may be in them. `linear_group.py` has
the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from service.errors import ConflictError, NotFoundError
from service.inference.adapter_files import LoraTensors
from service.inference.engine import AdapterInfo
from service.inference.linear_group import GroupedLinear, LinearGroup
from service.inference.products import Ways

_FREE, _BASE = -1, -2  # owner of a free column; slot of a token without adapter: never equal


def _no_pause(spent_s: float) -> None:
    """Go on at once."""


class LoraBank:
    """Puts itself into the linear layers of a model that `groups` names, and holds the resident adapters.

    Those of a group see the same input. Layers in no group stay as they are and carry no adapter.
    """

    def __init__(
        self, model: PreTrainedModel, max_columns: int, groups: Sequence[Sequence[str]], ways: Ways | None = None
    ) -> None:
        self.max_columns = max_columns
        self.place = (model.dtype, model.device)  # of A and B
        self.shapes: dict[str, tuple[int, int]] = {}  # (in_features, out_features) of every layer that carries adapters
        self.groups: list[LinearGroup] = []
        for names in groups:
            linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}
            self.shapes |= {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
            group = LinearGroup(linears, self, ways or Ways(rows=1))
            self.groups.append(group)
            for member, name in enumerate(names):
                model.set_submodule(name, GroupedLinear(group, member))
        self.owner = [_FREE] * max_columns
        self.changed_at = time.monotonic()  # when an adapter last came or went
        self._apart: list[LinearGroup] = []  # what is left to join
        self._computed = 0  # columns that a step computes: those used, and those freed since the last change
        self._slots: dict[str, int] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._selected: tuple[str | None, ...] = ()
        self._closed: dict[int, torch.Tensor] | None = None  # by members of a group; None: no token has an adapter

    @property
    def free_columns(self) -> int:
        """Columns that no adapter owns."""
        return self.owner.count(_FREE)

    @property
    def used(self) -> int:
        """Columns beyond this one are free; they are not computed."""
        return max((column + 1 for column, owner in enumerate(self.owner) if owner != _FREE), default=0)

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters."""
        return dict(self._infos)

    @torch.inference_mode()
    def install(
        self, digest: str, tensors: Mapping[str, LoraTensors], breathe: Callable[[float], None] = _no_pause
    ) -> Callable[[], AdapterInfo]:
        """Write checked tensors into free columns; call the answer between two steps and the adapter is resident.

        `breathe` is called after each group with the seconds that it took, and may give the processor to others.
        ConflictError when there are too few columns: nothing has changed then.
        """
        rank = max(len(pair.a_RI) for pair in tensors.values())
        if rank > self.free_columns:
            raise ConflictError(
                f"adapter {digest} needs {rank} columns, {self.free_columns} free: unload another first."
            )
        slot = next(number for number in range(self.max_columns) if number not in self._slots.values())
        columns = [column for column, owner in enumerate(self.owner) if owner == _FREE][:rank]
        used = max(self.used, columns[-1] + 1)
        written = {name: (columns[: len(pair.a_RI)], pair) for name, pair in tensors.items()}
        take_over = self._prepared(used, columns, written, breathe)
        num_bytes = sum(pair.a_RI.nbytes + pair.b_RO.nbytes for pair in tensors.values())

        def finish() -> AdapterInfo:
            self._take_over(take_over, used)
            for column in columns:
                self.owner[column] = slot
            self._slots[digest] = slot
            self._infos[digest] = AdapterInfo(rank=rank, num_columns=rank, bytes=num_bytes)
            return self._infos[digest]

        return finish

    def remove(self, digest: str) -> None:
        """Free an adapter's columns, between two steps. The caller has made sure that nobody uses it."""
        if digest not in self._slots:
            raise NotFoundError(f"adapter {digest} is not resident. Resident: {', '.join(self._infos) or 'none'}.")
        slot = self._slots.pop(digest)
        del self._infos[digest]
        self.owner = [_FREE if owner == slot else owner for owner in self.owner]
        self._forget_selection()

    @torch.inference_mode()
    def trim(self, breathe: Callable[[float], None] = _no_pause) -> Callable[[], None]:
        """Compute no more columns than are used; call the answer between two steps. `breathe` as for `install`."""
        used = self.used
        if used == self._computed:
            return lambda: None
        take_over = self._prepared(used, (), {}, breathe)

        return lambda: self._take_over(take_over, used)

    def _prepared(
        self,
        used: int,
        cleared: Sequence[int],
        written: Mapping[str, tuple[Sequence[int], LoraTensors]],
        breathe: Callable[[float], None],
    ) -> list[Callable[[], None]]:
        take_over = []
        for group in self.groups:
            started = time.perf_counter()
            take_over.append(group.with_columns(self.max_columns, used, cleared, written))
            breathe(time.perf_counter() - started)
        return take_over

    def _take_over(self, changes: Sequence[Callable[[], None]], used: int) -> None:
        """All groups, or none: they must compute the same columns."""
        before = [group.columns for group in self.groups]
        self._forget_selection()
        try:
            for change in changes:
                change()
        except BaseException:
            for group, columns in zip(self.groups, before, strict=True):
                group.columns = columns  # the new columns are nobody's, whatever was written there
            raise
        self._computed = used
        self.changed_at = time.monotonic()
        self._apart = [group for group in self.groups if group.is_apart]

    @property
    def is_apart(self) -> bool:
        """Whether anything is left to join."""
        return bool(self._apart)

    @torch.inference_mode()
    def join(self, for_s: float) -> None:
        """Between two steps: join the products of more groups, for so many seconds and a little.

        An adapter serves before that, with the products apart: they are made in a third of the time.
        """
        until = time.perf_counter() + for_s
        while self._apart and time.perf_counter() < until:
            self._apart.pop().join()

    def _forget_selection(self) -> None:
        self._selected, self._closed = (), None

    @torch.inference_mode()
    def select(self, adapters: Sequence[str | None]) -> None:
        """Say which adapter each token of the next forward has. Most steps ask for what the last one had."""
        wanted = tuple(adapters)
        if wanted == self._selected:
            return
        self._forget_selection()  # so that nothing half-made is taken for `wanted` if this fails
        if any(wanted):
            slots = [_BASE if digest is None else self._slots[digest] for digest in wanted]
            device = self.place[1]
            owner_R = torch.tensor(self.owner[: self._computed], device=device)
            closed_NR = owner_R != torch.tensor(slots, device=device)[:, None]
            members = {len(group.names) for group in self.groups}
            self._closed = {count: closed_NR.repeat_interleave(count, dim=1)[None] for count in members}
        self._selected = wanted

    def closed(self, members: int) -> torch.Tensor | None:
        """True where a token may not see a column, [1, N, R * members]; None: no token has an adapter."""
        return None if self._closed is None else self._closed[members]
