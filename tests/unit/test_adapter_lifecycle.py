"""The adapters of one replica, without engine, store or threads: what is decided, in every order of events."""

import random

import pytest

from serve.adapters import SLICE_S, AdapterState, AdapterTable, Fetch, Load, Read, Unload
from serve.routing import Registered, Source
from service.errors import ConflictError, ModelError, NotFoundError

RANKS = {"a1": 8, "a2": 8, "b1": 8, "c1": 16, "huge": 64}


def registered(**labels: str) -> dict[str, Registered]:
    return {
        label: Registered(model=f"{d[:-1] or d}@{d[-1]}" if d[-1].isdigit() else f"{d}@1", digest=d)
        for label, d in labels.items()
    }


class Bench:
    """A table, and a bank of columns that does what the table says."""

    def __init__(self, columns: int = 16) -> None:
        self.table = AdapterTable(columns)
        self.bank: dict[str, int] = {}
        self.columns, self.epoch, self.num_loads = columns, 0, 0
        self.unreadable: set[str] = set()
        self.now_s = 0.0

    def want(self, **labels: str) -> None:
        self.epoch += 1
        self.table.want(self.epoch, registered(**labels))
        self.settle()

    def settle(self) -> None:
        while (action := self.table.next_action(self.columns - sum(self.bank.values()), self.now_s)) is not None:
            if isinstance(action, Fetch):
                self.table.fetched(action.digest, RANKS[action.digest])
            elif isinstance(action, Read):
                assert RANKS[action.digest] > self.columns - sum(self.bank.values()), "it could be loaded"
                if action.digest in self.unreadable:
                    self.table.refuse(action.digest, "broken")
            elif isinstance(action, Load):
                self.bank[action.digest] = RANKS[action.digest]
                self.num_loads += 1
                self.table.loaded(action.digest, RANKS[action.digest], self.now_s)
            else:
                adapter = self.table.adapters[action.digest]
                assert adapter.running == 0 and not adapter.pinned
                assert adapter.waiting == 0 or not adapter.wanted or adapter.closing, (
                    "what is waited for is not evicted"
                )
                del self.bank[action.digest]
                self.table.unloaded(action.digest)

    def state(self, digest: str) -> AdapterState:
        adapter = self.table.adapters.get(digest)
        return adapter.state if adapter else AdapterState.GONE

    def release(self, digest: str) -> None:
        self.table.release(digest)
        self.settle()


def test_an_adapter_goes_from_registered_over_cached_to_resident() -> None:
    table, states = AdapterTable(16), []

    def look() -> None:
        states.append(table.adapters["a1"].state.value)

    table.want(1, registered(a="a1"))
    look()
    assert table.next_action(16, 0.0) == Fetch("a1", "a@1")
    table.fetched("a1", 8)
    look()
    assert table.next_action(16, 0.0) == Load("a1")
    table.loaded("a1", 8, 0.0)
    look()
    assert table.next_action(8, 0.0) is None
    assert states == ["registered", "cached", "resident"]


def test_a_request_waits_for_an_adapter_that_is_not_loaded_yet() -> None:
    bench = Bench()
    bench.table.want(1, registered(a="a1"))
    assert bench.table.acquire("a1", None) is None
    bench.settle()
    assert bench.table.acquire("a1", None) == "a1"


def test_a_withdrawn_adapter_drains_and_is_gone_after_its_last_request() -> None:
    bench = Bench()
    bench.want(a="a1")
    bench.table.acquire("a1", None)
    bench.table.acquire("a1", None)
    bench.want()
    assert bench.state("a1") is AdapterState.DRAINING
    with pytest.raises(NotFoundError):
        bench.table.acquire("a1", None)
    bench.release("a1")
    assert bench.state("a1") is AdapterState.DRAINING
    bench.release("a1")
    assert bench.state("a1") is AdapterState.GONE
    assert bench.bank == {}


def test_a_draining_adapter_that_is_wanted_again_is_not_reloaded() -> None:
    bench = Bench()
    bench.want(a="a1")
    bench.table.acquire("a1", None)
    bench.want()
    bench.want(a="a1")
    assert bench.state("a1") is AdapterState.RESIDENT


