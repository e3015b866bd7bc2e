"""Splits as clients ask for them: all that is wrong at once, keys found in their order, arms that stay registered."""

from __future__ import annotations

from typing import Any

import pytest

from serve.desired import Desired
from serve.registration import withdrawn
from serve.routing import Arm, Registered, Source
from serve.splits import DEFAULT_KEY, key_of, parse_split, with_split, without_split
from service.errors import ConflictError, NotFoundError, RequestError

GOOD: dict[str, Any] = {
    "arms": {"a": {"model": "tickets@3", "weight": 90}, "b": {"model": "tickets@4", "weight": 10.5}}
}
ARMS = {
    "a": Arm(model="tickets@3", digest="d3", weight=90),
    "b": Arm(model="base", digest="d0", weight=10, is_base=True),
}


def test_a_short_body_gets_the_usual_keys() -> None:
    wanted = parse_split(GOOD)
    assert wanted.arms == {"a": ("tickets@3", 90.0), "b": ("tickets@4", 10.5)}
    assert (wanted.salt, wanted.key, wanted.ignored) == (None, DEFAULT_KEY, ())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"arms": None}, "arms"),
        ({"arms": {}}, "arms"),
        ({"arms": {f"a{i}": GOOD["arms"]["a"] for i in range(17)}}, "arms"),
        ({"arms": {"a": {"model": "tickets@3", "weight": 0}}}, "arms"),
        ({"arms": {"a": "tickets@3"}}, "arms.a.model"),
        ({"arms": {"a": {"model": "", "weight": 1}}}, "arms.a.model"),
        ({"arms": {"a": {"model": "tickets@3"}}}, "arms.a.weight"),
        ({"arms": {"a": {"model": "tickets@3", "weight": -1}}}, "arms.a.weight"),
        ({"arms": {"a": {"model": "tickets@3", "weight": True}}}, "arms.a.weight"),
        ({"arms": {"../a": {"model": "tickets@3", "weight": 1}}}, "arms.../a"),
        ({"salt": ""}, "salt"),
        ({"salt": 5}, "salt"),
        ({"key": []}, "key"),
        ({"key": ["header:X-Key"]}, "key"),
        ({"key": ["cookie"]}, "key"),
        ({"key": "user"}, "key"),
    ],
)
def test_a_bad_split_is_refused_by_its_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_split({**GOOD, **change})
    assert caught.value.param == param


def test_all_problems_come_at_once_and_unknown_fields_are_named() -> None:
    with pytest.raises(RequestError) as caught:
        parse_split(
            {"arms": {"a": {"model": 3, "weight": 1}, "b": {"model": "x", "weight": "2"}}, "salt": "", "key": 1}
        )
    for field in ("arms.a.model", "arms.b.weight", "salt", "key"):
        assert f"{field}: " in str(caught.value)
    wanted = parse_split({"arms": {"a": {"model": "t@1", "weight": 1, "hue": 2}}, "mood": 1})
    assert wanted.ignored == ("mood", "arms.a.hue")


def test_a_key_is_the_first_that_the_request_carries() -> None:
    about = {"metadata.user": "m", "safety_identifier": "s", "user": "u"}
    assert key_of(DEFAULT_KEY, {"x-loray-key": "h"}, about) == "h"
    assert key_of(DEFAULT_KEY, {}, about) == "m"
    assert key_of(("user",), {"x-loray-key": "h"}, about) == "u"
    assert key_of(DEFAULT_KEY, {}, {}) is None
    assert key_of(DEFAULT_KEY, {"x-loray-key": "x" * 9999}, {}) == "x" * 512


def test_a_split_registers_its_versions_and_keeps_its_salt() -> None:
    first = with_split(Desired(epoch=7), "tickets", parse_split(GOOD), ARMS)
    assert first.adapters == {"tickets@3": Registered(model="tickets@3", digest="d3", since=7)}
    assert first.splits["tickets"].since == 7 and first.splits["tickets"].salt
    second = with_split(first.model_copy(update={"epoch": 8}), "tickets", parse_split(GOOD), ARMS)
    assert second.splits["tickets"].salt == first.splits["tickets"].salt
    assert second.splits["tickets"].since == 8
    assert second.adapters == first.adapters
    third = with_split(second, "tickets", parse_split({**GOOD, "salt": "mine"}), ARMS)
    assert third.splits["tickets"].salt == "mine"
    assert without_split(third, "tickets").splits == {}
    with pytest.raises(NotFoundError, match="Splits: tickets"):
        without_split(third, "other")


def test_a_version_that_a_split_needs_cannot_be_withdrawn() -> None:
    desired = with_split(Desired(), "tickets", parse_split(GOOD), ARMS)
    with pytest.raises(ConflictError, match="split 'tickets' sends traffic to tickets@3"):
        withdrawn(desired, "tickets@3")
    twice = desired.model_copy(update={"adapters": {**desired.adapters, "mine": desired.adapters["tickets@3"]}})
    assert withdrawn(twice, "mine").model == "tickets@3"
    with pytest.raises(NotFoundError):
        withdrawn(desired, "nobody")


def test_an_arm_from_a_uri_is_registered_as_it_is_pinned_or_not_at_all() -> None:
    source = Source(uri="/adapters/mine", base_digest="b", files={})
    entry = Registered(model="mine@sha256-1", digest="d1", pin=True, source=source)
    wanted = parse_split({"arms": {"mine": {"model": "mine@sha256-1", "weight": 1}}})
    arms = {"mine": Arm(model="mine@sha256-1", digest="d1", weight=1)}
    split = with_split(Desired(epoch=7, adapters={"mine": entry}), "half", wanted, arms)
    assert split.adapters["mine@sha256-1"] == entry.model_copy(update={"since": 7, "pin": False})
    with pytest.raises(ConflictError, match="replaced or deleted"):
        with_split(Desired(epoch=8), "half", wanted, arms)
