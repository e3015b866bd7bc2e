"""What a serving engine is: the values that go in and out, and the protocol both engines answer to.

An engine holds one base model and the adapters resident beside it. It knows nothing of Ray, HTTP, names, versions or
aliases: adapters are called by their digest. `torch_engine.py` implements the protocol; `serve/` drives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from service.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to end. Cannot exist with a bad value: RequestError names every problem.

    Temperature 0 is greedy. With a seed, the same request draws the same random numbers whatever shares its batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = {
            "max_tokens": self.max_tokens < 1 and f"max_tokens is {self.max_tokens}: ask for 1 or more.",
            "temperature": not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 2.0)
            and f"temperature is {self.temperature}: give a number from 0 (greedy) to 2.",
            "top_p": not 0.0 < self.top_p <= 1.0 and f"top_p is {self.top_p}: give a number above 0, at most 1.",
            "seed": self.seed is not None
            and not -(2**63) <= self.seed < 2**63
            and f"seed is {self.seed}: give an integer of at most 64 bits.",
            "stop": not all(self.stop) and "stop holds an empty string: leave it out.",
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


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has a `finish_reason`; it may have no text.

    `num_tokens` counts the tokens generated since the previous chunk of this answer (those whose text is held back and
    the stop token included): the sum over all chunks is the usage. `num_prompt_tokens` is the same on every chunk.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class AdapterInfo:
    """What a resident adapter takes: its greatest rank, the columns of the bank it owns, and their bytes."""

    rank: int
    num_columns: int
    bytes: int


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
    def free_columns(self) -> int:
        """How much rank is free for the next adapter."""

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request. RequestError: it does not fit. NotFoundError: adapter not resident. ConflictError: same id."""

    def cancel(self, request_id: str) -> None:
        """End a request within a step, with a last chunk `cancelled`. One that has ended already is left alone."""

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        """Make a PEFT adapter resident; a resident one is left as it is. ModelError: all reasons. ConflictError: full."""

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's columns. ConflictError while requests use it (drain first); NotFoundError if not resident."""

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters, by digest."""

    def check(self) -> None:
        """Raises RuntimeError when the engine's thread is dead, or pending work has not advanced for too long."""

    def start(self) -> None:
        """Run steps on a thread of its own until `close`."""

    def close(self) -> None:
        """Stop the thread; what is in flight ends with a last chunk `cancelled`."""