def test_a_swap_loads_the_new_version_then_flips_then_drains_the_old() -> None:
    bench = Bench()
    bench.want(a="a1")
    assert bench.table.acquire("a1", "a") == "a1"
    bench.table.want(9, registered(a="a2"))
    assert bench.table.acquire("a2", "a") == "a1", "while a2 loads, the label's old version answers"
    bench.settle()
    assert bench.table.acquire("a2", "a") == "a2"
    assert bench.state("a1") is AdapterState.DRAINING
    bench.release("a1")
    bench.release("a1")
    assert bench.state("a1") is AdapterState.GONE
    assert set(bench.bank) == {"a2"}


def test_a_request_for_an_explicit_version_is_never_answered_by_another_one() -> None:
    bench = Bench()
    bench.want(a="a1")
    bench.table.want(9, registered(a="a2"))
    assert bench.table.acquire("a2", None) is None


def test_a_label_moved_to_another_family_waits_instead_of_answering_with_the_old_one() -> None:
    bench = Bench()
    bench.want(x="a1")
    bench.table.want(9, registered(x="b1"))
    assert bench.table.acquire("b1", "x") is None


def test_a_swap_without_free_columns_is_pending_while_the_old_version_serves() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.table.acquire("a1", "a")
    bench.want(a="a2")
    adapter = bench.table.adapters["a2"]
    assert (adapter.state, adapter.detail) == (AdapterState.PENDING, "needs 8 columns, 0 free")
    assert bench.table.serving() == {"a": "a1"}
    bench.release("a1")
    assert bench.state("a2") is AdapterState.RESIDENT
    assert bench.table.serving() == {"a": "a2"}


def test_the_least_recently_used_idle_adapter_is_evicted_and_one_in_use_never() -> None:
    bench = Bench(columns=16)
    bench.want(a="a1", b="b1")
    bench.table.acquire("a1", None)  # older than b1's use, but running
    bench.table.acquire("b1", None)
    bench.release("b1")
    bench.want(a="a1", b="b1", z="a2")
    assert bench.state("b1") is AdapterState.CACHED
    assert bench.state("a1") is AdapterState.RESIDENT
    assert bench.state("a2") is AdapterState.RESIDENT


def test_nothing_is_evicted_when_evicting_would_not_make_enough_room() -> None:
    bench = Bench(columns=16)
    bench.want(a="a1", b="b1")
    bench.table.acquire("a1", None)
    bench.want(a="a1", b="b1", c="c1")
    assert bench.state("b1") is AdapterState.RESIDENT
    assert bench.table.adapters["c1"].detail == "needs 16 columns, 0 free"


def test_an_evicted_adapter_comes_back_only_when_a_request_waits_for_it() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1", b="b1")
    evicted, kept = ("a1", "b1") if bench.state("b1") is AdapterState.RESIDENT else ("b1", "a1")
    bench.settle()
    assert bench.state(evicted) is AdapterState.CACHED
    assert bench.table.acquire(evicted, None) is None
    bench.table.wait(evicted)
    bench.settle()
    assert bench.table.acquire(evicted, None) == evicted
    assert bench.state(kept) is AdapterState.CACHED


def test_one_that_is_put_again_while_it_makes_room_comes_back() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    assert bench.table.acquire("a1", None) == "a1"
    bench.want(a="a1", b="b1")
    bench.table.wait("b1")
    bench.now_s += 5 * SLICE_S
    bench.settle()
    assert bench.table.adapters["a1"].closing
    _put_again(bench, "a")
    bench.release("a1")
    assert bench.state("b1") is AdapterState.RESIDENT and bench.table.acquire("b1", None) == "b1"
    bench.table.stop_waiting("b1")
    bench.release("b1")
    assert bench.state("a1") is AdapterState.RESIDENT
    bench.want(a="a1", b="b1")
    bench.settle()
    assert list(bench.bank) == ["a1"], "and it is loaded once for each PUT"


