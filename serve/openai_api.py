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
from dataclasses import dataclass
from typing import Any

from serve.openai_fields import Fields, is_text, parse_object, shown
from service.inference.engine import MAX_LOGPROBS, SamplingParams

MAX_STOPS = 4
MAX_NAME = 200
MAX_CHOICES = 128  # answers to one request: prompts times n
MAX_BIASES = 1024
MAX_METADATA, MAX_METADATA_VALUE = 64, 512  # entries; characters, OpenAI's own limit
# A body of 4 MiB can hold two million messages, each of them wrong; what is read and told of it is bounded.
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # over all messages
# `developer` is OpenAI's newer word for `system`; chat templates know only the older one.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_READ = frozenset(
    [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "n",
        "logprobs",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "stream",
        "stream_options",
    ]
)
_READ_BY_CHAT = _READ | {"messages", "top_logprobs", "response_format"}
_READ_BY_TEXT = (_READ - {"max_completion_tokens"}) | {"prompt", "echo"}
_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    ]
)
# Known, not supported: the values that ask for nothing. `null` is neutral everywhere.
_NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_IN_TEXT: dict[str, tuple[Any, ...]] = {"suffix": ("",), "best_of": (1,)}
# Of a message. An assistant's message dumped by OpenAI's client carries these as null or [].
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
_INT64 = 2**63
_DEFAULT_TEXT_TOKENS = 16  # what /v1/completions has always meant by no max_tokens

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
    reader = _Reader(parse_object(body))
    reader.look_at_all(_READ_BY_CHAT, _NEUTRAL_IN_CHAT)
    max_tokens, field = reader.max_tokens()
    logprobs = (reader.integer("top_logprobs", 0, MAX_LOGPROBS) or 0) if reader.boolean("logprobs") else None
    if logprobs is None and reader.raw.get("top_logprobs"):
        reader.problem("top_logprobs", "is allowed only together with logprobs: true.")
    sampling = reader.sampling(json_schema=reader.json_schema(), logprobs=logprobs)
    return reader.ask(True, (reader.messages(),), False, max_tokens, field, sampling)


