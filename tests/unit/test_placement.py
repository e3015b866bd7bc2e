"""Where workers can be placed, from tables as Ray gives them."""

from __future__ import annotations

import pytest

from service.config import ScaleBlock, WorkersBlock
from service.training.placement import Cluster, room_for, share_of

SMALL, LARGE = {"CPU": 2.0, "memory": 1e9}, {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "free", "workers", "share", "room"),
    [
        ((LARGE,), (LARGE,), 2, {"CPU": 4}, 2),
        ((SMALL, LARGE), (SMALL, LARGE), 2, {"CPU": 2}, 5),  # no larger than the smallest node
        ((LARGE,), ({"CPU": 5.0},), 2, {"CPU": 2}, 2),  # something else runs there: of the free ones
        ((SMALL,), (SMALL,), 3, {"CPU": 1}, 2),  # one too few
        ((GPU_NODE, LARGE), (GPU_NODE, LARGE), 2, {"CPU": 1, "GPU": 1}, 2),
        ((GPU_NODE,), ({"CPU": 8.0},), 1, {"CPU": 1, "GPU": 1}, 0),  # never a CPU instead of a taken GPU
        ((), (), 1, {"CPU": 1}, 0),
    ],
)
def test_a_worker_gets_its_share_and_no_more_than_can_be_placed(
    nodes: tuple[dict[str, float], ...],
    free: tuple[dict[str, float], ...],
    workers: int,
    share: dict[str, float],
    room: int,
) -> None:
    cluster = Cluster(nodes, free)
    assert share_of(cluster, ScaleBlock(workers=workers)) == share
    assert room_for(cluster, share) == room


def test_an_elastic_run_takes_the_share_that_its_most_workers_would_have() -> None:
    scale = ScaleBlock(workers=WorkersBlock(min=1, max=2))
    assert share_of(Cluster((LARGE,), (LARGE,)), scale) == {"CPU": 4}


def test_the_free_resources_of_two_nodes_do_not_make_one_worker() -> None:
    half = ({"CPU": 1.0}, {"CPU": 1.0})
    assert room_for(Cluster(half, half), {"CPU": 2}) == 0
    assert room_for(Cluster((LARGE, LARGE), half), {"CPU": 2}) == 0  # free in all, and on none
    apart = ({"CPU": 4.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 1.0})
    assert room_for(Cluster((GPU_NODE, GPU_NODE), apart), {"CPU": 1, "GPU": 1}) == 0
