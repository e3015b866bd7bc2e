"""The engine deployment: one base model and its adapters in one process, answering through a Ray Serve handle.

It renders the prompt, waits for the adapter, submits to the engine and streams what comes; a caller that goes away
cancels its request in the engine. No HTTP here (`gateway.py`), no decisions about adapters (`adapters.py`), no decoding
(`service/inference/`).
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import ray.serve as ray_serve

from serve.adapter_sync import AdapterSync
from serve.desired import Base, EndpointFiles
from serve.openai_api import ChatRequest
from serve.routing import Target
from service.base_models import resolve_base_model
from service.config import EngineBlock
from service.errors import DataError, ModelError, RequestError
from service.inference.engine import Chunk, GenerationRequest, SamplingParams


@dataclass(frozen=True)
class Started:
    """The first thing `generate` yields: who answers, and how long the prompt is."""

    model: str
    digest: str
    num_prompt_tokens: int


class EngineReplica:
    """One engine. Its constructor raises what is wrong with base model or config, and nothing is left running."""

    def __init__(self, base: Base, files: EndpointFiles, cache: Path, precision: str, engine: EngineBlock) -> None:
        import torch

        from service.inference.torch_engine import TorchEngine
        from service.render import load_renderer

        # Ray sets OMP_NUM_THREADS=1 for a fraction of a CPU, which is what it was asked to reserve, not what may be used.
        torch.set_num_threads(engine.threads or len(os.sched_getaffinity(0)))
        model = resolve_base_model(base.source, cache, base.revision, files.home)
        self._renderer = load_renderer(model.path, base.chat_template)
        _check_same(base, model.digest, self._renderer.digest)
        self._engine = TorchEngine(
            model.path,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            device="cuda" if torch.cuda.is_available() else "cpu",
            num_slots=engine.slots,
            max_context=engine.max_context,
            max_lora_columns=engine.lora_columns,
            stop_ids=self._renderer.stop_ids,
            tokenizer=self._renderer.tokenizer,
        )
        self._engine.start()
        replica = ray_serve.get_replica_context().replica_tag
        self._adapters = AdapterSync(self._engine, files, base.digest, replica.replace("#", "-"), cache)
        self._adapters.start()
        self._tokenizing = asyncio.Lock()  # the tokenizer is not to be used by two threads at once

    async def generate(self, request: ChatRequest, target: Target, epoch: int) -> AsyncIterator[Started | Chunk]:
        """`Started`, then the chunks. Errors of the request are raised before `Started`, so that a status can tell."""
        prompt_ids = await self._prompt_ids(request)
        sampling = self._sampling(request, len(prompt_ids))
        answering = await self._adapters.admit(target, epoch)
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_chunk(chunk: Chunk) -> None:
            if chunk.finish_reason is not None:
                self._adapters.release(answering)
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        adapter = None if answering.is_base else answering.digest
        generation = GenerationRequest(uuid.uuid4().hex, tuple(prompt_ids), sampling, adapter)
        try:
            self._engine.submit(generation, on_chunk)
        except BaseException:
            self._adapters.release(answering)
            raise
        finished = False
        try:
            yield Started(answering.model, answering.digest, len(prompt_ids))
            while not finished:
                chunk = await _next(chunks)
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self._engine.cancel(generation.id)

    def check_health(self) -> None:
        """Called by Ray Serve: raises when the engine's thread is dead or stuck, and the replica is replaced."""
        self._engine.check()

    def __del__(self) -> None:
        """Called by Ray Serve when the replica ends."""
        if hasattr(self, "_adapters"):
            self._adapters.close()
        if hasattr(self, "_engine"):
            self._engine.close()

    async def _prompt_ids(self, request: ChatRequest) -> list[int]:
        try:
            async with self._tokenizing:
                return await asyncio.to_thread(self._renderer.prompt_ids, request.messages)
        except DataError as error:
            raise RequestError(f"messages: {error}", "messages") from None

    def _sampling(self, request: ChatRequest, num_prompt_tokens: int) -> SamplingParams:
        room = self._engine.max_context - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"messages: the prompt has {num_prompt_tokens} tokens and this endpoint's context holds "
                f"{self._engine.max_context}, the answer included. Shorten the messages.",
                "messages",
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise RequestError(
                f"{request.max_tokens_field}: {request.max_tokens} tokens after a prompt of {num_prompt_tokens} do not fit "
                f"in this endpoint's context of {self._engine.max_context}. Ask for at most {room}.",
                request.max_tokens_field,
            )
        return SamplingParams(
            max_tokens=request.max_tokens or room,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=request.stop,
        )


async def _next(chunks: asyncio.Queue[Chunk]) -> Chunk:
    """The next chunk, joined with all that came meanwhile: one message between processes instead of many."""
    chunk = await chunks.get()
    while chunk.finish_reason is None and not chunks.empty():
        later = chunks.get_nowait()
        chunk = replace(
            later,
            text=chunk.text + later.text,
            token_ids=chunk.token_ids + later.token_ids,
            logprobs=chunk.logprobs + later.logprobs,
            prompt_logprobs=chunk.prompt_logprobs + later.prompt_logprobs,
        )
    return chunk


def _check_same(base: Base, digest: str, renderer_digest: str) -> None:
    for what, here, there in (("weights", digest, base.digest), ("template", renderer_digest, base.renderer_digest)):
        if here != there:
            raise ModelError(
                f"base model {base.source!r} has other {what} on this node ({here[:12]}) than where the endpoint was "
                f"started ({there[:12]}). Give every node the same files, or use an s3:// URI."
            )
