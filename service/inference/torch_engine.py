"""The embedded engine: continuous batching in plain PyTorch, on CPU or one GPU, with any mixture of adapters in a batch.

A step, in order: commands (adapters in and out), cancellations, prompts while slots are free, then one token for every
row. `start()` runs steps on a thread; without it, `step()` or `generate()` run them where they are called. What a row
computes is in `decoder.py` and `lora_bank.py`, how text comes out in `detokenizer.py`. No Ray, no HTTP, no names here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from service.errors import ConflictError, ModelError, NotFoundError, RequestError
from service.inference.adapter_files import read_adapter
from service.inference.decoder import Decoder
from service.inference.detokenizer import TextStream
from service.inference.engine import AdapterInfo, Chunk, FinishReason, GenerationRequest, OnChunk
from service.inference.lora_bank import LoraBank
from service.inference.sampling import NOT_FINITE, generator_for, next_tokens

log = logging.getLogger(__name__)

# Prompts admitted in one step, in tokens: running rows wait that long for their next token, at most.
_PREFILL_TOKENS_PER_STEP = 1024
_BROKEN = "the model produced numbers that are not finite for this request; the adapter may have diverged in training."


@dataclass(eq=False)  # two sequences are never the same
class _Sequence:
    """One request in flight."""

    request: GenerationRequest
    on_chunk: OnChunk
    text: TextStream
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    num_reported: int = 0
    cancelled: bool = False
    finished: bool = False


class TorchEngine:
    """Implements `engine.Engine`. ModelError at construction for a base model that it could not serve right."""

    def __init__(
        self,
        model_dir: Path,
        *,
        tokenizer: Any,
        stop_ids: Iterable[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        num_slots: int = 16,
        max_context: int = 2048,
        max_lora_columns: int = 256,
        stall_after_s: float = 120.0,
    ) -> None:
        self.num_slots, self.max_context, self.max_columns = num_slots, max_context, max_lora_columns
        self._tokenizer, self._stop_ids, self._stall_after_s = tokenizer, frozenset(stop_ids), stall_after_s
        self._decoder = Decoder(
            model_dir, dtype=dtype, device=torch.device(device), num_slots=num_slots, max_context=max_context
        )
        self._bank = LoraBank(self._decoder.model, max_lora_columns)
        self._rows: list[_Sequence] = []  # row i of the slots; only the stepping thread touches it
        self._stepping = threading.Lock()  # held during a step
        self._changed = threading.Condition()  # guards the four below
        self._waiting: deque[_Sequence] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._in_flight: dict[str, _Sequence] = {}
        self._closing = False
        self._thread: threading.Thread | None = None
        self._advanced_at = time.monotonic()

    @property
    def free_columns(self) -> int:
        """How much rank is free for the next adapter."""
        return self._bank.free_columns

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters, by digest."""
        return self._bank.adapters()

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request; `on_chunk` is called from the stepping thread and must return at once."""
        self._check_request(request)
        text = TextStream(self._tokenizer, request.prompt_ids, request.sampling.stop)
        sequence = _Sequence(request, on_chunk, text, generator_for(request.sampling))
        with self._changed:
            if self._closing:
                raise ConflictError("the engine is closed: it takes no more requests.")
            if request.id in self._in_flight:
                raise ConflictError(f"request {request.id!r} is in flight already: give each request its own id.")
            known = self._bank.adapters()
            if request.adapter is not None and request.adapter not in known:
                raise NotFoundError(
                    f"adapter {request.adapter} is not resident. Resident: {', '.join(known) or 'none'}."
                )
            if not self._in_flight:
                self._advanced_at = time.monotonic()
            self._in_flight[request.id] = sequence
            self._waiting.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request within a step; one that has ended already is left alone."""
        with self._changed:
            sequence = self._in_flight.get(request_id)
            if sequence:
                sequence.cancelled = True
                self._changed.notify_all()

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        """Read and check on the caller's thread, then copy in between two steps. A resident adapter is left as it is."""
        if info := self.adapters().get(digest):
            return info
        tensors = read_adapter(directory, self._bank.shapes, self.max_columns, self._bank.dtype)

        def install() -> AdapterInfo:
            with self._changed:
                return self.adapters().get(digest) or self._bank.install(digest, tensors)

        return self._between_steps(install)  # type: ignore[no-any-return]

    def unload_adapter(self, digest: str) -> None:
        """Zero and free an adapter's columns. ConflictError while requests use it: drain first."""

        def remove() -> None:
            with self._changed:
                users = sum(sequence.request.adapter == digest for sequence in self._in_flight.values())
                if users:
                    raise ConflictError(f"adapter {digest} is in use by {users} requests: let them end, then unload.")
                self._bank.remove(digest)

        self._between_steps(remove)

    def check(self) -> None:
        """Raises RuntimeError when the thread has died, or nothing has advanced for `stall_after_s` with work pending."""
        if self._thread and not self._thread.is_alive() and not self._closing:
            raise RuntimeError("the engine's thread has died: restart the replica; the log has the reason.")
        idle_s = time.monotonic() - self._advanced_at
        if self._pending() and idle_s > self._stall_after_s:
            raise RuntimeError(
                f"the engine has not finished a step for {idle_s:.0f} s with {len(self._in_flight)} requests in flight "
                f"(allowed: {self._stall_after_s:.0f} s): restart the replica."
            )

    def start(self) -> None:
        """Run steps on a thread until `close`. Starting twice is once."""
        if self._thread is None:
            self._advanced_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="loray-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread after its step; requests in flight end as `cancelled`. Closing twice is once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        with self._stepping:
            self._run_commands()
            for sequence in list(self._in_flight.values()):
                sequence.cancelled = True
            self._drop_cancelled()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """The whole answers, in order, continuously batched; used by evaluation. ModelError if one of them fails."""
        pieces: list[list[str]] = [[] for _ in requests]
        endings: dict[int, Chunk] = {}
        done = threading.Event()

        def collect(index: int) -> OnChunk:
            def on_chunk(chunk: Chunk) -> None:
                pieces[index].append(chunk.text)
                if chunk.finish_reason:
                    endings[index] = chunk
                    if len(endings) == len(requests):
                        done.set()

            return on_chunk

        for request in requests:
            self._check_request(request)
        for index, request in enumerate(requests):
            self.submit(request, collect(index))
        while requests and not done.is_set():
            if self._thread is None:
                self.step()
            elif not done.wait(timeout=1.0):
                self.check()
        for index, chunk in sorted(endings.items()):
            if chunk.finish_reason in ("error", "cancelled"):
                raise ModelError(f"request {requests[index].id} ended with {chunk.finish_reason}: {chunk.error or ''}")
        return ["".join(parts) for parts in pieces]

    def step(self) -> bool:
        """Advance everything by one token; True while work is left. Never raises for what a request brought."""
        with self._stepping:
            self._run_commands()
            self._drop_cancelled()
            self._admit()
            if self._rows:
                self._guarded(self._decode, list(self._rows))
            self._advanced_at = time.monotonic()
        return self._pending()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._pending())
                if self._closing:
                    return
            self.step()

    def _pending(self) -> bool:
        return bool(self._in_flight or self._commands)

    def _between_steps(self, command: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        with self._changed:
            self._commands.append((command, future))
            self._changed.notify_all()
        while not future.done():
            if self._thread is None or not self._thread.is_alive():
                with self._stepping:
                    self._run_commands()
            wait([future], timeout=1.0)
        return future.result()

    def _run_commands(self) -> None:
        while self._commands:
            command, future = self._commands.popleft()
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [sequence for sequence in self._in_flight.values() if sequence.cancelled]
        for sequence in dropped:
            self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        num_tokens = 0
        while len(self._rows) < self.num_slots and num_tokens < _PREFILL_TOKENS_PER_STEP:
            with self._changed:
                if not self._waiting:
                    return
                sequence = self._waiting.popleft()
            num_tokens += len(sequence.request.prompt_ids)
            self._guarded(lambda sequence=sequence: self._prefill(sequence), [sequence])  # type: ignore[misc]

    def _prefill(self, sequence: _Sequence) -> None:
        self._bank.select([sequence.request.adapter])
        self._rows.append(sequence)
        self._accept([sequence], self._decoder.prefill(sequence.request.prompt_ids))

    def _decode(self) -> None:
        self._bank.select([sequence.request.adapter for sequence in self._rows])
        logits_BV = self._decoder.decode([sequence.tokens[-1] for sequence in self._rows])
        self._accept(list(self._rows), logits_BV)

    def _accept(self, sequences: list[_Sequence], logits_BV: torch.Tensor) -> None:
        tokens = next_tokens(
            logits_BV,
            [sequence.request.sampling for sequence in sequences],
            [sequence.generator for sequence in sequences],
        )
        for sequence, token in zip(sequences, tokens, strict=True):
            if token == NOT_FINITE:
                self._finish(sequence, "error", error=_BROKEN)
            else:
                self._advance(sequence, token)

    def _advance(self, sequence: _Sequence, token: int) -> None:
        """Take one token in: text that is certain goes out, and the end is noticed."""
        sequence.tokens.append(token)
        if token in self._stop_ids:
            return self._finish(sequence, "stop", sequence.text.finish())
        text = sequence.text.push(token)
        if sequence.text.stopped:
            return self._finish(sequence, "stop", text)
        if len(sequence.tokens) == sequence.request.sampling.max_tokens:
            text += sequence.text.finish()
            return self._finish(sequence, "stop" if sequence.text.stopped else "length", text)
        if text:
            self._send(sequence, text)
        return None

    def _finish(self, sequence: _Sequence, reason: FinishReason, text: str = "", *, error: str | None = None) -> None:
        """Free the slot first, so that it is free by the time anybody hears of it; then the last chunk."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self._rows:
            row = self._rows.index(sequence)
            self._decoder.release(row)
            self._rows[row] = self._rows[-1]
            self._rows.pop()
        with self._changed:
            self._in_flight.pop(sequence.request.id, None)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        self._send(sequence, text, reason, error)

    def _send(
        self, sequence: _Sequence, text: str, reason: FinishReason | None = None, error: str | None = None
    ) -> None:
        num_new, sequence.num_reported = len(sequence.tokens) - sequence.num_reported, len(sequence.tokens)
        chunk = Chunk(text, num_new, reason, error, len(sequence.request.prompt_ids))
        try:
            sequence.on_chunk(chunk)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            sequence.cancelled = True

    def _guarded(self, work: Callable[[], None], concerned: list[_Sequence]) -> None:
        """Run a part of a step; what it raises ends the requests concerned, not the engine."""
        try:
            work()
        except Exception as error:
            log.exception("a step failed; %d requests end with an error", len(concerned))
            reason = f"the engine failed in a step ({type(error).__name__}); nothing more is generated. Send it again."
            for sequence in concerned:
                self._finish(sequence, "error", error=reason)

    def _check_request(self, request: GenerationRequest) -> None:
        num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise RequestError("the prompt is empty: send at least one token.", param="prompt")
        vocabulary = self._decoder.vocabulary_size
        if not all(0 <= token < vocabulary for token in request.prompt_ids):
            raise RequestError(f"the prompt holds token ids outside 0 to {vocabulary - 1}.", param="prompt")
        if num_prompt + max_tokens > self.max_context:
            raise RequestError(
                f"prompt of {num_prompt} tokens and max_tokens {max_tokens} are {num_prompt + max_tokens}, the context "
                f"holds {self.max_context}: shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )
