"""One request in flight: its prompt, its answer so far, and how far each has come. `torch_engine.py` moves it on."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.inference.detokenizer import TextStream
from service.inference.engine import Chunk, FinishReason, GenerationRequest, OnChunk, TokenLogprob
from service.inference.sampling import Sampler


@dataclass(eq=False)  # two requests are never the same
class RequestState:
    """One request in flight. Its tokens are the prompt's, then the answer's; `num_fed` of them are in its slot."""

    request: GenerationRequest
    on_chunk: OnChunk
    text: TextStream
    sampler: Sampler
    stop_ids: frozenset[int]
    slot: int | None = None
    num_fed: int = 0
    num_cached: int = 0
    answer: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_reported: int = 0
    cancelled: bool = False
    finished: bool = False

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token is in the slot."""
        return self.num_fed >= len(self.request.prompt_ids)

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