def test_one_that_is_put_again_and_evicted_in_the_same_step_comes_back() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.want(a="a1", b="b1")
    assert list(bench.bank) == ["b1"]
    bench.table.wait("a1")
    _put_again(bench, "b")
    assert bench.table.acquire("a1", None) == "a1", "b1 has made room"
    bench.table.stop_waiting("a1")
    bench.release("a1")
    assert bench.state("b1") is AdapterState.RESIDENT


def _put_again(bench: Bench, label: str) -> None:
    bench.epoch += 1
    labels = registered(a="a1", b="b1")
    labels[label] = labels[label].model_copy(update={"since": bench.epoch})
    bench.table.want(bench.epoch, labels)
    bench.settle()


def test_adapters_that_are_waited_for_do_not_evict_each_other_and_each_has_its_turn() -> None:
    """Requests for three adapters on columns for one: a load for each answer, and the longest wait goes first."""
    bench, answered = Bench(columns=8), []
    bench.want(a="a1", b="b1", z="a2")
    for digest in ("a2", "b1", "a1"):
        bench.table.wait(digest)
    before = bench.num_loads
    for _ in range(9):
        bench.settle()
        (digest,) = bench.bank
        assert bench.table.acquire(digest, None) == digest
        bench.table.stop_waiting(digest)
        bench.table.wait(digest)  # the next request for it comes before this one has ended
        bench.table.stop_waiting(digest)
        bench.release(digest)
        bench.table.wait(digest)
        answered.append(digest)
    assert {digest: answered.count(digest) for digest in answered} == {"a1": 3, "a2": 3, "b1": 3}
    assert bench.num_loads - before <= 10


def test_an_adapter_larger_than_the_whole_bank_is_refused_with_both_numbers() -> None:
    bench = Bench(columns=16)
    bench.want(h="huge")
    assert bench.state("huge") is AdapterState.REFUSED
    assert "needs 64 columns, the endpoint has 16" in bench.table.adapters["huge"].detail
    with pytest.raises(ModelError, match="is refused by its replica"):
        bench.table.acquire("huge", "h")


def test_an_adapter_of_a_rank_that_the_engine_does_not_take_is_refused_before_others_make_room() -> None:
    bench = Bench(columns=16)
    bench.table = AdapterTable(16, max_rank=8)
    bench.want(a="a1", b="b1")
    bench.want(a="a1", b="b1", c="c1")
    assert bench.state("c1") is AdapterState.REFUSED
    assert set(bench.bank) == {"a1", "b1"}
    assert "has rank 16, the endpoint takes 8 at most (engine.vllm.max_rank" in bench.table.adapters["c1"].detail


def test_a_refused_adapter_is_tried_again_when_it_is_put_again() -> None:
    bench = Bench()
    bench.table.want(1, registered(a="a1"))
    bench.table.refuse("a1", "broken")
    bench.settle()
    assert bench.state("a1") is AdapterState.REFUSED
    bench.table.want(2, {"a": Registered(model="a@1", digest="a1", since=2)})
    bench.settle()
    assert bench.state("a1") is AdapterState.RESIDENT


def test_a_refused_new_version_leaves_the_old_one_serving_its_label() -> None:
    bench = Bench()
    bench.want(a="a1")
    bench.table.want(9, registered(a="a2"))
    bench.table.refuse("a2", "broken")
    bench.settle()
    assert bench.table.acquire("a2", "a") == "a1"


def test_one_that_cannot_be_read_makes_nobody_leave() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.unreadable.add("b1")
    bench.want(a="a1", b="b1")
    assert bench.state("b1") is AdapterState.REFUSED and list(bench.bank) == ["a1"]


def test_one_whose_files_the_store_does_not_give_makes_nobody_leave_and_is_tried_again() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.table.want(9, registered(a="a1", b="b1"))
    bench.table.fetched("b1", 8)
    for _ in range(2):
        assert bench.table.next_action(0, 0.0) == Read("b1")
        bench.table.unread("b1", "the store is away")
        assert bench.table.next_action(0, 0.0) is None
        assert bench.table.adapters["b1"].detail == "the store is away"
        bench.table.want(9, registered(a="a1", b="b1"))  # the next poll
    bench.settle()
    assert list(bench.bank) == ["b1"]


