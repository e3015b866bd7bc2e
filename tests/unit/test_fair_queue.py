"""Lines that take turns by the tokens they were served."""

from __future__ import annotations

from service.inference.fair_queue import QUANTUM, FairQueue


def test_one_line_is_first_come_first_served() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in range(3):
        queue.push("a", item)
    assert [queue.pop() for _ in range(4)] == [0, 1, 2, None]


def test_a_line_of_a_thousand_does_not_delay_the_only_request_of_another() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push("busy", f"busy{number}")
    for _ in range(4):
        queue.pop()
        queue.charge("busy", QUANTUM)
    queue.push("quiet", "quiet0")
    queue.push(None, "base0")
    assert {queue.pop(), queue.pop()} == {"quiet0", "base0"}


def test_lines_share_tokens_evenly_whatever_their_requests_cost() -> None:
    """Requests of 2,000 tokens against those of 100, for one slot."""
    queue: FairQueue[str] = FairQueue()
    costs, served = {"long": 2000, "short": 100}, {"long": 0, "short": 0}
    for key in costs:
        for _ in range(2000):
            queue.push(key, key)
    for _ in range(1000):
        popped = queue.pop()
        assert popped is not None
        queue.charge(popped, costs[popped])
        served[popped] += costs[popped]
        queue.done(popped)
    assert abs(served["long"] - served["short"]) < 2 * 2000
    assert min(served.values()) > 90_000


def test_a_removed_item_is_never_served_and_an_empty_line_is_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "first")
    queue.push("a", "second")
    assert queue.remove("a", "first") and not queue.remove("a", "first") and not queue.remove("b", "first")
    assert queue.pop() == "second"
    queue.charge("a", 10_000)
    queue.done("a")
    assert len(queue) == 0 and queue._lines == {}
