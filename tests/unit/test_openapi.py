"""The document and the parsers agree: the same fields, the same bounds, the same values accepted and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from serve.field_kinds import Kind
from serve.openai_api import CHAT, MESSAGE, TEXT, parse_chat, parse_text
from serve.openapi import document
from serve.registration import ADAPTER, parse_wanted
from serve.splits import SPLIT, parse_split
from service.errors import RequestError

DOCUMENT = document("test", with_keys=False)
MESSAGES = [{"role": "user", "content": "Hi"}]
ARMS = {"a": {"model": "tickets@3", "weight": 1}}

Parse = Callable[[dict[str, Any]], tuple[str, ...]]  # a body to the fields that are ignored


def _chat(body: dict[str, Any]) -> tuple[str, ...]:
    return parse_chat(json.dumps(body).encode()).ignored


def _text(body: dict[str, Any]) -> tuple[str, ...]:
    return parse_text(json.dumps(body).encode()).ignored


def _split(body: dict[str, Any]) -> tuple[str, ...]:
    return parse_split(body).ignored


def _adapter(body: dict[str, Any]) -> tuple[str, ...]:
    return parse_wanted(body).ignored


REQUESTS: list[tuple[str, dict[str, Kind], Parse, dict[str, Any]]] = [
    ("ChatRequest", CHAT, _chat, {"model": "m", "messages": MESSAGES}),
    ("TextRequest", TEXT, _text, {"model": "m", "prompt": "a"}),
    ("AdapterRequest", ADAPTER, _adapter, {"model": "tickets@3"}),
    ("SplitRequest", SPLIT, _split, {"arms": ARMS}),
]
# A value of a field that is right only beside another field.
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "max_tokens": {"echo": True},
    "uri": {"model": None},
    "base_model": {"uri": "/adapters/a", "model": None},
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 20, 21, 128, 129, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1,
    0.0, 0.01, 0.009, 0.5, 1.5, 2.0, 2.1, -2.0, -2.1, 10.0, 10.1, 1e300,
    "", "a", "none", "auto", "high", "x" * 200, "x" * 201, "user", "header:x-key", "cookie",
    [], [1], [0, 2**31], [""], ["a"], ["a", [1]], [1, "a"], [True], [[]], [[1]], ["a"] * 4, ["a"] * 5, ["a"] * 129,
    [1] * 1024, [1] * 1025, ["text"], ["user"], ["user", "cookie"], ["user"] * 17, [None],
    {}, {"5": 100}, {"5": 101}, {"5": True}, {"five": 1}, {"5" * 9: 1}, {"5" * 10: 1}, {str(i): 0 for i in range(1025)},
    {"include_usage": True}, {"include_usage": 1}, {"include_usage": None, "colour": 1},
    {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "grammar"},
    {"type": "json_schema", "json_schema": {"schema": {}}}, {"type": "json_schema", "json_schema": {"schema": 3}},
    MESSAGES, [{"role": "user"}], [{"role": "robot", "content": "a"}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "text", "text": ""}]}], [{"role": "user", "content": [{"type": "image"}]}],
    [{**MESSAGES[0], "name": "bob"}], [{**MESSAGES[0], "tool_calls": []}], [{**MESSAGES[0], "mood": "gay"}],
    ARMS, {"a": {"model": "m", "weight": 1e9}}, {"a": {"model": "m", "weight": 1.1e9}}, {"a": {"model": "m"}},
    {"A": ARMS["a"]}, {"a..b": ARMS["a"]}, {"a": "tickets@3"}, {f"a{i}": ARMS["a"] for i in range(16)},
    {f"a{i}": ARMS["a"] for i in range(17)},
]  # fmt: skip
LARGE: dict[str, list[Any]] = {"messages": [MESSAGES * 4096, MESSAGES * 4097]}


def _is_integer(checker: object, value: Any) -> bool:
    """Written without a point, as the document's introduction says; to JSON Schema 1.0 is one, too."""
    return isinstance(value, int) and not isinstance(value, bool)


def _validator(name: str) -> Any:
    strict = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=strict)
    return validator(DOCUMENT["components"]["schemas"][name])


@pytest.mark.parametrize(("name", "kinds", "parse", "body"), REQUESTS, ids=[row[0] for row in REQUESTS])
def test_document_and_parser_know_the_same_fields(
    name: str, kinds: dict[str, Kind], parse: Parse, body: dict[str, Any]
) -> None:
    properties = DOCUMENT["components"]["schemas"][name]["properties"]
    asked = {*properties, *MESSAGE, "top_z", "messages", "prompt", "arms"}
    ignored = parse({**dict.fromkeys(asked - set(body)), **body})
    assert set(ignored) == asked - set(properties)
    assert set(properties) == set(kinds)


@pytest.mark.parametrize(("name", "kinds", "parse", "body"), REQUESTS, ids=[row[0] for row in REQUESTS])
def test_document_and_parser_accept_the_same_values(
    name: str, kinds: dict[str, Kind], parse: Parse, body: dict[str, Any]
) -> None:
    validator, num_right, num_wrong = _validator(name), 0, 0
    for field in kinds:
        for value in VALUES + LARGE.get(field, []):
            beside = BESIDE.get(field, {}) if value is not None else {}
            asked = {**body, **{k: v for k, v in beside.items() if k in kinds}, field: value}
            try:
                parse(asked)
                accepted = True
            except RequestError as error:
                assert field in str(error.param)
                accepted = False
            assert validator.is_valid(asked) == accepted, (field, str(value)[:80])
            num_right, num_wrong = num_right + accepted, num_wrong + (not accepted)
    assert min(num_right, num_wrong) > len(kinds)


@pytest.mark.parametrize(("name", "kinds", "parse", "body"), REQUESTS, ids=[row[0] for row in REQUESTS])
def test_without_a_required_field_both_refuse(
    name: str, kinds: dict[str, Kind], parse: Parse, body: dict[str, Any]
) -> None:
    validator = _validator(name)
    assert validator.is_valid(body)
    for field in body:
        without = {key: value for key, value in body.items() if key != field}
        assert not validator.is_valid(without)
        with pytest.raises(RequestError):
            parse(without)


def test_every_schema_is_a_schema_and_every_reference_leads_somewhere() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for text in json.dumps(DOCUMENT).split('"$ref": "#/')[1:]:
        place: Any = DOCUMENT
        for part in text.partition('"')[0].split("/"):
            place = place[part]


def test_keys_and_their_answers_are_told_where_there_are_keys() -> None:
    locked = document("test", with_keys=True)
    for path, operations in locked["paths"].items():
        for method, operation in operations.items():
            open_here = DOCUMENT["paths"][path][method]
            assert "security" not in open_here and "401" not in open_here["responses"]
            scopes = [scope for one in operation["security"] for scope in one["key"]]
            assert (scopes == []) == (path == "/healthz") == ("401" not in operation["responses"])
