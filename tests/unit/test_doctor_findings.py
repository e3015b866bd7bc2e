"""Between which nodes `loray doctor` measures, and over what."""

from __future__ import annotations

import pytest

from service.doctor import Node, pairs

HEAD, SECOND = Node("h", "head", 0), Node("s", "second", 0)
GPU, ANOTHER, DOUBLE = Node("g", "gpu", 1), Node("a", "another", 1), Node("d", "double", 2)


@pytest.mark.parametrize(
    ("nodes", "measured"),
    [
        ([HEAD], [(HEAD, HEAD, False)]),
        ([HEAD, SECOND], [(HEAD, SECOND, False)]),
        ([HEAD, GPU, ANOTHER], [(GPU, ANOTHER, True)]),  # no worker goes to a head without a GPU
        ([HEAD, GPU], [(GPU, GPU, False)]),  # its one GPU cannot be given to two processes
        ([HEAD, DOUBLE], [(DOUBLE, DOUBLE, True)]),
        ([GPU, ANOTHER, DOUBLE], [(GPU, ANOTHER, True), (GPU, DOUBLE, True), (ANOTHER, DOUBLE, True)]),
        ([], []),
    ],
)
def test_only_nodes_that_workers_go_to_are_measured_and_over_gpus_that_they_have(
    nodes: list[Node], measured: list[tuple[Node, Node, bool]]
) -> None:
    assert list(pairs(nodes)) == measured
