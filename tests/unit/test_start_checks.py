"""What counts as a micro-batch that does not fit."""

from __future__ import annotations

import pytest
import torch

from service.errors import OutOfMemoryError
from service.training.start_checks import out_of_memory_as_ours
from service.training.strategy import World

FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    MemoryError(),
)
OTHERS = (
    NotImplementedError("no kernel"),
    RecursionError("too deep"),
    torch.distributed.DistBackendError("NCCL error: peer is gone"),
    RuntimeError("CUDA error: device-side assert triggered"),
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_memory_that_is_full_is_an_error_with_the_size_and_what_to_do(error: BaseException) -> None:
    told = pytest.raises(OutOfMemoryError, match=r"micro-batch of 8 .* Lower memory.micro")
    with told as raised, out_of_memory_as_ours(8, World()):
        raise error
    assert raised.value.micro == 8


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_any_other_error_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as told, out_of_memory_as_ours(8, World()):
        raise error
    assert told.value is error
