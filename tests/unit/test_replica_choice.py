"""Which replica takes a request: the adapter's, the conversation's, but not a much busier one."""

from __future__ import annotations

import json
from collections import Counter

from serve.openai_api import parse_chat, parse_text
from serve.replica_choice import Candidate, conversation_of, ranked

NAMES = ("a", "b", "c", "d")


def idle(resident: dict[str, set[str]] | None = None, busy: dict[str, int] | None = None) -> list[Candidate]:
    resident, busy = resident or {}, busy or {}
    return [Candidate(name, busy.get(name, 0), 16, frozenset(resident.get(name, ()))) for name in NAMES]


def test_replicas_with_the_adapter_come_first() -> None:
    candidates = idle({"c": {"red"}, "d": {"red", "blue"}})
    for number in range(50):
        assert set(ranked(candidates, "red", str(number))[:2]) == {"c", "d"}
        assert ranked(candidates, "blue", str(number))[0] == "d"


def test_an_absent_adapter_is_loaded_where_there_is_room() -> None:
    full = [Candidate(name, 0, 16, frozenset({"red"}), 1.0) for name in ("a", "b", "c")]
    for number in range(50):
        assert ranked([*full, Candidate("d", 0, 16, frozenset(), 0.4)], "blue", str(number))[0] == "d"


def test_one_that_is_a_turn_busier_than_an_idle_one_is_not_waited_for() -> None:
    def first(num_requests: int) -> set[str]:
        candidates = idle({"c": {"red"}}, {"c": num_requests})
        return {ranked(candidates, "red", str(number))[0] for number in range(200)}

    assert first(7) == {"c"}
    assert first(9) > {"c"}, "the home of a conversation takes it when half a turn nearer"
    assert first(25) == {"a", "b", "d"}


def test_a_conversation_stays_and_conversations_spread() -> None:
    homes = {str(number): ranked(idle(), None, str(number))[0] for number in range(400)}
    assert min(Counter(homes.values()).values()) > 60
    fewer = [candidate for candidate in idle() if candidate.name != "b"]
    for number, home in homes.items():
        assert ranked(idle(busy={home: 7}), None, number)[0] == home
        assert ranked(idle(busy={home: 9}), None, number)[0] != home
        assert home == "b" or ranked(fewer, None, number)[0] == home, "one that goes moves only its own"


def test_a_conversation_is_known_by_its_beginning() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    later = [*turns, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "More"}]
    other = [turns[0], {"role": "user", "content": "Goodbye"}]

    def key(messages: list[dict[str, str]]) -> str:
        return conversation_of(parse_chat(json.dumps({"model": "base", "messages": messages}).encode()))

    assert key(turns) == key(later) != key(other)


def test_a_text_is_known_by_its_beginning() -> None:
    def key(prompt: object) -> str:
        return conversation_of(parse_text(json.dumps({"model": "base", "prompt": prompt}).encode()))

    assert key("x" * 256 + "one") == key("x" * 256 + "two") != key("y" * 256)
    assert key([1] * 300) == key([1] * 299) != key([2] * 300)
