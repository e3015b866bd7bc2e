"""What an engine replica sends through the handle: who answers, then parts of the answers, with token ids as texts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from service.inference.engine import Chunk, FinishReason, TokenLogprob


@dataclass(frozen=True)
class Started:
    """Who answers. `num_prompt_tokens` is over all prompts, each counted once; `echoed` are the prompts, where asked for."""

    model: str
    digest: str
    num_prompt_tokens: int
    echoed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taken:
    """Which replica has a request, and whether it answers: one that its gateway does not hear yet leaves it be."""

    replica: str
    is_heard: bool


@dataclass(frozen=True)
class Scored:
    """A token with its natural log-probability (None: nothing stands before it) and the likeliest ones in its place."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Part:
    """More of one answer, `choice` counting answers to all prompts. The last, and only it, has a `finish_reason`."""

    choice: int
    text: str
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    scored: tuple[Scored, ...] = ()

    def joined(self, later: Part) -> Part:
        """This and a later part of the same answer as one."""
        return replace(
            later,
            text=self.text + later.text,
            num_tokens=self.num_tokens + later.num_tokens,
            scored=self.scored + later.scored,
        )


class Counts:
    """Tokens of all parts that were added: of the prompts, each counted once however many answers it gets, and of these."""

    def __init__(self, started: Started, n: int) -> None:
        self.num_prompt_tokens, self.num_tokens, self._n = started.num_prompt_tokens, 0, n
        self._cached: dict[int, int] = {}  # by prompt, as its first answer found it

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts' tokens, those that were not computed again."""
        return sum(self._cached.values())

    def add(self, part: Part) -> None:
        """Count a part."""
        self.num_tokens += part.num_tokens
        if part.choice % self._n == 0:
            self._cached[part.choice] = part.num_cached_tokens


def part_of(choice: int, chunk: Chunk, token_text: Callable[[int], str], *, with_prompt_scores: bool) -> Part:
    """An engine's chunk as a part; `with_prompt_scores` puts the prompt's log-probabilities before the answer's."""
    scores = (*(chunk.prompt_logprobs if with_prompt_scores else ()), *chunk.logprobs)
    return Part(
        choice,
        chunk.text,
        chunk.num_tokens,
        chunk.finish_reason,
        chunk.error,
        chunk.num_cached_tokens,
        tuple(_scored(score, token_text) for score in scores),
    )


def _scored(score: TokenLogprob, token_text: Callable[[int], str]) -> Scored:
    return Scored(token_text(score.token_id), score.logprob, tuple((token_text(token), lp) for token, lp in score.top))
