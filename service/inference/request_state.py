"""One request in flight: its prompt, its answer so far, and how far each has come. An engine moves it on."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.inference.detokenizer import TextStream
from service.inference.engine import Chunk, FinishReason, GenerationRequest, OnChunk, TokenLogprob
from service.inference.sampling import Sampler


@dataclass(eq=False)  # two requests are never the same
class Answering:
    """An answer as its listener gets it, whoever chooses the tokens."""

    request: GenerationRequest
    on_chunk: OnChunk
    text: TextStream
    stop_ids: frozenset[int]
    num_cached: int = 0
    answer: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_reported: int = 0
    cancelled: bool = False
    finished: bool = False

    def take(self, token: int) -> tuple[str, FinishReason | None]:
        """Take one token in: the text that is certain with it, and why the answer ends here, if it does."""
        self.answer.append(token)
        if token in self.stop_ids:
            return self.text.finish(), "stop"
        text = self.text.push(token)
        if self.text.stopped:
            return text, "stop"
        if len(self.answer) == self.request.sampling.max_tokens:
            text += self.text.finish()
            return text, "stop" if self.text.stopped else "length"
        return text, None

    def next_chunk(self, text: str, reason: FinishReason | None, error: str | None) -> Chunk:
        """What goes to the listener now: this text, and all tokens since the last chunk."""
        new = slice(self.num_reported, len(self.answer))
        self.num_reported = new.stop
        return Chunk(
            text,
            tuple(self.answer[new]),
            reason,
            error,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self.num_cached,
            logprobs=tuple(self.logprobs[new]),
            prompt_logprobs=tuple(self.prompt_logprobs) if new.start == 0 else (),
        )


@dataclass(eq=False, kw_only=True)
class RequestState(Answering):
    """A request in the embedded engine. Its tokens are the prompt's, then the answer's; `num_fed` are in its slot."""

    sampler: Sampler
    slot: int | None = None
    num_fed: int = 0

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token is in the slot."""
        return self.num_fed >= len(self.request.prompt_ids)