def parse_text(body: bytes) -> Ask:
    """The text completion request in `body`, or RequestError as for `parse_chat`."""
    reader = _Reader(parse_object(body))
    reader.look_at_all(_READ_BY_TEXT, _NEUTRAL_IN_TEXT)
    echo, logprobs = reader.boolean("echo"), reader.integer("logprobs", 0, MAX_LOGPROBS)
    max_tokens = reader.integer("max_tokens", 0 if echo else 1, _INT64 - 1)
    max_tokens = _DEFAULT_TEXT_TOKENS if max_tokens is None else max_tokens
    # Without log-probabilities the prompt is not looked at, but an answer of no tokens needs the right to be one.
    prompt_logprobs = logprobs if echo and logprobs is not None else 0 if echo and max_tokens == 0 else None
    sampling = reader.sampling(logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return reader.ask(False, reader.prompts(), echo, max_tokens, "max_tokens", sampling)


class _Reader(Fields):
    """What both requests are made of."""

    num_parts = 0

    def look_at_all(self, read: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse what is known and not supported, and note what nobody knows."""
        for name, values in neutral.items():
            self.refuse(name, self.raw.get(name), values)
        self.ignored += sorted(set(self.raw) - read - _WITHOUT_EFFECT - set(neutral))

    def ask(
        self,
        is_chat: bool,
        prompts: tuple[Prompt, ...],
        echo: bool,
        max_tokens: int | None,
        max_tokens_field: str,
        sampling: SamplingParams,
    ) -> Ask:
        n = self.integer("n", 1, MAX_CHOICES) or 1
        if n * len(prompts) > MAX_CHOICES:
            self.problem("n", f"{len(prompts)} prompts with {n} answers each: at most {MAX_CHOICES} are made at once.")
        stream = self.boolean("stream")
        ask = Ask(
            model=self.model(),
            is_chat=is_chat,
            prompts=prompts,
            n=n,
            echo=echo,
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            sampling=sampling,
            stream=stream,
            include_usage=self.include_usage(stream),
            ignored=tuple(self.ignored),
            about=self.about(),
        )
        self.raise_problems()
        return ask

    def about(self) -> dict[str, str]:
        values = {name: self.raw.get(name) for name in ("user", "safety_identifier")}
        metadata = self.raw.get("metadata")
        if isinstance(metadata, dict) and len(metadata) <= MAX_METADATA:
            values |= {f"metadata.{name}": value for name, value in metadata.items()}
        return {name: value[:MAX_METADATA_VALUE] for name, value in values.items() if is_text(value) and value}

    def sampling(self, **more: Any) -> SamplingParams:
        return SamplingParams(
            max_tokens=1,
            temperature=self.number("temperature", 1.0, 0.0, 2.0),
            top_p=self.number("top_p", 1.0, 0.0, 1.0, above=True),
            top_k=self.top_k(),
            min_p=self.number("min_p", 0.0, 0.0, 1.0),
            seed=self.integer("seed", -_INT64, _INT64 - 1),
            stop=self.stop(),
            stop_ids=self.token_ids("stop_token_ids"),
            ignore_eos=self.boolean("ignore_eos"),
            repetition_penalty=self.number("repetition_penalty", 1.0, 0.01, 10.0),
            presence_penalty=self.number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=self.number("frequency_penalty", 0.0, -2.0, 2.0),
            logit_bias=self.logit_bias(),
            **more,
        )

    def top_k(self) -> int:
        value = self.integer("top_k", -1, _INT64 - 1)
        return 0 if value is None or value < 0 else value  # -1 is vLLM's word for all

    def token_ids(self, field: str) -> tuple[int, ...]:
        value = self.raw.get(field)
        if value is None:
            return ()
        if isinstance(value, list) and len(value) <= MAX_BIASES and all(_is_token(token) for token in value):
            return tuple(value)
        self.problem(field, f"must be a list of at most {MAX_BIASES} token ids, not {shown(value)}.")
        return ()

    def logit_bias(self) -> tuple[tuple[int, float], ...]:
        value = self.raw.get("logit_bias")
        if value is None:
            return ()
        if isinstance(value, dict) and len(value) <= MAX_BIASES:
            pairs = [
                (int(k), v) for k, v in value.items() if k.isascii() and k.isdigit() and len(k) < 10 and _is_bias(v)
            ]
            if len(pairs) == len(value):
                return tuple((token, float(bias)) for token, bias in pairs)
        text = f"must be an object of at most {MAX_BIASES} token ids, each with a number from -100 to 100"
        self.problem("logit_bias", f"{text}, not {shown(value)}.")
        return ()

    def json_schema(self) -> str | None:
        value = self.raw.get("response_format")
        kind = value.get("type") if isinstance(value, dict) else None
        if value is None or kind == "text":
            return None
        if kind == "json_object":
            return '{"type": "object"}'
        inner = value.get("json_schema") if isinstance(value, dict) else None
        if kind == "json_schema" and isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
            known = {"name", "description", "schema", "strict"}
            self.ignored += [f"response_format.json_schema.{key}" for key in sorted(set(inner) - known)]
            return json.dumps(inner["schema"])
        wanted = '{"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}'
        self.problem("response_format", f'must be {wanted}, or of type "json_object" or "text", not {shown(value)}.')
        return None

    def prompts(self) -> tuple[Prompt, ...]:
        value = self.raw.get("prompt")
        several = value if isinstance(value, list) and value and not _is_token(value[0]) else [value]
        found: list[Prompt] = []
        for prompt in several:
            if is_text(prompt) and prompt:
                found.append(prompt)
            elif isinstance(prompt, list) and prompt and all(_is_token(token) for token in prompt):
                found.append(tuple(prompt))
        if len(found) == len(several) <= MAX_CHOICES:
            return tuple(found)
        text = f"must be a text, a list of token ids, or a list of at most {MAX_CHOICES} of one of these, none empty"
        self.problem("prompt", f"{text}, not {shown(value)}.")
        return ()

    def model(self) -> str:
        value = self.raw.get("model")
        if not is_text(value) or not 0 < len(str(value)) <= MAX_NAME:
            text = f"must be a model's name of at most {MAX_NAME} characters, not {shown(value)}."
            self.problem("model", f"{text} GET /v1/models lists them.")
            return ""
        return str(value)

    def max_tokens(self) -> tuple[int | None, str]:
        old = self.integer("max_tokens", 1, _INT64 - 1)
        new = self.integer("max_completion_tokens", 1, _INT64 - 1)
        if old is not None and new is not None and old != new:
            self.problem("max_completion_tokens", f"is {new} while max_tokens is {old}. Send one of the two.")
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")

    def stop(self) -> tuple[str, ...]:
        value = self.raw.get("stop")
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and len(stops) <= MAX_STOPS and all(is_text(s) and s for s in stops):
            return tuple(stops)
        self.problem("stop", f"must be a text or a list of at most {MAX_STOPS} texts, none empty, not {shown(value)}.")
        return ()

    def include_usage(self, stream: bool) -> bool:
        options = self.raw.get("stream_options")
        if options is None:
            return False
        if not isinstance(options, dict):
            self.problem("stream_options", f"must be an object, not {shown(options)}.")
            return False
        if not stream:
            self.problem("stream_options", "is allowed only together with stream: true.")
        # include_obfuscation pads chunks against traffic analysis on the open internet; the answer is the same.
        known = {"include_usage", "include_obfuscation"}
        self.ignored += [f"stream_options.{key}" for key in sorted(set(options) - known)]
        wanted = options.get("include_usage")
        if wanted is not None and not isinstance(wanted, bool):
            self.problem("stream_options.include_usage", f"must be true or false, not {shown(wanted)}.")
        return wanted is True

    def messages(self) -> tuple[dict[str, str], ...]:
        value = self.raw.get("messages")
        if not isinstance(value, list) or not value:
            self.problem("messages", f"must be a list of at least one message, not {shown(value)}.")
            return ()
        if len(value) > MAX_MESSAGES:
            self.problem("messages", f"holds {len(value)} messages, at most {MAX_MESSAGES} are taken. Send fewer.")
            return ()
        return tuple(self._message(f"messages[{i}]", message) for i, message in enumerate(value))

    def _message(self, at: str, message: Any) -> dict[str, str]:
        if not isinstance(message, dict):
            self.problem(at, f"must be an object with role and content, not {shown(message)}.")
            return {}
        for name, neutral in _MESSAGE_NEUTRAL.items():
            self.refuse(f"{at}.{name}", message.get(name), neutral)
        self.ignored += [f"{at}.{k}" for k in sorted(set(message) - {"role", "content"} - set(_MESSAGE_NEUTRAL))]
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            self.problem(f"{at}.role", f"must be one of {', '.join(ROLES)}, not {shown(role)}.")
            role = "user"
        return {"role": ROLES[role], "content": self._content(f"{at}.content", message.get("content"))}

    def _content(self, at: str, content: Any) -> str:
        if is_text(content):
            return str(content)
        if not isinstance(content, list) or not content:
            self.problem(at, f"must be a text or a list of text parts, not {shown(content)}.")
            return ""
        self.num_parts += len(content)
        if self.num_parts > MAX_PARTS:
            self.problem(at, f"all messages together have more than {MAX_PARTS} parts. Join the texts, or send fewer.")
            return ""
        texts = []
        for i, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text")):
                texts.append(part["text"])
                self.ignored += [f"{at}[{i}].{key}" for key in sorted(set(part) - {"type", "text"})]
            else:
                self.problem(f"{at}[{i}]", f'must be {{"type": "text", "text": "..."}}, not {shown(part)}.')
        return "".join(texts)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_bias(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
