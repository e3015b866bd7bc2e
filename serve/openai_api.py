"""OpenAI's requests for text: a body checked into an `Ask`, all problems at once. Chat and (older) text completions.

Pure: bytes in, values out; no Ray, no HTTP framework. Nothing in a body is ignored in silence: a known field that would
change the answer and is not supported is an error unless its value is neutral, a field without effect on the answer is
accepted, and a field nobody knows is named in `Ask.ignored`. What goes back is in `openai_answers.py`.
Fields: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create; beyond OpenAI's, under the
names that vLLM's server gave them: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.field_kinds import (
    ANYTHING,
    BOOLEAN,
    INT64,
    Kind,
    either,
    integer,
    is_text,
    listed,
    mapped,
    neutral,
    number,
    object_schema,
    one_of,
    text,
)
from serve.openai_fields import Fields, parse_object, shown
from service.inference.engine import MAX_LOGPROBS, SamplingParams

MAX_STOPS = 4
MAX_NAME = 200
MAX_CHOICES = 128  # answers to one request: prompts times n
MAX_BIASES = 1024
MAX_METADATA, MAX_METADATA_VALUE = 64, 512  # entries; characters, OpenAI's own limit
# A body of 4 MiB can hold two million messages, each of them wrong; what is read and told of it is bounded.
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # over all messages


def _described(kind: Kind, description: str) -> Kind:
    """The kind with a rule that its schema cannot say."""
    return replace(kind, schema={**kind.schema, "description": description})


def _format_of(value: Any) -> str | None:
    """The type of a whole `response_format`."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        inner = value.get("json_schema")
        return kind if isinstance(inner, dict) and JSON_SCHEMA["schema"].takes(inner.get("schema")) else None
    return kind if kind in ("text", "json_object") else None


# `developer` is OpenAI's newer word for `system`; chat templates know only the older one.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_DEFAULT_TEXT_TOKENS = 16  # what /v1/completions has always meant by no max_tokens

