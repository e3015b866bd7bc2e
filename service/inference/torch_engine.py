"""The embedded engine: continuous batching in plain PyTorch, on CPU or one GPU, with any mixture of adapters in a batch.

A step, in order: commands (adapters in and out), cancellations, new requests while slots are free, then one forward: a
token for every row that decodes and a part of the prompts that are being read. `start()` runs steps on a thread; without
it, `step()` or `generate()` run them where they are called. What a row computes is in `decoder.py` and `lora_bank.py`,
who is next in `fair_queue.py`, how text comes out in `detokenizer.py`. No Ray, no HTTP, no names here.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from service.domain import BaseBits
from service.errors import ConflictError, ModelError, NotFoundError
from service.inference.adapter_files import LoraTensors, read_adapter
from service.inference.byte_lru import ByteLru
from service.inference.decoder import Decoder
from service.inference.detokenizer import TextStream
from service.inference.engine import (
    BROKEN,
    AdapterInfo,
    Chunk,
    EngineStats,
    FinishReason,
    GenerationRequest,
    OnChunk,
    TokenLogprob,
    check_request,
)
from service.inference.fair_queue import FairQueue
from service.inference.grammar import Grammars
from service.inference.prefix_cache import BLOCK, PrefixCache
from service.inference.request_state import RequestState
from service.inference.sampling import NOT_FINITE, Sampler, likeliest, logprobs_of
from service.inference.slot_attention import Piece

log = logging.getLogger(__name__)

# Tokens of prompts in one step. Beside decoding rows few enough that those hardly wait: 64 were seen to add 35 ms to a
# step of 30 for SmolLM2-135M on two cores. A GPU reads 512 in about the time it takes to read the weights.
_PROMPT_TOKENS = {"cpu": 64, "cuda": 512}
_PROMPT_TOKENS_ALONE = {"cpu": 256, "cuda": 1024}
_SCORED_TOKENS = 128  # of one prompt, where its log-probabilities are wanted: each is a row of the whole vocabulary
# Of every step, until the products of new adapters are joined with the base's; under load not before adapters have
# stopped coming and going for so long: it would be in vain, and late tokens are what swaps must not bring.
_JOIN_S, _JOIN_AFTER_S = 0.002, 1.0
_MAX_FAILED = 5  # steps in a row, none of which answered anybody: it's not the requests, it's the engine


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
        kv_bytes: int | None = None,
        prefix_bytes: int = 0,
        host_bytes: int = 0,
        base_bits: BaseBits = 16,
        double_quant: bool = True,
        stall_after_s: float = 120.0,
    ) -> None:
        self.max_context, self.max_columns = max_context, max_lora_columns
        self._tokenizer, self._stop_ids, self._stall_after_s = tokenizer, frozenset(stop_ids), stall_after_s
        self._decoder = Decoder(
            model_dir,
            dtype=dtype,
            device=torch.device(device),
            num_slots=num_slots,
            max_context=max_context,
            max_lora_columns=max_lora_columns,
            kv_bytes=kv_bytes,
            base_bits=base_bits,
            double_quant=double_quant,
        )
        self.num_slots = self._decoder.slots.num_slots
        self._bank = self._decoder.bank
        self._prefixes = PrefixCache(prefix_bytes)
        # Adapters by digest, read, checked and scaled, for when they come back.
        self._read: ByteLru[str, Mapping[str, LoraTensors]] = ByteLru(host_bytes)
        self._grammars = Grammars(tokenizer, self._stop_ids, self._decoder.vocabulary_size)
        kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
        self._prompt_tokens, self._prompt_tokens_alone = _PROMPT_TOKENS[kind], _PROMPT_TOKENS_ALONE[kind]
        self._rows: list[RequestState] = []  # those with a slot, oldest first; only the stepping thread touches it
        self._stepping = threading.Lock()  # held during a step
        self._loading = threading.Lock()  # held while an adapter is read and written
        self._changed = threading.Condition()  # guards the four below
        self._waiting: FairQueue[RequestState] = FairQueue()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._in_flight: dict[str, RequestState] = {}
        self._closing = False
        self._thread: threading.Thread | None = None
        self._advanced_at = time.monotonic()
        self._num_failed = 0  # forwards in a row

    @property
    def max_rank(self) -> int:
        """Of one adapter: all columns may be its own."""
        return self.max_columns

    @property
    def free_columns(self) -> int:
        """How much rank is free for the next adapter."""
        return self._bank.free_columns

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters, by digest."""
        return self._bank.adapters()

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request; `on_chunk` is called from the stepping thread and must return at once.

        With a JSON schema this may take a while: the schema is read here, on the caller's thread.
        """
        check_request(request, self._decoder.vocabulary_size, self.max_context)
        params = request.sampling
        matcher = None if params.json_schema is None else self._grammars.matcher(params.json_schema)
        sequence = RequestState(
            request,
            on_chunk,
            TextStream(self._tokenizer, request.prompt_ids, params.stop),
            (frozenset() if params.ignore_eos else self._stop_ids) | frozenset(params.stop_ids),
            sampler=Sampler(params, request.prompt_ids, matcher),
        )
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
            self._waiting.push(request.adapter, sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request within a step; one that has ended already is left alone."""
        with self._changed:
            sequence = self._in_flight.get(request_id)
            if sequence:
                sequence.cancelled = True
                self._changed.notify_all()

    def read_adapter(self, digest: str, directory: Path) -> None:
        """Read and check on the caller's thread, into the host memory that `load_adapter` looks into first."""
        with self._loading:
            if digest not in self.adapters():
                self._tensors(digest, directory)

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        """Read and check on the caller's thread, then copy in between two steps. A resident adapter is left as it is."""
        with self._loading:
            if info := self.adapters().get(digest):
                return info
            finish = self._bank.install(digest, self._tensors(digest, directory), self._breathe)
            loaded: AdapterInfo = self._between_steps(finish)
            if self._thread is None:  # nobody waits for tokens, and the same calls shall give the same bits
                self._between_steps(lambda: self._join(math.inf))
            return loaded

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's columns. ConflictError while requests use it: drain first."""

        def remove() -> None:
            with self._changed:
                users = sum(sequence.request.adapter == digest for sequence in self._in_flight.values())
                if users:
                    raise ConflictError(f"adapter {digest} is in use by {users} requests: let them end, then unload.")
                self._bank.remove(digest)

        with self._loading:
            self._between_steps(remove)
            try:
                self._between_steps(self._bank.trim(self._breathe))
            except Exception:  # it is unloaded; the next load or unload trims again
                log.exception("the columns that adapter %s left are still computed", digest)

    def stats(self) -> EngineStats:
        """How much there is to do."""
        with self._changed:
            waiting = len(self._waiting)
            return EngineStats(len(self._in_flight) - waiting, waiting, self._prefixes.num_bytes)

    def check(self) -> None:
        """Raises RuntimeError: the thread has died, nothing has advanced for `stall_after_s` with work pending, or every step fails."""
        if self._thread and not self._thread.is_alive() and not self._closing:
            raise RuntimeError("the engine's thread has died: restart the replica; the log has the reason.")
        if self._num_failed >= _MAX_FAILED:
            raise RuntimeError(
                f"the engine's last {self._num_failed} steps have all failed (allowed: {_MAX_FAILED - 1} in a row): restart "
                "the replica; the log has the reasons."
            )
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
            check_request(request, self._decoder.vocabulary_size, self.max_context)
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
                self._advance_rows()
            if not self._rows or time.monotonic() > self._bank.changed_at + _JOIN_AFTER_S:
                self._join(_JOIN_S)
            self._advanced_at = time.monotonic()
        return self._work_left()

    def _join(self, for_s: float) -> None:
        try:
            self._bank.join(for_s)
        except RuntimeError:  # no memory; what is apart is right too
            log.exception("a product of the adapters stays apart from the base's, and is slower for it")

    def _breathe(self, spent_s: float) -> None:
        """Loading takes at most a quarter of a processor from running requests."""
        if self._rows:
            time.sleep(3 * spent_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._work_left())
                if self._closing:
                    return
            self.step()

    def _tensors(self, digest: str, directory: Path) -> Mapping[str, LoraTensors]:
        """Of an adapter, read from its files unless host memory has them."""
        tensors = self._read.get(digest)
        if tensors is None:
            tensors = read_adapter(directory, self._bank.shapes, self.max_columns, self._bank.place[0])
            self._read.put(digest, tensors, sum(pair.a_RI.nbytes + pair.b_RO.nbytes for pair in tensors.values()))
        return tensors

    def _work_left(self) -> bool:
        return self._pending() or self._bank.is_apart

    def _pending(self) -> bool:
        return bool(self._in_flight or self._commands)

    def _between_steps(self, command: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        with self._changed:
            if not self._pending():  # it was idle, and not stuck: `check` counts from now
                self._advanced_at = time.monotonic()
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
        while self._decoder.slots.num_free:
            with self._changed:
                sequence = self._waiting.pop()
            if sequence is None:
                return
            self._rows.append(sequence)
            self._guarded(lambda sequence=sequence: self._open(sequence), [sequence])  # type: ignore[misc]

    def _open(self, sequence: RequestState) -> None:
        """Give it a slot, and what is known of its prompt; the last token is always computed, for its logits."""
        slots, prompt = self._decoder.slots, sequence.request.prompt_ids
        sequence.slot = slots.take()
        if self._prefixes.max_bytes and sequence.request.sampling.prompt_logprobs is None:
            with torch.inference_mode():
                for kv_LHTD in self._prefixes.longest(self._prefixes.keys(sequence.request.adapter, prompt[:-1])):
                    slots.append(sequence.slot, kv_LHTD)
            sequence.num_fed = sequence.num_cached = slots.lengths[sequence.slot]

    def _advance_rows(self) -> None:
        """One forward: a token for each decoding row, and as many tokens of prompts as may come beside them."""
        taking: list[tuple[RequestState, Piece]] = []
        reading = self._shares_of_prompts()
        for sequence in self._rows:
            assert sequence.slot is not None
            tokens: tuple[int, ...]
            if sequence.is_decoding:
                tokens = (sequence.answer[-1],)
            else:
                start = sequence.num_fed
                tokens = sequence.request.prompt_ids[start : start + reading[sequence.request.id]]
            if tokens:
                taking.append((sequence, Piece(sequence.slot, tokens)))
        done = self._guarded(lambda: self._forward(taking), [sequence for sequence, _ in taking])
        self._num_failed = 0 if done else self._num_failed + 1

    def _shares_of_prompts(self) -> dict[str, int]:
        """How many tokens of its prompt each row reads in this step, by request.

        Half of the room is the oldest's, so that a long prompt gets on whatever comes; the rest goes to those that have
        least left, so that a short one does not wait behind it.
        """
        prompts = [row for row in self._rows if not row.is_decoding]
        room = self._prompt_tokens if len(prompts) < len(self._rows) else self._prompt_tokens_alone
        shares = dict.fromkeys((row.request.id for row in prompts), 0)

        def give(row: RequestState, most: int) -> int:
            scored = row.request.sampling.prompt_logprobs is not None
            left = (min(_SCORED_TOKENS, _left(row)) if scored else _left(row)) - shares[row.request.id]
            given = min(left, most)
            shares[row.request.id] += given
            return given

        for row in prompts[:1]:
            room -= give(row, room - room // 2)
        for row in sorted(prompts, key=_left):
            room -= give(row, room)
        return shares

    def _forward(self, taking: Sequence[tuple[RequestState, Piece]]) -> None:
        pieces = [piece for _, piece in taking]
        every = [
            number
            for number, (sequence, _) in enumerate(taking)
            if not sequence.is_decoding and sequence.request.sampling.prompt_logprobs is not None
        ]
        logits_NV = self._decoder.forward(pieces, [sequence.request.adapter for sequence, _ in taking], every)
        at = len(pieces)
        for number in every:
            sequence, piece = taking[number]
            part_TV = logits_NV[at : at + len(piece.tokens)]
            self._guarded(lambda sequence=sequence, part_TV=part_TV: self._score_prompt(sequence, part_TV), [sequence])  # type: ignore[misc]
            at += len(piece.tokens)
        ready = []
        for number, (sequence, piece) in enumerate(taking):
            if sequence.finished:
                continue
            was_decoding = sequence.is_decoding
            sequence.num_fed += len(piece.tokens)
            with self._changed:
                self._waiting.charge(sequence.request.adapter, len(piece.tokens))
            if sequence.is_decoding:
                ready.append(number)
                if not was_decoding:
                    self._keep_prefix(sequence)
        rows = logits_NV[: len(pieces)] if len(ready) == len(pieces) else logits_NV[ready]
        if ready:
            self._accept([taking[number][0] for number in ready], rows)

    def _score_prompt(self, sequence: RequestState, logits_TV: torch.Tensor) -> None:
        """The log-probabilities of the tokens after these, but for the last, which the prompt does not have."""
        prompt, num_top = sequence.request.prompt_ids, sequence.request.sampling.prompt_logprobs or 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(TokenLogprob(prompt[0], None))
        next_ids = prompt[sequence.num_fed + 1 : sequence.num_fed + 1 + len(logits_TV)]
        if next_ids:
            sequence.prompt_logprobs += logprobs_of(logits_TV[: len(next_ids)], next_ids, num_top)

    def _keep_prefix(self, sequence: RequestState) -> None:
        """Keep what the slot holds for later; a failure is logged, for nobody's answer needs it."""
        slots = self._decoder.slots
        block_bytes = slots.position_bytes * len(slots.layers) * BLOCK
        if self._prefixes.max_bytes < block_bytes:
            return
        assert sequence.slot is not None
        tokens = (sequence.request.prompt_ids + tuple(sequence.answer))[: sequence.num_fed]
        keys = self._prefixes.keys(sequence.request.adapter, tokens)[: self._prefixes.max_bytes // block_bytes]
        try:
            with torch.inference_mode():
                for number, key in reversed(list(enumerate(keys))):  # the first last: what makes room is a tail
                    if key not in self._prefixes:
                        kv_LHTD = slots.read(sequence.slot, number * BLOCK, (number + 1) * BLOCK)
                        self._prefixes.put(key, kv_LHTD, kv_LHTD.nbytes)
        except RuntimeError:
            log.exception("a prefix could not be kept")

    def _accept(self, sequences: list[RequestState], logits_BV: torch.Tensor) -> None:
        for row, (sequence, token) in enumerate(zip(sequences, likeliest(logits_BV), strict=True)):
            # A row at a time: what one request brings, a grammar for example, ends that request.
            self._guarded(
                lambda sequence=sequence, token=token, row=row: self._choose(sequence, token, logits_BV[row]),  # type: ignore[misc]
                [sequence],
            )

    @torch.inference_mode()
    def _choose(self, sequence: RequestState, token: int, logits_V: torch.Tensor) -> None:
        """Take the next token of one row; `token` is the likeliest one."""
        params = sequence.request.sampling
        if token == NOT_FINITE:
            return self._finish(sequence, "error", error=BROKEN)
        if not params.max_tokens:
            return self._finish(sequence, "length")
        if not sequence.sampler.is_plain:
            token = sequence.sampler.choose(logits_V)
        if params.logprobs is not None:
            sequence.logprobs += logprobs_of(logits_V[None], [token], params.logprobs)
        return self._advance(sequence, token)

    def _advance(self, sequence: RequestState, token: int) -> None:
        """Take one token in: text that is certain goes out, and the end is noticed."""
        sequence.sampler.accept(token)
        text, reason = sequence.take(token)
        if reason != "stop" and sequence.sampler.is_done:
            text, reason = text + sequence.text.finish(), "stop"
        if reason:
            return self._finish(sequence, reason, text)
        if text:
            self._send(sequence, text)
        return None

    def _finish(
        self, sequence: RequestState, reason: FinishReason, text: str = "", *, error: str | None = None
    ) -> None:
        """Free the slot first, so that it is free by the time anybody hears of it; then the last chunk."""
        if sequence.finished:
            return
        sequence.finished = True
        adapter = sequence.request.adapter
        if sequence in self._rows:
            if sequence.slot is not None and reason in ("stop", "length"):
                self._keep_prefix(sequence)
            self._rows.remove(sequence)
            if sequence.slot is not None:
                self._decoder.release(sequence.slot)
            with self._changed:
                self._waiting.done(adapter)
        with self._changed:
            self._in_flight.pop(sequence.request.id, None)
            self._waiting.remove(adapter, sequence)
        self._send(sequence, text, reason, error)

    def _send(
        self, sequence: RequestState, text: str, reason: FinishReason | None = None, error: str | None = None
    ) -> None:
        try:
            sequence.on_chunk(sequence.next_chunk(text, reason, error))
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            sequence.cancelled = True

    def _guarded(self, work: Callable[[], None], concerned: list[RequestState]) -> bool:
        """Run a part of a step; what it raises ends the requests concerned, not the engine. Whether it was done."""
        try:
            work()
            return True
        except Exception as error:
            log.exception("a step failed; %d requests end with an error", len(concerned))
            reason = f"the engine failed in a step ({type(error).__name__}); nothing more is generated. Send it again."
            for sequence in concerned:
                self._finish(sequence, "error", error=reason)
            return False


def _left(row: RequestState) -> int:
    """Tokens of its prompt that are still to be read."""
    return len(row.request.prompt_ids) - row.num_fed
