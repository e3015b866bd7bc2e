"""What the benchmark of planned memory counts of weights that lie in a mapped file."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from tests.benchmarks.plan_error import of_weights, used_in_place

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_weight_that_was_written_to_is_the_process_own_and_not_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w" * (4 * MIB))
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert mapped[:] == b"w" * (4 * MIB)  # all of it is read
    assert of_weights(os.getpid()) == (4 * MIB, 0)
    mapped[:MIB] = b"x" * MIB
    assert mapped[MIB:] == b"w" * (3 * MIB)  # a write may unmap what lies around it
    assert of_weights(os.getpid()) == (4 * MIB, MIB)
    mapped.close()


@pytest.mark.parametrize(
    ("used", "resident", "written", "counted"),
    [
        (40, 172, 0, 40),  # an embedding used where it lies; around it, what was quantised and is not needed any more
        (40, 172, 40, 0),  # the same, after a broadcast has written into it: it is among the process's own memory
        (172, 172, 40, 132),
        (172, 100, 0, 100),
        (0, 172, 0, 0),
    ],
)
def test_only_what_is_used_in_place_and_unwritten_is_added(
    used: int, resident: int, written: int, counted: int
) -> None:
    assert used_in_place(used, resident, written) == counted