def test_one_that_was_broken_and_is_put_again_is_read_again_first() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.unreadable.add("b1")
    bench.want(a="a1", b="b1")
    labels = registered(a="a1", b="b1")
    labels["b"] = labels["b"].model_copy(update={"since": 99})
    bench.table.want(99, labels)
    assert bench.table.next_action(0, 0.0) == Read("b1")


def test_what_waits_for_turns_is_read_once_while_they_end() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    assert bench.table.acquire("a1", None) == "a1"
    bench.want(a="a1", b="b1")
    bench.table.fetched("b1", 8)
    bench.table.wait("b1")
    assert bench.table.adapters["b1"].read and bench.table.next_action(0, SLICE_S) is None
    assert bench.table.adapters["a1"].closing
    bench.release("a1")
    assert list(bench.bank) == ["b1"] and not bench.table.adapters["b1"].read, "the next time it is read again"


def test_no_request_gets_in_while_an_adapter_is_being_unloaded() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    bench.table.want(2, registered(a="a1", b="b1"))
    bench.table.fetched("b1", 8)
    assert bench.table.next_action(0, 0.0) == Read("b1")
    assert bench.table.acquire("a1", None) == "a1", "reading disturbs nobody"
    bench.table.release("a1")
    assert bench.table.next_action(0, 0.0) == Unload("a1")
    assert bench.table.acquire("a1", None) is None
    bench.table.still_in_use("a1")
    assert bench.table.acquire("a1", None) == "a1"


def test_when_the_engine_has_less_room_than_it_said_an_idle_adapter_goes() -> None:
    bench = Bench(columns=32)
    bench.want(a="a1")
    bench.table.want(2, registered(a="a1", b="b1"))
    bench.table.fetched("b1", 8)
    assert bench.table.next_action(24, 0.0) == Load("b1")
    bench.table.short("b1", "needs 24 columns, 16 free")
    assert bench.table.adapters["b1"].state is AdapterState.PENDING
    assert bench.table.next_action(24, 0.0) == Read("b1")
    assert bench.table.next_action(24, 0.0) == Unload("a1")


def test_adapters_that_are_all_in_use_take_turns() -> None:
    """Room for one of two, both asked for without end: each has its turn, and nobody who runs is disturbed."""
    bench = Bench(columns=8)
    bench.want(a="a1", b="b1")
    first, other = ("a1", "b1") if "a1" in bench.bank else ("b1", "a1")
    assert bench.table.acquire(first, None) == first
    bench.table.wait(other)
    bench.settle()
    assert bench.table.acquire(first, None) == first, "its slice is not over"
    bench.now_s += SLICE_S
    bench.settle()
    assert bench.table.acquire(first, None) is None, "it lets nobody in any more"
    bench.table.wait(first)
    bench.release(first)
    assert list(bench.bank) == [first], "one request still runs on it"
    bench.release(first)
    assert list(bench.bank) == [other]
    assert bench.table.acquire(other, None) == other
    bench.table.stop_waiting(other)
    bench.now_s += SLICE_S
    bench.settle()
    bench.release(other)
    assert list(bench.bank) == [first] and bench.table.acquire(first, None) == first


def test_a_turn_that_nobody_waits_for_any_more_goes_on() -> None:
    bench = Bench(columns=8)
    bench.want(a="a1")
    assert bench.table.acquire("a1", None) == "a1"
    bench.want(a="a1", b="b1")
    bench.table.wait("b1")
    bench.now_s += SLICE_S
    bench.settle()
    assert bench.table.acquire("a1", None) is None
    bench.table.stop_waiting("b1")
    assert bench.table.acquire("a1", None) == "a1"


def test_a_pinned_adapter_stays_whoever_waits() -> None:
    bench = Bench(columns=8)
    labels = registered(a="a1", b="b1")
    labels["a"] = labels["a"].model_copy(update={"pin": True})
    bench.table.want(1, {"a": labels["a"]})
    bench.settle()
    bench.table.want(2, labels)
    bench.table.wait("b1")
    bench.now_s += 10 * SLICE_S
    bench.settle()
    assert list(bench.bank) == ["a1"] and bench.table.acquire("a1", None) == "a1"
    assert bench.state("b1") is AdapterState.PENDING
    bench.release("a1")
    bench.table.want(3, registered(a="a1", b="b1"))  # no pin any more
    bench.settle()
    assert list(bench.bank) == ["b1"]


