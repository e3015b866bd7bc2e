"""Request bodies: what is wrong is named, all at once, by its field; what is unknown is named; nothing is ignored."""

import json
from typing import Any

import pytest

from serve.openai_answers import Answer, Usage, error_answer, ignored_header
from serve.openai_api import parse_chat
from serve.routing import UnknownModelError
from service.errors import (
    ClusterError,
    ConfigError,
    ConflictError,
    ModelError,
    NotFoundError,
    RequestError,
    StorageError,
    TrainingError,
)

GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def body(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def test_a_short_body_gets_openais_defaults() -> None:
    request = parse_chat(body())
    assert (request.temperature, request.top_p, request.seed, request.stop) == (1.0, 1.0, None, ())
    assert (request.max_tokens, request.stream, request.include_usage, request.ignored) == (None, False, False, ())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": "x" * 201}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"seed": 1.0}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ["a", None]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body(**fields))
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"model": "a", "model": "b"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(raw)


def test_one_key_twice_among_a_hundred_thousand_is_found() -> None:
    keys = ",".join(f'"k{i}":0' for i in range(100_000))
    with pytest.raises(RequestError, match='"k99999" stands twice'):
        parse_chat(f'{{{keys},"k99999":1}}'.encode())


def test_what_is_wrong_with_thousands_of_messages_is_a_short_text() -> None:
    with pytest.raises(RequestError, match="holds 500000 messages, at most 4096") as caught:
        parse_chat(body(messages=[1] * 500_000))
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match=r"messages\[19\]: .* \.\.\. and 4076 more problems\.$") as caught:
        parse_chat(body(messages=[1] * 4096))
    assert len(str(caught.value)) < 4000


def test_the_parts_of_all_messages_together_are_bounded() -> None:
    part = {"type": "text", "text": "a"}
    message = {"role": "user", "content": [part] * 2048}
    assert len(parse_chat(body(messages=[message, message])).messages) == 2
    with pytest.raises(RequestError, match=r"messages\[2\]\.content: all messages together have more than 4096 parts"):
        parse_chat(body(messages=[message, message, message]))
    with pytest.raises(RequestError) as caught:
        parse_chat(body(messages=[{"role": "user", "content": [1] * 4096}] * 100))
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("depth", [500, 900, 980, 990, 1000, 2000])
def test_a_value_nested_too_deeply_to_be_shown_is_refused(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    with pytest.raises(RequestError):
        parse_chat(body(stop="@").replace(b'"@"', nested))


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(RequestError, match="temperature"):
        parse_chat(body(temperature="@").replace(b'"@"', b"1e999"))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body(temperature=9, stop="", messages=[]))
    for field in ("temperature", "stop", "messages"):
        assert f"{field}: " in str(caught.value)


def test_neutral_values_of_unsupported_fields_and_fields_without_effect_pass() -> None:
    request = parse_chat(
        body(
            n=1,
            logprobs=False,
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            logit_bias=None,
            presence_penalty=0.0,
            frequency_penalty=0,
            user="me",
            metadata={"a": "b"},
            store=True,
            temperature=None,
        )
    )
    assert request.ignored == ()
    assert request.temperature == 1.0


def test_unknown_fields_are_named_wherever_they_stand() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "mark": 1}], "mood": "gay"}]
    request = parse_chat(body(top_k=5, messages=messages, stream=True, stream_options={"colour": 1}))
    assert set(request.ignored) == {
        "top_k",
        "messages[0].mood",
        "messages[0].content[0].mark",
        "stream_options.colour",
    }


def test_text_parts_are_joined_and_a_clients_own_answer_can_be_sent_back() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    dumped: dict[str, Any] = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    request = parse_chat(body(messages=[{"role": "developer", "content": parts}, dumped]))
    assert request.messages == ({"role": "system", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    assert request.ignored == ()


def test_stop_is_a_text_or_a_list() -> None:
    assert parse_chat(body(stop="a")).stop == ("a",)
    assert parse_chat(body(stop=["a", "b"])).stop == ("a", "b")
    assert parse_chat(body(stop=[])).stop == ()


def test_max_completion_tokens_is_max_tokens() -> None:
    request = parse_chat(body(max_completion_tokens=5))
    assert (request.max_tokens, request.max_tokens_field) == (5, "max_completion_tokens")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x", "stop"), 400),
        (ConfigError("x"), 400),
        (ModelError("x"), 400),
        (NotFoundError("x"), 404),
        (ConflictError("x"), 409),
        (StorageError("x"), 503),
        (ClusterError("x"), 503),
        (TimeoutError("x"), 504),
        (TrainingError("x"), 500),
        (ZeroDivisionError("secret"), 500),
    ],
)
def test_each_error_has_its_status_and_openais_shape(error: Exception, status: int) -> None:
    got, answer = error_answer(error, "err-1")
    assert got == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == ("stop" if isinstance(error, RequestError) else None)


def test_an_unexpected_error_shows_its_id_and_not_its_text() -> None:
    _, answer = error_answer(ZeroDivisionError("secret"), "err-1")
    assert "secret" not in json.dumps(answer)
    assert answer["error"]["code"] == "err-1"


def test_an_unknown_model_has_openais_code() -> None:
    _, answer = error_answer(UnknownModelError("x"), "err-1")
    assert (answer["error"]["param"], answer["error"]["code"]) == ("model", "model_not_found")


def test_bodies_name_the_model_and_its_digest() -> None:
    answer = Answer("chatcmpl-1", 5, "tickets@1", "d1")
    whole = answer.completion("Hi", "stop", Usage(3, 2))
    assert (whole["model"], whole["loray"], whole["usage"]["total_tokens"]) == ("tickets@1", {"model_digest": "d1"}, 5)
    chunk = json.loads(answer.chunk({"content": "Hi"}, with_usage=True).removeprefix("data: "))
    assert (chunk["object"], chunk["usage"], chunk["model"]) == ("chat.completion.chunk", None, "tickets@1")


def test_the_header_of_ignored_names_is_one_line_of_ascii() -> None:
    value = ignored_header(["a\r\nset-cookie: x", "größe", "y" * 5000])
    assert value.isascii()
    assert value.isprintable()
    assert len(value) < 1100
