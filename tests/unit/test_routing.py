"""A requested name means one Model or nothing: never a guess, never "latest"."""

import pickle

import pytest

from serve.routing import Registered, Routes, UnknownModelError, resolve

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


def test_a_bare_name_means_its_alias_production_before_a_label() -> None:
    assert resolve("tickets", ROUTES).model == "tickets@1"


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


def test_a_label_hidden_by_an_alias_that_leads_nowhere_is_not_listed() -> None:
    routes = Routes("tiny", "b0", ROUTES.labels, {"tickets": {"production": 3}})
    with pytest.raises(UnknownModelError, match="means tickets@3, which is not registered"):
        resolve("tickets", routes)
    assert [name for name, _ in routes.names()] == ["tiny", "mine", "tickets@1", "team/other@10", "tickets@2"]


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnknownModelError("x")))  # noqa: S301 - our own bytes
    assert isinstance(error, UnknownModelError)
    assert str(error) == "x"
