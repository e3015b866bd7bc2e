"""A requested name means one Model or nothing: never a guess, never "latest"."""

import pickle

import pytest

from serve.routing import Arm, Registered, Routes, Source, Split, UnknownModelError, resolve

ROUTES = Routes(
    base="tiny",
    base_digest="b0",
    labels={
        "tickets": Registered(model="tickets@2", digest="t2"),
        "tickets@1": Registered(model="tickets@1", digest="t1"),
        "mine": Registered(model="team/other@10", digest="o10"),
    },
    aliases={"tickets": {"production": 1, "canary": 2, "next": 3}, "team/other": {}},
)


def test_the_base_answers_to_its_own_name() -> None:
    target = resolve("tiny", ROUTES)
    assert (target.is_base, target.digest, target.model) == (True, "b0", "tiny")


@pytest.mark.parametrize(
    ("name", "model", "digest"),
    [
        ("tickets@1", "tickets@1", "t1"),
        ("tickets@2", "tickets@2", "t2"),
        ("tickets@canary", "tickets@2", "t2"),
        ("tickets@production", "tickets@1", "t1"),
        ("team/other@10", "team/other@10", "o10"),
    ],
)
def test_versions_and_aliases_mean_registered_versions(name: str, model: str, digest: str) -> None:
    target = resolve(name, ROUTES)
    assert (target.model, target.digest, target.label) == (model, digest, None)


def test_what_was_registered_under_a_bare_name_as_it_stands_comes_before_its_alias() -> None:
    assert resolve("tickets", ROUTES).model == "tickets@2"
    follows = {
        **ROUTES.labels,
        "tickets": ROUTES.labels["tickets"].model_copy(update={"follows": "tickets@production"}),
    }
    assert resolve("tickets", Routes("tiny", "b0", follows, ROUTES.aliases)).model == "tickets@1"
    unlabelled = {label: entry for label, entry in ROUTES.labels.items() if label != "tickets"}
    assert resolve("tickets", Routes("tiny", "b0", unlabelled, ROUTES.aliases)).model == "tickets@1"


def test_a_label_answers_where_no_alias_production_exists() -> None:
    target = resolve("mine", ROUTES)
    assert (target.model, target.label) == ("team/other@10", "mine")
    without_aliases = Routes("tiny", "b0", ROUTES.labels, {})
    assert resolve("tickets", without_aliases).model == "tickets@2"


@pytest.mark.parametrize(
    "name",
    [
        "tickets@10",  # 1 is registered: no prefix matches
        "tickets@latest",
        "tickets@next",  # the alias exists, its version is not registered here
        "team/other",  # no alias production
        "other@10",  # another project
        "nobody",
        "a@b@c",
        f"tickets@{'9' * 5000}",  # more digits than Python reads as a number
        "../etc",
        "TICKETS",
        "",
    ],
)
def test_anything_else_is_unknown_and_the_known_names_are_listed(name: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(name, ROUTES)
    for known in ("tiny", "tickets@1", "tickets@2", "mine", "team/other@10", "tickets@canary"):
        assert known in str(caught.value)


def test_an_alias_to_an_unregistered_version_says_which() -> None:
    with pytest.raises(UnknownModelError, match="means tickets@3, which is not registered"):
        resolve("tickets@next", ROUTES)


def test_every_listed_name_resolves_to_the_listed_digest() -> None:
    for name, digest in ROUTES.names():
        assert resolve(name, ROUTES).digest == digest


def test_an_alias_that_leads_nowhere_takes_no_name_away_and_is_not_listed() -> None:
    routes = Routes("tiny", "b0", ROUTES.labels, {"tickets": {"production": 3}})
    assert resolve("tickets", routes).model == "tickets@2"
    with pytest.raises(UnknownModelError, match="means tickets@3, which is not registered"):
        resolve("tickets@production", routes)
    assert "tickets@production" not in dict(routes.names())


def test_an_unknown_name_is_told_some_of_the_known_ones() -> None:
    labels = {f"a{number}": Registered(model=f"a{number}@1", digest=str(number)) for number in range(1000)}
    with pytest.raises(UnknownModelError, match=r"a0, .* \.\.\. \(GET /v1/models\)") as caught:
        resolve("nobody", Routes("tiny", "b0", labels))
    assert len(str(caught.value)) < 500


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnknownModelError("x")))  # noqa: S301 - our own bytes
    assert isinstance(error, UnknownModelError)
    assert str(error) == "x"


def _split(salt: str = "s", **weights: float) -> Split:
    arms = {name: Arm(model=f"tickets@{i}", digest=f"t{i}", weight=w) for i, (name, w) in enumerate(weights.items(), 1)}
    return Split(arms=arms, salt=salt, key=("user",), since=4)


KEYS = [f"user-{number}" for number in range(50_000)]


