"""Request bodies: what is wrong is named, all at once, by its field; what is unknown is named; nothing is ignored."""

import json
from dataclasses import replace
from typing import Any

import pytest

from serve.openai_answers import Answer, Usage, error_answer, ignored_header
from serve.openai_api import MAX_CHOICES, parse_chat, parse_text
from serve.parts import Scored
from serve.routing import UnknownModelError
from service.errors import (
    BusyError,
    ClusterError,
    ConfigError,
    ConflictError,
    ModelError,
    NotFoundError,
    RequestError,
    StorageError,
    TrainingError,
)
from service.inference.engine import SamplingParams

GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def body(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def test_a_short_body_gets_openais_defaults() -> None:
    request = parse_chat(body())
    assert request.sampling == SamplingParams(max_tokens=1)
    assert (request.n, request.echo, request.is_chat) == (1, False, True)
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
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
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
        '{"model": "a"}'.encode("utf-16"),
        b'{"model": "\xed\xa0\x80", "messages": []}',  # half a surrogate pair, not even written as JSON writes it
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
    assert len(parse_chat(body(messages=[message, message])).prompts[0]) == 2
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
    assert request.sampling == SamplingParams(max_tokens=1)


def test_unknown_fields_are_named_wherever_they_stand() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "mark": 1}], "mood": "gay"}]
    request = parse_chat(body(top_z=5, messages=messages, stream=True, stream_options={"colour": 1}))
    assert set(request.ignored) == {
        "top_z",
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
    assert request.prompts[0] == ({"role": "system", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
    assert request.ignored == ()


def test_stop_is_a_text_or_a_list() -> None:
    assert parse_chat(body(stop="a")).sampling.stop == ("a",)
    assert parse_chat(body(stop=["a", "b"])).sampling.stop == ("a", "b")
    assert parse_chat(body(stop=[])).sampling.stop == ()


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
        (BusyError("x"), 429),
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


@pytest.mark.parametrize(
    "raw", [b'{"\\ud800": 1, "\\ud800": 2}', b'{"model": "\\udfff", "messages": [{"role": "\\ud800"}]}']
)
def test_half_a_surrogate_pair_in_a_body_can_be_told_of(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(raw)
    _, answer = error_answer(caught.value, "err-1")
    assert json.dumps(answer, ensure_ascii=False).encode()


def test_an_unexpected_error_shows_its_id_and_not_its_text() -> None:
    _, answer = error_answer(ZeroDivisionError("secret"), "err-1")
    assert "secret" not in json.dumps(answer)
    assert answer["error"]["code"] == "err-1"


def test_an_unknown_model_has_openais_code() -> None:
    _, answer = error_answer(UnknownModelError("x"), "err-1")
    assert (answer["error"]["param"], answer["error"]["code"]) == ("model", "model_not_found")


def test_bodies_name_the_model_and_its_digest() -> None:
    answer = Answer("chatcmpl-1", 5, "tickets@1", "d1")
    whole = answer.whole([answer.choice(0, "Hi", "stop", None)], Usage(3, 2))
    assert (whole["model"], whole["loray"], whole["usage"]["total_tokens"]) == ("tickets@1", {"model_digest": "d1"}, 5)
    chunk = json.loads(answer.chunk(0, "Hi", with_usage=True).removeprefix("data: "))
    assert (chunk["object"], chunk["usage"], chunk["model"]) == ("chat.completion.chunk", None, "tickets@1")


def test_every_way_to_sample_is_read() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["a"], "stop_token_ids": [4, 5],
        "ignore_eos": True, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {"5": -100, "6": 1.5},
    }  # fmt: skip
    expected = SamplingParams(
        max_tokens=1, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop=("a",), stop_ids=(4, 5),
        ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias=((5, -100.0), (6, 1.5)),
    )  # fmt: skip
    chat = parse_chat(body(**fields, n=3, logprobs=True, top_logprobs=2))
    assert chat.sampling == replace(expected, logprobs=2) and chat.n == 3
    text = parse_text(json.dumps({"model": "m", "prompt": "a", **fields, "logprobs": 4, "echo": True}).encode())
    assert text.sampling == replace(expected, logprobs=4, prompt_logprobs=4) and text.echo
    assert chat.ignored == text.ignored == ()


def test_a_schema_is_taken_as_it_is_and_json_object_is_any_object() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True, "colour": 1}}
    request = parse_chat(body(response_format=wanted))
    assert json.loads(request.sampling.json_schema or "") == schema
    assert request.ignored == ("response_format.json_schema.colour",)
    request = parse_chat(body(response_format={"type": "json_object"}))
    assert json.loads(request.sampling.json_schema or "") == {"type": "object"}


def _text(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "a", **fields}).encode()


BAD_PROMPTS: list[Any] = [None, "", [], [[]], [""], [1, "a"], [[1], [True]], [-1], 5, {}, "\ud800"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1, 2], [3]], ((1, 2), (3,)))],
)
def test_prompts_are_texts_or_token_ids_one_or_several(prompt: Any, expected: Any) -> None:
    assert parse_text(_text(prompt=prompt)).prompts == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[({"prompt": bad}, "prompt") for bad in BAD_PROMPTS],
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_a_bad_field_of_a_text_request_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_text(_text(**fields))
    assert caught.value.param == param


def test_a_text_request_has_its_own_defaults() -> None:
    request = parse_text(_text())
    assert (request.max_tokens, request.sampling.logprobs, request.sampling.prompt_logprobs) == (16, None, None)
    scoring = parse_text(_text(echo=True, max_tokens=0, logprobs=1))
    assert (scoring.max_tokens, scoring.sampling.prompt_logprobs) == (0, 1)
    assert parse_text(_text(echo=True, max_tokens=0)).sampling.prompt_logprobs == 0
    assert len(parse_text(_text(prompt=["a"] * MAX_CHOICES)).prompts) == MAX_CHOICES
    assert parse_text(_text(messages=[], response_format={})).ignored == ("messages", "response_format")


def test_log_probabilities_have_openais_two_shapes() -> None:
    scored = [Scored("a", None), Scored("bc", -0.5, (("bc", -0.5), ("é", -2.0)))]
    text = Answer("cmpl-1", 5, "m", "d", is_chat=False).choice(0, "abc", "length", scored)
    assert text["logprobs"] == {
        "tokens": ["a", "bc"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"bc": -0.5, "é": -2.0}],
        "text_offset": [0, 1],
    }
    chat = Answer("chatcmpl-1", 5, "m", "d").choice(0, "bc", "stop", scored[1:])
    (entry,) = chat["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("bc", -0.5, [98, 99])
    assert [top["token"] for top in entry["top_logprobs"]] == ["bc", "é"]
    assert entry["top_logprobs"][1]["bytes"] == [195, 169]


def test_the_header_of_ignored_names_is_one_line_of_ascii() -> None:
    value = ignored_header(["a\r\nset-cookie: x", "größe", "y" * 5000])
    assert value.isascii()
    assert value.isprintable()
    assert len(value) < 1100
