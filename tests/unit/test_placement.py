"""Where workers can be placed, from tables as Ray gives them."""

from __future__ import annotations

import pytest

from service.config import ScaleBlock, WorkersBlock
from service.training import placement
from service.training.placement import GROW_AFTER_LOOKS, Cluster, Growth, room_for, share_of

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


def test_workers_that_come_to_stand_by_while_a_run_waits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials on one base: the first one's worker has all the room that the others wait for."""
    monkeypatch.setattr(placement, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(Cluster, "current", lambda: Cluster((LARGE,), ({"CPU": 0.0},)))
    monkeypatch.setattr(placement, "_ask_autoscaler", lambda shares: None)
    looks = iter([None, None, (1, {"CPU": 8.0})])
    said: list[str] = []
    found = placement.await_workers(ScaleBlock(workers=1), said.append, lambda: False, standing=lambda: next(looks))
    assert found == (1, {"CPU": 8.0}) and said


def test_the_free_resources_of_two_nodes_do_not_make_one_worker() -> None:
    half = ({"CPU": 1.0}, {"CPU": 1.0})
    assert room_for(Cluster(half, half), {"CPU": 2}) == 0
    assert room_for(Cluster((LARGE, LARGE), half), {"CPU": 2}) == 0  # free in all, and on none
    apart = ({"CPU": 4.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 1.0})
    assert room_for(Cluster((GPU_NODE, GPU_NODE), apart), {"CPU": 1, "GPU": 1}) == 0


def looks_until_due(growth: Growth, room: int = 1) -> int:
    for look in range(1, 10_000):
        growth = growth.looked(room)
        if growth.due:
            return look
    raise AssertionError("never")


def test_a_run_grows_when_there_was_room_in_several_looks_in_a_row_and_not_at_the_first() -> None:
    assert looks_until_due(Growth()) == GROW_AFTER_LOOKS > 1
    interrupted = Growth().looked(1).looked(1).looked(0)
    assert not interrupted.due and looks_until_due(interrupted) == GROW_AFTER_LOOKS


def test_each_attempt_to_grow_that_brings_nothing_doubles_the_wait_up_to_a_limit_and_one_that_works_ends_it() -> None:
    growth, waits = Growth(), []
    for _ in range(12):
        waits.append(looks_until_due(growth))
        growth = growth.tried(before=1, after=1)
    assert waits[:4] == [GROW_AFTER_LOOKS * 2**n for n in range(4)] and waits[-1] == waits[-2] == 512
    assert growth.tried(before=2, after=1) == growth
    assert growth.tried(before=1, after=2) == Growth()


def test_a_place_that_is_always_gone_when_a_run_comes_for_it_stops_the_run_ever_more_seldom() -> None:
    # Two runs of one worker see the same free place, and whenever one stops for it, something else has it for a moment.
    growths, stops = [Growth(), Growth()], [0, 0]
    for _ in range(2000):
        for run, growth in enumerate(growths):
            growths[run] = growth.looked(1)
            if growths[run].due:
                stops[run] += 1
                growths[run] = growths[run].tried(before=1, after=1)
    assert stops == [10, 10]  # 3 + 6 + ... + 384 are 765 looks, then every 512th; every third would be 666 stops