def test_one_that_can_never_fit_ends_nobodys_turn_and_says_so() -> None:
    bench = Bench(columns=16)
    labels = registered(p="a1", b="b1", c="c1")
    labels["p"] = labels["p"].model_copy(update={"pin": True})
    bench.table.want(1, {label: labels[label] for label in "pb"})
    bench.settle()
    assert bench.table.acquire("b1", None) == "b1"
    bench.table.want(2, labels)
    bench.table.wait("c1")
    bench.now_s += 10 * SLICE_S
    bench.settle()
    assert bench.table.acquire("b1", None) == "b1"
    with pytest.raises(ConflictError, match="needs 16 columns, and pinned adapters leave 8"):
        bench.table.acquire("c1", None)


def test_a_pinned_label_can_be_swapped() -> None:
    bench = Bench(columns=8)
    for epoch, digest in enumerate(("a1", "a2"), start=1):
        labels = registered(a=digest)
        bench.table.want(epoch, {"a": labels["a"].model_copy(update={"pin": True})})
        bench.settle()
    assert list(bench.bank) == ["a2"] and bench.table.acquire("a1", "a") == "a2"


def test_a_request_on_its_way_during_a_swap_gets_what_its_label_means_now() -> None:
    bench = Bench(columns=16)
    bench.want(a="a1")
    bench.want(a="a2")
    assert list(bench.bank) == ["a2"]
    assert bench.table.acquire("a1", "a") == "a2"
    assert bench.table.awaited("a1", "a").digest == "a2"
    with pytest.raises(NotFoundError):
        bench.table.acquire("a1", None)


def test_any_order_of_events_keeps_what_runs_resident_and_ends_clean() -> None:
    """4000 random events: whatever runs is in the bank, the bank never overflows, and at the end nothing is left."""
    rng = random.Random(7)
    bench, running, waiting = Bench(columns=24), [], []

    def ask(digest: str) -> None:
        try:
            answering = bench.table.acquire(digest, None)
        except NotFoundError:
            return
        if answering:
            running.append(answering)
        else:
            bench.table.wait(digest)
            waiting.append(digest)
            bench.settle()

    for _ in range(4000):
        bench.now_s += rng.random() * SLICE_S / 4
        choice = rng.random()
        if choice < 0.1:
            labels = {label: rng.choice([f"{label}1", "a2"]) for label in ("a", "b", "c") if rng.random() < 0.7}
            bench.want(**labels)
        elif choice < 0.4 and bench.table.adapters:
            ask(rng.choice(sorted(bench.table.adapters)))
        elif choice < 0.6 and waiting:  # it looks again, or gives up
            digest = waiting.pop(rng.randrange(len(waiting)))
            if rng.random() < 0.8:
                ask(digest)
            bench.table.stop_waiting(digest)
            bench.settle()
        elif running:
            bench.release(running.pop(rng.randrange(len(running))))
        assert set(running) <= set(bench.bank)
        assert sum(bench.bank.values()) <= 24
        assert {d for d, a in bench.table.adapters.items() if a.resident} == set(bench.bank)
    assert bench.num_loads > 100
    for digest in waiting:
        bench.table.stop_waiting(digest)
    bench.want()
    while running:
        bench.release(running.pop())
    assert bench.bank == {}
    assert bench.table.adapters == {}


def test_the_same_content_from_registry_and_uri_is_one_adapter_and_comes_from_whoever_still_names_it() -> None:
    source = Source(uri="/adapters/a", base_digest="b", files={})
    pinned = Registered(model="mine@sha256-a1", digest="a1", source=source)
    both = {"mine": pinned, **registered(a="a1")}
    for labels in (both, dict(reversed(both.items()))):
        table = AdapterTable(16)
        table.want(1, labels)
        assert table.next_action(16, 0.0) == Fetch("a1", "a@1", None)
        table.want(2, {"mine": pinned})
        assert list(table.adapters) == ["a1"]
        assert table.next_action(16, 0.0) == Fetch("a1", "mine@sha256-a1", source)
