"""What a serving engine is: the values that go in and out, and the protocol both engines answer to.

An engine holds one base model and the adapters resident beside it. It knows nothing of Ray, HTTP, names, versions or
aliases: adapters are called by their digest. `torch_engine.py` and `serve/vllm_engine.py` implement the protocol; `serve/`
drives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from service.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


BROKEN = "the model produced numbers that are not finite for this request; the adapter may have diverged in training."
MAX_LOGPROBS = 20
MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to end. Cannot exist with a bad value: RequestError names every problem.

    In this order: repetition penalty (over prompt and answer; Keskar et al. 2019, section 4.1), presence and frequency
    penalties (over the answer, subtracted from the logits), logit bias (added), JSON schema; then temperature (0 is
    greedy), `top_k` (0: all), `top_p`, `min_p` (relative to the likeliest token). With a seed, the same request draws the
    same random numbers whatever shares its batch. `logprobs`: log-probabilities of the model itself, before all of that,
    for each token of the answer and that many likeliest others; `prompt_logprobs`: the same for the prompt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # beside the model's own
    ignore_eos: bool = False  # go on after the model's own stop tokens
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None  # as JSON text
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs is not None else 1
        problems = {
            "max_tokens": self.max_tokens < least and f"max_tokens is {self.max_tokens}: ask for {least} or more.",
            "temperature": not 0.0 <= self.temperature <= 2.0
            and f"temperature is {self.temperature}: give a number from 0 (greedy) to 2.",
            "top_p": not 0.0 < self.top_p <= 1.0 and f"top_p is {self.top_p}: give a number above 0, at most 1.",
            "top_k": self.top_k < 0 and f"top_k is {self.top_k}: give 0 (all tokens) or more.",
            "min_p": not 0.0 <= self.min_p <= 1.0 and f"min_p is {self.min_p}: give a number from 0 to 1.",
            "seed": self.seed is not None
            and not -(2**63) <= self.seed < 2**63
            and f"seed is {self.seed}: give an integer of at most 64 bits.",
            "stop": not (all(self.stop) and len(self.stop) <= MAX_STOPS)
            and f"stop holds an empty string, or more than {MAX_STOPS}: leave some out.",
            "repetition_penalty": not 0.01 <= self.repetition_penalty <= 10.0
            and f"repetition_penalty is {self.repetition_penalty}: give a number from 0.01 to 10 (1: none).",
            **{
                name: not -2.0 <= value <= 2.0 and f"{name} is {value}: give a number from -2 to 2 (0: none)."
                for name, value in (
                    ("presence_penalty", self.presence_penalty),
                    ("frequency_penalty", self.frequency_penalty),
                )
            },
            "logit_bias": not all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias)
            and "logit_bias holds a number outside -100 to 100.",
            **{
                name: not 0 <= (value or 0) <= MAX_LOGPROBS and f"{name} is {value}: give 0 to {MAX_LOGPROBS}."
                for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            },
        }
        found = {field: text for field, text in problems.items() if text}
        if found:
            raise RequestError("\n".join(found.values()), param=next(iter(found)))


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `id` is unique among the requests in flight; `adapter` is the digest of a resident one."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None


def check_request(request: GenerationRequest, vocabulary_size: int, max_context: int) -> None:
    """Raises RequestError for token ids that the model has not, an empty prompt, and more tokens than the context holds."""
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise RequestError("the prompt is empty: send at least one token.", param="prompt")
    if not all(0 <= token < vocabulary_size for token in request.prompt_ids):
        raise RequestError(f"the prompt holds token ids outside 0 to {vocabulary_size - 1}.", param="prompt")
    if not all(0 <= token < vocabulary_size for token, _ in request.sampling.logit_bias):
        raise RequestError(f"logit_bias holds token ids outside 0 to {vocabulary_size - 1}.", param="logit_bias")
    if num_prompt + max_tokens > max_context:
        raise RequestError(
            f"prompt of {num_prompt} tokens and max_tokens {max_tokens} are {num_prompt + max_tokens}, the context "
            f"holds {max_context}: shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability and those of the likeliest tokens there, likeliest first.

    The first token of a prompt has nothing before it: its `logprob` is None.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has a `finish_reason`; it may have no text.

    `token_ids` are the tokens generated since the previous chunk of this answer (those whose text is held back and the
    stop token included): together they are the answer, and their number the usage. `logprobs`, where asked for, has one
    entry for each of them. `num_prompt_tokens` and `num_cached_tokens` (those of them that were not computed again) are
    the same on every chunk. `prompt_logprobs` comes with the first chunk, where asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def num_tokens(self) -> int:
        """How many tokens this chunk stands for."""
        return len(self.token_ids)


@dataclass(frozen=True)
class AdapterInfo:
    """What a resident adapter takes: its greatest rank, the columns of the bank it owns, and their bytes."""

    rank: int
    num_columns: int
    bytes: int


@dataclass(frozen=True)
class EngineStats:
    """Requests with a slot, requests in line, and the bytes that prompts seen before take."""

    num_running: int
    num_waiting: int
    prefix_bytes: int


OnChunk = Callable[[Chunk], None]


class Engine(Protocol):
    """One base model being served. All methods may be called from any thread, but not from inside `on_chunk`,
    which runs on the engine's thread and must return at once; `submit` and `cancel` are safe there too."""

    @property
    def max_context(self) -> int:
        """The most tokens prompt and answer may have together."""

    @property
    def num_slots(self) -> int:
        """How many requests run at once; more wait in line."""

    @property
    def max_columns(self) -> int:
        """The ranks of all resident adapters together cannot exceed this."""

    @property
    def max_rank(self) -> int:
        """The rank of one adapter cannot exceed this."""

    @property
    def free_columns(self) -> int:
        """How much rank is free for the next adapter."""

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request. RequestError: it does not fit. NotFoundError: adapter not resident. ConflictError: same id."""

    def cancel(self, request_id: str) -> None:
        """End a request within a step, with a last chunk `cancelled`. One that has ended already is left alone."""

    def read_adapter(self, digest: str, directory: Path) -> None:
        """Check a PEFT adapter before there is room for it, and have it at hand if host memory allows. ModelError: all reasons."""

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        """Make a PEFT adapter resident; a resident one is left as it is. ModelError: all reasons. ConflictError: full."""

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's columns. ConflictError while requests use it (drain first); NotFoundError if not resident."""

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters, by digest."""

    def stats(self) -> EngineStats:
        """How much there is to do."""

    def check(self) -> None:
        """Raises RuntimeError when the engine's thread is dead, or pending work has not advanced for too long."""

    def start(self) -> None:
        """Run steps on a thread of its own until `close`."""

    def close(self) -> None:
        """Stop the thread; what is in flight ends with a last chunk `cancelled`."""
