"""Which bytes are alive, and what they are for, while a training step runs on tensors that hold nothing.

PyTorch's fake tensors have shapes, types, a device and an autograd graph, and no content, so the real model, objective and
optimizer, and DeepSpeed around them, run on them in seconds whatever their size. `LiveBytes` sees every storage come and
go on the way, and so the peak is the step's own: what autograd keeps, autocast's copies, chunks of logits, whichever
kernel attention chooses. What it cannot see is memory that a kernel takes for itself, how an allocator rounds and
fragments, and the process around it. It decides nothing about a run: `memory.py` does, with what is counted here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Bytes = dict[str, int]  # part -> bytes
DtypeOf = Callable[[torch.nn.Parameter], torch.dtype]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its class hook has no annotations
    """Counts the storages that operators return, by the `part` that was current when each was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "buffers"
        self.peak: Bytes = {}
        self._live: Bytes = {}
        self._alive: dict[int, tuple[str, int]] = {}  # by storage: its part and size
        self._watched: dict[int, Any] = {}  # by storage: the weak reference that tells of its end

    @property
    def live(self) -> Bytes:
        """What is alive now, by part."""
        return {part: size for part, size in self._live.items() if size}

    def forget_peak(self) -> None:
        """The peak counts from here."""
        self.peak = self.live

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Inside, what is made belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def assign(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Count these as `part` from now on."""
        for tensor in tensors:
            self._move(tensor.untyped_storage()._cdata, part)

    def alive(self) -> set[int]:
        """Names of the storages alive now, for `assign_since`."""
        return set(self._alive)

    def assign_since(self, before: set[int], part: str) -> None:
        """Count as `part` what was made since `before` and is still alive."""
        for key in self._alive.keys() - before:
            self._move(key, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count what it returns."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:  # `item()`
            return _scalar(args[0])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        self._note_peak(hidden_bytes(func, args))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = (self.part, storage.nbytes())
        self._watched[key] = weakref.ref(storage, lambda _: self._gone(key))
        self._live[self.part] = self._live.get(self.part, 0) + storage.nbytes()

    def _move(self, key: int, part: str) -> None:
        before, size = self._alive[key]
        self._alive[key] = (part, size)
        self._live[before] -= size
        self._live[part] = self._live.get(part, 0) + size

    def _gone(self, key: int) -> None:
        part, size = self._alive.pop(key)
        del self._watched[key]
        self._live[part] -= size

    def _note_peak(self, hidden: int) -> None:
        if sum(self._live.values()) + hidden > sum(self.peak.values()):
            self.peak = self.live
            if hidden:
                self.peak[self.part] = self.peak.get(self.part, 0) + hidden


def _scalar(tensor: torch.Tensor) -> float | bool | int:
    """What `item()` says of a tensor without content: a count of steps is 1, nothing has overflown.

    AdamW divides by what its count of steps gives; DeepSpeed counts gradients that are not finite in a vector of one.
    """
    if tensor.dtype is torch.bool:
        return False
    one = int(tensor.ndim == 0)
    return float(one) if tensor.dtype.is_floating_point else one


def hidden_bytes(func: Any, args: Any) -> int:
    """What an operator takes inside itself beyond what it returns, where that is known and large.

    bitsandbytes' 8-bit update on a CPU turns the gradient, the weight and both moments into float32, with two temporaries
    for the root (backends/cpu/ops.py of 0.50).
    """
    name = func.name() if hasattr(func, "name") else ""
    if name == "bitsandbytes::optimizer_update_8bit_blockwise" and args[1].device.type == "cpu":
        return 6 * 4 * int(args[1].numel())
    return 0


class _Places(list[int]):
    """Stands for the [number, 1] tensor of `nonzero`: `places[:, 0].tolist()`."""

    def __getitem__(self, index: Any) -> Any:
        return self

    def tolist(self) -> list[int]:
        return list(self)


class _KnownContent(TorchFunctionMode):
    """Answers the few questions about content that decide shapes: `x[mask]`, and where packed examples begin."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = 1  # ones in a mask
        self.starts: Sequence[int] = ()  # of packed examples, among all positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
            tensor, mask = args
            index = torch.zeros(self.chosen, dtype=torch.long, device=tensor.device)
            return func(tensor, (index,) * mask.ndim)
        if func is torch.Tensor.nonzero:
            return _Places(self.starts)
        return func(*args, **(kwargs or {}))


class Rehearsal:
    """Inside `with Rehearsal() as it`, new tensors are fake and their bytes are counted in `it.live`."""

    def __init__(self) -> None:
        self.live = LiveBytes()
        self._content = _KnownContent()
        self._stack = ExitStack()

    def __enter__(self) -> Rehearsal:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), self.live, self._content):
            self._stack.enter_context(cast(Any, mode))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def know(self, chosen: int, starts: Sequence[int]) -> None:
        """From here on masks have so many ones, and packed examples begin at these positions."""
        self._content.chosen, self._content.starts = chosen, starts

    def knowing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, for where a backward pass calls it again: PyTorch sets function modes aside there."""

        def called(*args: Any, **options: Any) -> Any:
            with self._content:
                return function(*args, **options)

        return called

    def give_storage(self, model: torch.nn.Module, device: torch.device, dtype_of: DtypeOf) -> None:
        """Put fake tensors on `device` in place of a meta model's. Only inside; tied weights stay tied.

        Parts are `trainable weights` and `frozen weights`; buffers are counted with the frozen ones.
        """
        made: dict[int, torch.nn.Parameter] = {}
        for module in list(model.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = self._parameter(parameter, device, dtype_of(parameter))
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    with self.live.counting_as("frozen weights"):
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)

    def _parameter(self, meta: torch.nn.Parameter, device: torch.device, dtype: torch.dtype) -> torch.nn.Parameter:
        with self.live.counting_as("trainable weights" if meta.requires_grad else "frozen weights"):
            content = torch.empty(meta.shape, dtype=dtype, device=device)
        return torch.nn.Parameter(content, requires_grad=meta.requires_grad)
