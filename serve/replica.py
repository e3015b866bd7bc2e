"""The engine deployment: one base model and its adapters in one process, answering through a Ray Serve handle.

It renders the prompt, waits for the adapter, submits to the engine and streams what comes; a caller that goes away
cancels its request in the engine. No HTTP here (`gateway.py`), no decisions about adapters (`adapters.py`), no decoding
(`engines.py` makes the engine).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.serve as ray_serve

from serve.adapter_sync import AdapterSync
from serve.adapter_uris import AdapterUris
from serve.desired import Base, EndpointFiles
from serve.engines import make_engine
from serve.lines import Place
from serve.openai_api import Ask, Prompt
from serve.outbox import Batch, Outboxes
from serve.parts import Part, Started, Taken, part_of
from serve.patience import patiently
from serve.prompts import Prompts
from serve.routing import Target
from service.base_models import resolve_base_model
from service.config import EngineBlock
from service.errors import ClusterError, ModelError, RequestError
from service.inference.engine import Chunk, GenerationRequest, OnChunk, SamplingParams

_log = logging.getLogger(__name__)
MAX_SCORES = 2**18  # log-probabilities in one answer, of its prompts, and of what may follow where it comes whole


class EngineReplica:
    """One engine. Its constructor raises what is wrong with base model or config, and nothing is left running.

    Storage or a hub that is away for a moment is waited for.
    """

    def __init__(
        self, base: Base, files: EndpointFiles, cache: Path, precision: str, engine: EngineBlock, uris: AdapterUris
    ) -> None:
        from service.render import load_renderer

        model = patiently(
            lambda: resolve_base_model(base.source, cache, base.revision, files.home), "reading the base model"
        )
        self._renderer = load_renderer(model.path, base.chat_template)
        _check_same(base, model.digest, self._renderer.digest)
        self._engine = make_engine(model.path, self._renderer, precision, engine)
        self._engine.start()
        self._name: str = ray_serve.get_replica_context().replica_tag
        self._adapters = AdapterSync(self._engine, files, base.digest, self._name.replace("#", "-"), cache, uris)
        patiently(self._adapters.start, "reading which adapters are wanted")
        self._outboxes = Outboxes()
        self._schemas = ThreadPoolExecutor(1, "loray-schemas")  # may take seconds each: the other threads read prompts
        self._token_text = functools.cache(lambda token: str(self._renderer.tokenizer.decode([token])))
        another = load_renderer(model.path, base.chat_template)
        self._prompts = Prompts(self._renderer, another, self._engine.max_context)

    async def stream(self, gateway: str, replica: str) -> AsyncIterator[Batch]:
        """All that this replica has to say to a gateway's requests, a batch per step. ClusterError: it is not `replica`."""
        if replica != self._name:
            raise ClusterError(f"replica {replica} is gone.")
        async for batch in self._outboxes.read(gateway):
            yield batch

    async def generate(
        self,
        gateway: str,
        request: str,
        ask: Ask,
        target: Target,
        epoch: int,
        replica: str | None,
        lost: frozenset[str],
    ) -> AsyncIterator[Taken]:
        """`Taken`; ends when the request's last part is on the gateway's stream. Raises what is wrong with the request.

        A gateway that reads no stream of this replica opens one and asks again, for this `replica`: the router (see
        `engine_router.py`) keeps to it if it can, and from `lost` ones if it can; nothing here depends on that.
        """
        outbox = self._outboxes.of(gateway)
        if outbox is None:
            yield Taken(self._name, is_heard=False)
            return
        with outbox.request():
            yield Taken(self._name, is_heard=True)
            await self._answer(ask, target, epoch, functools.partial(outbox.put, request))

    async def _answer(self, ask: Ask, target: Target, epoch: int, say: Callable[[Started | Part], None]) -> None:
        """Say `Started` and all parts of the answers. Errors of the request are raised before anything is said."""
        with self._adapters.lines.join(target, ask.n * len(ask.prompts)) as place:
            await self._answer_in_turn(ask, target, epoch, place, say)

    async def _answer_in_turn(
        self, ask: Ask, target: Target, epoch: int, place: Place, say: Callable[[Started | Part], None]
    ) -> None:
        prompts = [await self._prompts.ids(prompt, ask.prompt_field) for prompt in ask.prompts]
        _check_scores(ask, sum(len(prompt) for prompt in prompts))
        samplings = [self._sampling(ask, len(prompt), seed) for prompt in prompts for seed in range(ask.n)]
        _check_answer_scores(ask, samplings)
        echoed = [self._text(prompt, ids) for prompt, ids in zip(ask.prompts, prompts, strict=True)] if ask.echo else []
        await place.turn
        answering = await self._adapters.admit(target, epoch)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def at_end() -> None:
            self._adapters.release(answering)
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        running = _Countdown(len(samplings), at_end)

        def listener(choice: int) -> OnChunk:
            def on_chunk(chunk: Chunk) -> None:
                say(part_of(choice, chunk, self._token_text, with_prompt_scores=ask.echo))
                if chunk.finish_reason is not None:
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(self._adapters.lines.row_ended, target, place)
                    running.down()

            return on_chunk

        adapter = None if answering.is_base else answering.digest
        requests = [
            GenerationRequest(uuid.uuid4().hex, prompts[choice // ask.n], sampling, adapter)
            for choice, sampling in enumerate(samplings)
        ]
        num_submitted = 0
        try:
            for choice, request in enumerate(requests):
                if request.sampling.json_schema is None:
                    self._engine.submit(request, listener(choice))
                else:
                    await self._submit_aside(request, listener(choice), running)
                num_submitted += 1
            num_prompt_tokens = sum(len(prompt) for prompt in prompts)
            say(Started(answering.model, answering.digest, num_prompt_tokens, tuple(echoed)))
            await ended.wait()
        finally:
            if not ended.is_set():
                running.down(len(requests) - num_submitted)
                for request in requests[:num_submitted]:
                    self._engine.cancel(request.id)

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve every second; `engine_router.py` reads it."""
        taken = 1 - self._engine.free_columns / max(1, self._engine.max_columns)
        return {"slots": self._engine.num_slots, "resident": self._adapters.available(), "taken": taken}

    def check_health(self) -> None:
        """Called by Ray Serve. A broken engine ends the process: Serve then replaces the replica at once.

        Told of it, Serve would let the replica drain first, for as long as the longest stream may last.
        """
        try:
            self._engine.check()
        except RuntimeError:
            _log.exception("the engine is broken: its replica %s ends, and another one is started", self._name)
            os._exit(1)

    def __del__(self) -> None:
        """Called by Ray Serve when the replica ends."""
        if hasattr(self, "_adapters"):
            self._adapters.close()
        if hasattr(self, "_engine"):
            self._engine.close()

    async def _submit_aside(self, request: GenerationRequest, on_chunk: OnChunk, running: _Countdown) -> None:
        """Submit on another thread, because reading a schema takes a while. A caller that goes away meanwhile is counted
        down already; the thread cannot be stopped, so what it submits is cancelled."""
        running.up()
        submitting = asyncio.get_running_loop().run_in_executor(self._schemas, self._engine.submit, request, on_chunk)

        def settle(done: asyncio.Future[None]) -> None:
            if done.exception() is None:
                self._engine.cancel(request.id)
            else:
                running.down()

        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(settle)
            raise
        except BaseException:
            running.down()
            raise
        running.down()

    def _text(self, prompt: Prompt, ids: tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else str(self._renderer.tokenizer.decode(ids))

    def _sampling(self, ask: Ask, num_prompt_tokens: int, number: int) -> SamplingParams:
        """How the answer of this number among those to one prompt is sampled: each from its own seed."""
        room = self._engine.max_context - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"{ask.prompt_field}: the prompt has {num_prompt_tokens} tokens and this endpoint's context holds "
                f"{self._engine.max_context}, the answer included. Shorten it.",
                ask.prompt_field,
            )
        if ask.max_tokens is not None and ask.max_tokens > room:
            raise RequestError(
                f"{ask.max_tokens_field}: {ask.max_tokens} tokens after a prompt of {num_prompt_tokens} do not fit "
                f"in this endpoint's context of {self._engine.max_context}. Ask for at most {room}.",
                ask.max_tokens_field,
            )
        seed = ask.sampling.seed
        seed = None if seed is None else (seed + number + 2**63) % 2**64 - 2**63
        return replace(ask.sampling, max_tokens=room if ask.max_tokens is None else ask.max_tokens, seed=seed)


def _check_scores(ask: Ask, num_prompt_tokens: int) -> None:
    """Log-probabilities of prompts are bounded in number: each becomes some hundred bytes of JSON."""
    top = ask.sampling.prompt_logprobs
    if top is not None and ask.n * num_prompt_tokens * (1 + top) > MAX_SCORES:
        raise RequestError(
            f"prompt: {num_prompt_tokens} tokens with {top} likeliest others each, {ask.n} times, are more than {MAX_SCORES} "
            "log-probabilities. Send fewer prompts at once, or ask for fewer logprobs.",
            "prompt",
        )


def _check_answer_scores(ask: Ask, samplings: Sequence[SamplingParams]) -> None:
    """And of answers, where the gateway has to hold them all until the last one has ended."""
    top, num_tokens = ask.sampling.logprobs, sum(sampling.max_tokens for sampling in samplings)
    if top is not None and not ask.stream and num_tokens * (1 + top) > MAX_SCORES:
        raise RequestError(
            f"{ask.max_tokens_field}: up to {num_tokens} tokens in {len(samplings)} answers, with {top} likeliest others each, are "
            f"more than {MAX_SCORES} log-probabilities. Ask for fewer tokens, answers or logprobs, or stream them.",
            ask.max_tokens_field,
        )


class _Countdown:
    """Calls back once, when all have ended; from whatever thread the last one ends in."""

    def __init__(self, count: int, at_zero: Callable[[], None]) -> None:
        self._count, self._at_zero, self._lock = count, at_zero, threading.Lock()

    def up(self) -> None:
        """One more is to end."""
        with self._lock:
            self._count += 1

    def down(self, by: int = 1) -> None:
        """So many have ended."""
        with self._lock:
            self._count -= by
            ended = by > 0 and self._count == 0
        if ended:
            self._at_zero()


def _check_same(base: Base, digest: str, renderer_digest: str) -> None:
    for what, here, there in (("weights", digest, base.digest), ("template", renderer_digest, base.renderer_digest)):
        if here != there:
            raise ModelError(
                f"base model {base.source!r} has other {what} on this node ({here[:12]}) than where the endpoint was "
                f"started ({there[:12]}). Give every node the same files, or use an s3:// URI."
            )