def test_keys_are_divided_by_weight_and_always_get_the_same_arm() -> None:
    split = _split(a=70, b=20, c=10)
    arms = [split.arm_of(key) for key in KEYS]
    assert [split.arm_of(key) for key in KEYS[:1000]] == arms[:1000]
    shares = {arm: arms.count(arm) / len(KEYS) for arm in split.arms}
    # 0.009 is more than four standard deviations of a share of 50,000 keys.
    assert shares == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1}, abs=0.009)


def test_one_changed_weight_moves_nobody_between_the_other_arms() -> None:
    before, after = _split(a=70, b=20, c=10), _split(a=70, b=20, c=40)
    moves = {(before.arm_of(key), after.arm_of(key)) for key in KEYS}
    assert moves == {("a", "a"), ("b", "b"), ("c", "c"), ("a", "c"), ("b", "c")}
    gone = _split(a=70, b=20, c=0)
    assert {(before.arm_of(key), gone.arm_of(key)) for key in KEYS} == {("a", "a"), ("b", "b"), ("c", "a"), ("c", "b")}


def test_splits_with_different_salts_divide_independently() -> None:
    one, other = _split("one", a=50, b=50), _split("other", a=50, b=50)
    both = sum(one.arm_of(key) == other.arm_of(key) for key in KEYS) / len(KEYS)
    assert both == pytest.approx(0.5, abs=0.01)


def test_salt_arm_and_key_cannot_run_into_each_other() -> None:
    draws = {_split("ab", c=1, x=1)._draw("c", "k"), _split("a", bc=1, x=1)._draw("bc", "k")}
    assert len(draws) == 2
    assert _split(a=1, b=1).arm_of("\ud800") in ("a", "b")


def test_a_bare_name_means_its_split_first_and_a_version_bypasses_it() -> None:
    routes = Routes("tiny", "b0", ROUTES.labels, ROUTES.aliases, {"tickets": _split(a=50, b=50)})
    targets = {resolve("tickets", routes, key).model for key in KEYS[:100]}
    assert targets == {"tickets@1", "tickets@2"}
    target = resolve("tickets", routes)
    assert (target.model, target.split, target.arm, target.assignment) == ("tickets@1", "tickets", "a", 4)
    assert "no key" in target.by
    assert resolve("tickets@2", routes, "user-1").split is None
    assert ("tickets", "t1") in routes.names()


def test_what_resolved_is_explained() -> None:
    said = [resolve(name, ROUTES).by for name in ("tiny", "tickets@2", "tickets", "mine")]
    assert said == [
        "the base model's own name",
        "its version",
        "adapter name 'tickets'",
        "adapter name 'mine'",
    ]


def test_an_arm_of_another_base_is_refused_and_an_arm_without_weight_gets_nobody() -> None:
    old = Split(arms={"a": Arm(model="old", digest="OLD", weight=1, is_base=True)}, salt="s", key=("user",))
    with pytest.raises(UnknownModelError, match="another base model"):
        resolve("x", Routes("tiny", "b0", splits={"x": old}), "user-1")
    assert _split(a=0, b=1).arm_of(None) == "b"


def test_an_adapter_from_a_uri_answers_to_its_label_and_to_its_exact_name_only() -> None:
    source = Source(uri="/adapters/mine", base_digest="b0", files={})
    entry = Registered(model="mine@sha256-123456789012", digest="m1", source=source)
    routes = Routes("tiny", "b0", {"mine": entry}, {})
    by_label, exact = resolve("mine", routes), resolve("mine@sha256-123456789012", routes)
    assert (by_label.model, by_label.digest, by_label.label) == (entry.model, "m1", "mine")
    assert (exact.model, exact.digest, exact.label) == (entry.model, "m1", None)
    assert ("mine@sha256-123456789012", "m1") in routes.names()
    for name in ("mine@123456789012", "mine@sha256-123456789013", "mine@production", "mine@1"):
        with pytest.raises(UnknownModelError):
            resolve(name, routes)


def test_an_alias_that_has_moved_is_answered_by_who_follows_it_until_that_has_followed() -> None:
    entry = Registered(model="tickets@1", digest="t1", follows="tickets@production")
    before = Routes("tiny", "b0", {"tickets": entry}, {"tickets": {"production": 2, "canary": 3}})
    for name in ("tickets", "tickets@production"):
        target = resolve(name, before)
        assert (target.model, target.digest, target.label) == ("tickets@1", "t1", "tickets")
    with pytest.raises(UnknownModelError):
        resolve("tickets@canary", before)  # nobody here follows that one
    followed = entry.model_copy(update={"model": "tickets@2", "digest": "t2"})
    target = resolve("tickets", Routes("tiny", "b0", {"tickets": followed}, before.aliases))
    assert (target.model, target.label) == ("tickets@2", "tickets"), (
        "while tickets@2 loads, the label's old one answers"
    )