_TOKEN = replace(integer(0, 2**31 - 1), wanted="a token id")
_BIAS = number(-100, 100)
_TOKENS = listed(_TOKEN, least=1)
_PROMPT = either(text(), _TOKENS)
_PENALTY = number(-2.0, 2.0, default=0.0)
PART = {"type": one_of("text", required=True), "text": Kind("a text", {"type": "string"}, is_text, required=True)}
# An assistant's message dumped by OpenAI's client carries the unsupported ones as null or [].
MESSAGE = {
    "role": one_of(*ROLES, required=True),
    "content": Kind(  # part by part: `_Reader.content`
        "a text or a list of text parts",
        {"anyOf": [PART["text"].schema, {"type": "array", "minItems": 1, "items": object_schema(PART)}]},
        lambda value: is_text(value) or bool(isinstance(value, list) and value),
        required=True,
    ),
    "name": neutral(),
    "tool_calls": neutral([]),
    "tool_call_id": neutral(),
    "function_call": neutral(),
    "refusal": neutral(),
    "audio": neutral(),
    "annotations": neutral([]),
}
STREAM_OPTIONS = {
    "include_usage": BOOLEAN,
    # Padding against traffic analysis on the open internet; the answer is the same.
    "include_obfuscation": ANYTHING,
}
JSON_SCHEMA = {
    "schema": Kind(
        "a JSON schema, an object", {"type": "object"}, lambda value: isinstance(value, dict), required=True
    ),
    "name": ANYTHING,
    "description": ANYTHING,
    "strict": ANYTHING,
}
_RESPONSE_FORMATS: tuple[dict[str, Kind], ...] = (
    {"type": one_of("text", "json_object", required=True)},
    {
        "type": one_of("json_schema", required=True),
        "json_schema": Kind("an object with a schema", object_schema(JSON_SCHEMA), required=True),
    },
)
_READ: dict[str, Kind] = {
    "model": replace(
        text(MAX_NAME, required=True),
        wanted=f"a model's name of at most {MAX_NAME} characters (GET /v1/models lists them)",
    ),
    "temperature": number(0.0, 2.0, default=1.0),
    "top_p": number(0.0, 1.0, default=1.0, above=True),
    "top_k": _described(integer(-1), "0 and -1: all tokens"),
    "min_p": number(0.0, 1.0, default=0.0),
    "seed": integer(-INT64),
    "stop": either(text(), listed(text(), most=MAX_STOPS)),
    "stop_token_ids": listed(_TOKEN, most=MAX_BIASES),
    "ignore_eos": BOOLEAN,
    "n": _described(integer(1, MAX_CHOICES, default=1), f"answers to each prompt, {MAX_CHOICES} in all"),
    "logit_bias": mapped("token ids", "[0-9]{1,9}", _BIAS, MAX_BIASES),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": number(0.01, 10.0, default=1.0),
    "stream": BOOLEAN,
    "stream_options": _described(
        Kind("an object", object_schema(STREAM_OPTIONS), lambda value: isinstance(value, dict)),
        "only with stream: true",
    ),
    # Without effect on the answer; texts among user, safety_identifier and metadata may be a split's key.
    "user": ANYTHING,
    "metadata": ANYTHING,
    "store": ANYTHING,
    "service_tier": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    "prediction": ANYTHING,
    "parallel_tool_calls": ANYTHING,
}
CHAT: dict[str, Kind] = {
    **_READ,
    "messages": Kind(  # one by one: `_Reader.messages`
        "a list of at least one message",
        {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": object_schema(MESSAGE)},
        lambda value: bool(isinstance(value, list) and value),
        required=True,
    ),
    "max_tokens": _described(integer(1), "left out: as many as the context holds"),
    "max_completion_tokens": _described(integer(1), "OpenAI's newer word for max_tokens"),
    "logprobs": BOOLEAN,
    "top_logprobs": _described(integer(0, MAX_LOGPROBS), "only with logprobs: true"),
    "response_format": Kind(  # `_Reader.json_schema`
        '{"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}, or of type "json_object" or "text"',
        {"anyOf": [object_schema(kinds) for kinds in _RESPONSE_FORMATS]},
        lambda value: _format_of(value) is not None,
    ),
    # Known, not supported: the values that ask for nothing.
    "tools": neutral([]),
    "tool_choice": neutral("none", "auto"),
    "functions": neutral([]),
    "function_call": neutral("none", "auto"),
    "modalities": neutral(["text"]),
    "audio": neutral(),
    "reasoning_effort": neutral("none"),
    "verbosity": neutral(),
    "web_search_options": neutral(),
}
TEXT: dict[str, Kind] = {
    **_READ,
    "prompt": either(_PROMPT, listed(_PROMPT, least=1, most=MAX_CHOICES), required=True),
    "max_tokens": _described(integer(0, default=_DEFAULT_TEXT_TOKENS), "0 only with echo: true"),
    "echo": BOOLEAN,
    "logprobs": integer(0, MAX_LOGPROBS),
    "suffix": neutral(""),
    "best_of": neutral(1),
}

Messages = tuple[dict[str, str], ...]
Prompt = Messages | str | tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A checked body: `n` answers to each prompt. Chat has one prompt, its messages.

    `max_tokens` None = as many as the context holds (`sampling.max_tokens` means nothing yet); `ignored` are the fields
    nobody knows; `about` says who asks: the texts among user, safety_identifier and metadata.NAME.
    """

    model: str
    is_chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    echo: bool
    max_tokens: int | None
    max_tokens_field: str
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]
    about: Mapping[str, str]

    @property
    def prompt_field(self) -> str:
        """Where the prompts stand in the body."""
        return "messages" if self.is_chat else "prompt"


def parse_chat(body: bytes) -> Ask:
    """The chat request in `body`, or RequestError that lists every problem and names the first one's field."""
    reader = _Reader(parse_object(body), CHAT)
    values = reader.values
    max_tokens, field = reader.max_tokens()
    logprobs = (values["top_logprobs"] or 0) if values["logprobs"] else None
    if logprobs is None and values["top_logprobs"]:
        reader.problem("top_logprobs", "is allowed only together with logprobs: true.")
    sampling = reader.sampling(json_schema=reader.json_schema(), logprobs=logprobs)
    return reader.ask(True, (reader.messages(),), False, max_tokens, field, sampling)


def parse_text(body: bytes) -> Ask:
    """The text completion request in `body`, or RequestError as for `parse_chat`."""
    reader = _Reader(parse_object(body), TEXT)
    values = reader.values
    echo, logprobs, max_tokens = values["echo"], values["logprobs"], values["max_tokens"]
    if not max_tokens and not echo:
        reader.problem("max_tokens", "must be at least 1, not 0, unless echo is true.")
    # Without log-probabilities the prompt is not looked at, but an answer of no tokens needs the right to be one.
    prompt_logprobs = logprobs if echo and logprobs is not None else 0 if echo and max_tokens == 0 else None
    sampling = reader.sampling(logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return reader.ask(False, reader.prompts(), echo, max_tokens, "max_tokens", sampling)


class _Reader(Fields):
    """What both requests are made of."""

    num_parts = 0

    def ask(
        self,
        is_chat: bool,
        prompts: tuple[Prompt, ...],
        echo: bool,
        max_tokens: int | None,
        max_tokens_field: str,
        sampling: SamplingParams,
    ) -> Ask:
        n, stream = self.values["n"], self.values["stream"]
        if n * len(prompts) > MAX_CHOICES:
            self.problem("n", f"{len(prompts)} prompts with {n} answers each: at most {MAX_CHOICES} are made at once.")
        include_usage = self.include_usage(stream)
        self.raise_problems()
        return Ask(
            model=self.values["model"],
            is_chat=is_chat,
            prompts=prompts,
            n=n,
            echo=echo,
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            sampling=sampling,
            stream=stream,
            include_usage=include_usage,
            ignored=tuple(self.ignored),
            about=self.about(),
        )

    def about(self) -> dict[str, str]:
        values = {name: self.values[name] for name in ("user", "safety_identifier")}
        metadata = self.values["metadata"]
        if isinstance(metadata, dict) and len(metadata) <= MAX_METADATA:
            values |= {f"metadata.{name}": value for name, value in metadata.items()}
        return {name: value[:MAX_METADATA_VALUE] for name, value in values.items() if is_text(value) and value}

    def sampling(self, **more: Any) -> SamplingParams:
        values = self.values
        return SamplingParams(
            max_tokens=1,
            temperature=float(values["temperature"]),
            top_p=float(values["top_p"]),
            top_k=max(values["top_k"] or 0, 0),  # -1 is vLLM's word for all
            min_p=float(values["min_p"]),
            seed=values["seed"],
            stop=self.stop(),
            stop_ids=tuple(values["stop_token_ids"] or ()),
            ignore_eos=values["ignore_eos"],
            repetition_penalty=float(values["repetition_penalty"]),
            presence_penalty=float(values["presence_penalty"]),
            frequency_penalty=float(values["frequency_penalty"]),
            logit_bias=tuple((int(token), float(bias)) for token, bias in (values["logit_bias"] or {}).items()),
            **more,
        )

    def stop(self) -> tuple[str, ...]:
        value = self.values["stop"] or ()
        return (value,) if isinstance(value, str) else tuple(value)

    def json_schema(self) -> str | None:
        value = self.values["response_format"]
        kind = "text" if value is None else _format_of(value)
        if kind != "json_schema":
            return '{"type": "object"}' if kind == "json_object" else None
        inner = self.look_at(value["json_schema"], JSON_SCHEMA, "response_format.json_schema.")
        return json.dumps(inner["schema"])

    def prompts(self) -> tuple[Prompt, ...]:
        value = self.values["prompt"] or []
        several = [value] if isinstance(value, str) or (value and isinstance(value[0], int)) else value
        return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in several)

    def max_tokens(self) -> tuple[int | None, str]:
        old, new = self.values["max_tokens"], self.values["max_completion_tokens"]
        if old is not None and new is not None and old != new:
            self.problem("max_completion_tokens", f"is {new} while max_tokens is {old}. Send one of the two.")
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")

    def include_usage(self, stream: bool) -> bool:
        options = self.values["stream_options"]
        if options is None:
            return False
        if not stream:
            self.problem("stream_options", "is allowed only together with stream: true.")
        return bool(self.look_at(options, STREAM_OPTIONS, "stream_options.")["include_usage"])

    def messages(self) -> tuple[dict[str, str], ...]:
        value = self.values["messages"] or []
        if len(value) > MAX_MESSAGES:
            self.problem("messages", f"holds {len(value)} messages, at most {MAX_MESSAGES} are taken. Send fewer.")
            return ()
        return tuple(self._message(f"messages[{i}]", message) for i, message in enumerate(value))

    def _message(self, at: str, message: Any) -> dict[str, str]:
        if not isinstance(message, dict):
            self.problem(at, f"must be an object with role and content, not {shown(message)}.")
            return {}
        values = self.look_at(message, MESSAGE, f"{at}.")
        return {"role": ROLES[values["role"] or "user"], "content": self._content(f"{at}.content", values["content"])}

    def _content(self, at: str, content: str | list[Any] | None) -> str:
        if content is None or isinstance(content, str):
            return content or ""
        self.num_parts += len(content)
        if self.num_parts > MAX_PARTS:
            self.problem(at, f"all messages together have more than {MAX_PARTS} parts. Join the texts, or send fewer.")
            return ""
        texts = []
        for i, part in enumerate(content):
            if isinstance(part, dict) and all(kind.takes(part.get(name)) for name, kind in PART.items()):
                texts.append(self.look_at(part, PART, f"{at}[{i}].")["text"])
            else:
                self.problem(f"{at}[{i}]", f'must be {{"type": "text", "text": "..."}}, not {shown(part)}.')
        return "".join(texts)
