"""The engine for GPU fleets and for models that the embedded one refuses: vLLM behind the protocol of `inference/engine.py`.

    pip install 'loray[vllm]', then `engine: {backend: vllm}` in the serve file (or `auto`, on CUDA)

vLLM runs the model in a process of its own; here is an event loop on a thread, with a task for each request that runs.
What must be the same under both engines is the same code: adapters are checked by `adapter_files.py` before vLLM sees
them, `fair_queue.py` says who is next, `detokenizer.py` makes text and finds stop strings, `request_state.py` ends answers.
What vLLM cannot do is refused, never left out. This is the only file that imports vLLM; no Ray, no HTTP, no names here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import wait
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from serve.watchdog import started_at, watchdog
from service.errors import ConflictError, ModelError, NotFoundError, RequestError
from service.inference.adapter_files import read_adapter
from service.inference.detokenizer import TextStream
from service.inference.engine import (
    BROKEN,
    MAX_LOGPROBS,
    AdapterInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    OnChunk,
    SamplingParams,
    TokenLogprob,
    check_request,
)
from service.inference.fair_queue import FairQueue
from service.inference.grammar import Grammars, Matcher
from service.inference.request_state import Answering

# Read when vLLM is imported: it reports its use to its makers unless told otherwise, and logs each request's way.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

_LEAST_TEMPERATURE = 0.01  # vLLM draws at this one instead of any lower (sampling_params.py, _MAX_TEMP)
_MOST_BIASES = 1024  # of vLLM's sampler on GPUs (v1/worker/gpu/sample/logit_bias.py); more would end its process
_CPU_BLOCK = 128  # tokens in a block of the key-value memory, on CPU
# On CPU, rows without an adapter get that of the last slot: their index -1 is used as it is (vLLM 0.32.0,
# lora/ops/torch_ops/lora_ops.py, seen with all slots taken). vLLM fills slots from the first, so one more stays empty.
_SPARE_SLOTS = 1 if current_platform.is_cpu() else 0
_CLOSE_WITHIN_S = 20  # its processes are killed after this
_FAILED = "the engine failed in this request ({}); nothing more is generated. Send it again."

ResultT = TypeVar("ResultT")
Ending = tuple[FinishReason, str, str | None]  # why, the last text, the error


@dataclass(eq=False, kw_only=True)
class _Request(Answering):
    """A request as vLLM gets it. It has a task while it runs."""

    sampling: vllm.SamplingParams
    lora: LoRARequest | None
    matcher: Matcher | None  # says when the JSON is whole; vLLM has one of its own, of the same llguidance
    task: asyncio.Task[Ending] | None = None


class VllmEngine:
    """Implements `engine.Engine`. ModelError at construction for a base model or sizes that vLLM does not take.

    Every adapter takes `max_lora_rank` columns, whatever its rank: vLLM's slots have one width. `kv_bytes` and
    `prefix_bytes` together are vLLM's key-value memory, where it keeps prompts seen before for as long as nothing else
    needs the room; without `kv_bytes` it is what `num_slots` rows need on CPU, and vLLM's share of the memory of a GPU.
    `threads`: on CPU, 0 for all cores that vLLM sees fit.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tokenizer: Any,
        stop_ids: Iterable[int],
        dtype: torch.dtype = torch.float32,
        num_slots: int = 16,
        max_context: int = 2048,
        max_lora_columns: int = 256,
        max_lora_rank: int = 32,
        kv_bytes: int | None = None,
        prefix_bytes: int = 0,
        threads: int = 0,
        stall_after_s: float = 120.0,
    ) -> None:
        self.num_slots, self.max_context = num_slots, max_context
        self._num_lora_slots, self._max_lora_rank = max_lora_columns // max_lora_rank, max_lora_rank
        self.max_columns = self._num_lora_slots * max_lora_rank
        self._tokenizer, self._stop_ids, self._dtype = tokenizer, frozenset(stop_ids), dtype
        self._stall_after_s = stall_after_s
        self._shapes, self._vocabulary_size = _read_shapes(model_dir)
        self._grammars = Grammars(tokenizer, self._stop_ids, self._vocabulary_size)
        self._loading = threading.Lock()  # held while an adapter comes or goes
        self._lora_ids = itertools.count(1)
        self._lock = threading.Lock()  # guards the next four
        self._resident: dict[str, tuple[LoRARequest, AdapterInfo]] = {}
        self._in_flight: dict[str, _Request] = {}
        self._waiting: FairQueue[_Request] = FairQueue()
        self._closing = False
        self._poisoned = False  # seen on CPU, vLLM 0.32.0: masked positions of a block used again are multiplied by 0
        self._asked_at: float | None = None  # since when `check` has had no answer from vLLM's process
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loray-vllm", daemon=True)
        self._thread.start()
        if threads:
            os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(threads))
        arguments = vllm.AsyncEngineArgs(
            model=str(model_dir),
            load_format="safetensors",
            generation_config="vllm",  # what is not asked for is not taken from the model's files
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_context,
            max_num_seqs=num_slots,
            enable_lora=self._num_lora_slots > 0,
            max_loras=max(1, self._num_lora_slots) + _SPARE_SLOTS,
            max_lora_rank=max_lora_rank,
            # Not the head, as everywhere here: it would cost every row, and on CPU it fails beside a prompt's log-probabilities.
            lora_target_modules=sorted({name.rpartition(".")[2] for name in self._shapes}),
            enable_prefix_caching=prefix_bytes > 0,
            max_logprobs=MAX_LOGPROBS,
            structured_outputs_config={"backend": "guidance"},  # llguidance, as in grammar.py
            disable_log_stats=True,
            seed=secrets.randbits(31),  # with vLLM's own, 0, all replicas would draw the same answers, after each start
        )
        try:
            arguments.kv_cache_memory_bytes = _kv_bytes(arguments, kv_bytes, prefix_bytes)
            self._llm = asyncio.run_coroutine_threadsafe(_started(arguments), self._loop).result()
            self._watchdog = watchdog({pid: started_at(pid) for pid in self.process_ids}, _CLOSE_WITHIN_S)
        except (ValueError, RuntimeError, OSError) as error:
            self._stop_loop()
            raise ModelError(f"{model_dir} cannot be served by vLLM: {error}") from error

    @property
    def process_ids(self) -> list[int]:
        """vLLM's own processes; those that they start end with them."""
        manager = self._llm.engine_core.resources.engine_manager
        return [process.pid for process in manager.processes]

    @property
    def max_rank(self) -> int:
        """Of one adapter: the width of vLLM's slots; 0 where there are none."""
        return min(self._max_lora_rank, self.max_columns)

    @property
    def free_columns(self) -> int:
        """How much rank is free for the next adapter."""
        with self._lock:
            return self.max_columns - self._max_lora_rank * len(self._resident)

    def adapters(self) -> dict[str, AdapterInfo]:
        """The resident adapters, by digest. All of them take the same columns and bytes."""
        with self._lock:
            return {digest: info for digest, (_, info) in self._resident.items()}

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request; `on_chunk` is called from the loop's thread and must return at once.

        RequestError also for what vLLM does not do, or otherwise: `_refuse_what_vllm_does_otherwise` has the list, and a
        prompt may not fill the context even where no token is to follow. A seed gives the same answer each time, and
        another than the embedded engine's. With a JSON schema this may take a while: it is read here, on the caller's
        thread.
        """
        check_request(request, self._vocabulary_size, self.max_context)
        params = request.sampling
        _refuse_what_vllm_does_otherwise(params)
        if len(request.prompt_ids) == self.max_context:
            raise RequestError(
                f"the prompt fills the context of {self.max_context} tokens, and vLLM adds one: shorten it.", "prompt"
            )
        matcher = None if params.json_schema is None else self._grammars.matcher(params.json_schema)
        stop_ids = self._stop_ids_of(params)
        sampling = self._sampling(request, stop_ids)
        text = TextStream(self._tokenizer, request.prompt_ids, params.stop)
        with self._lock:
            if self._closing:
                raise ConflictError("the engine is closed: it takes no more requests.")
            if request.id in self._in_flight:
                raise ConflictError(f"request {request.id!r} is in flight already: give each request its own id.")
            lora = None if request.adapter is None else self._known(request.adapter)[0]
            running = _Request(request, on_chunk, text, stop_ids, sampling=sampling, lora=lora, matcher=matcher)
            self._in_flight[request.id] = running
            self._waiting.push(request.adapter, running)
        self._soon(self._admit)

    def cancel(self, request_id: str) -> None:
        """End a request within a step; one that has ended already is left alone."""
        self._soon(self._cancel, request_id)

    def read_adapter(self, digest: str, directory: Path) -> None:
        """Check on the caller's thread. vLLM reads the files itself, when it loads."""
        read_adapter(directory, self._shapes, self.max_rank, self._dtype)

    def load_adapter(self, digest: str, directory: Path) -> AdapterInfo:
        """Check on the caller's thread, then let vLLM read it between two steps. A resident adapter is left as it is."""
        with self._loading:
            if info := self.adapters().get(digest):
                return info
            tensors = read_adapter(directory, self._shapes, self.max_rank, self._dtype)
            if not self.free_columns:
                raise ConflictError(
                    f"adapter {digest} needs {self._max_lora_rank} columns, 0 free: unload another first."
                )
            lora = LoRARequest(digest, next(self._lora_ids), str(directory))
            try:
                loaded = self._in_loop(self._llm.add_lora(lora))
            except Exception as error:
                self._check_alive()
                raise ModelError(f"adapter {directory} cannot be served: vLLM says {error}") from error
            if not loaded:
                raise ModelError(f"adapter {directory} cannot be served: vLLM did not take it, and gave no reason.")
            sizes = sum(in_features + out_features for in_features, out_features in self._shapes.values())
            rank = max(len(pair.a_RI) for pair in tensors.values())
            info = AdapterInfo(rank, self._max_lora_rank, sizes * self._max_lora_rank * self._dtype.itemsize)
            with self._lock:
                self._resident[digest] = lora, info
            return info

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's columns. ConflictError while requests use it: drain first."""
        with self._loading:
            with self._lock:
                lora, _ = self._known(digest)
                users = sum(running.request.adapter == digest for running in self._in_flight.values())
                if users:
                    raise ConflictError(f"adapter {digest} is in use by {users} requests: let them end, then unload.")
                del self._resident[digest]  # before vLLM forgets it: nothing starts on it any more
            if not self._in_loop(self._llm.remove_lora(lora.lora_int_id)):
                raise RuntimeError(f"vLLM did not know adapter {digest} any more: restart the replica.")

    def stats(self) -> EngineStats:
        """How much there is to do. vLLM does not say what prompts seen before take: 0."""
        with self._lock:
            waiting = len(self._waiting)
            return EngineStats(len(self._in_flight) - waiting, waiting, 0)

    def check(self) -> None:
        """RuntimeError: vLLM's process has died, its memory is spoilt, or no step has ended for `stall_after_s`.

        A prompt may take long before its first token, so tokens are no sign: each call with work pending asks the
        process something, which it answers between two steps, and a later call finds that it has not.
        """
        self._check_alive()
        if self._poisoned:
            raise RuntimeError(
                "an adapter left numbers that are not finite in vLLM's key-value memory, and its CPU kernels let later "
                "requests read them: restart the replica, and withdraw the adapter."
            )
        asked_at, now = self._asked_at, time.monotonic()
        if asked_at is None:
            if self._in_flight:
                self._asked_at = now
                self._soon(self._ask)
        elif now - asked_at > self._stall_after_s:
            raise RuntimeError(
                f"vLLM has not finished a step for {now - asked_at:.0f} s with {len(self._in_flight)} requests in flight "
                f"(allowed: {self._stall_after_s:.0f} s): restart the replica."
            )

    def start(self) -> None:
        """Nothing is left to do: vLLM's process and the loop's thread run since the construction."""

    def close(self) -> None:
        """End requests in flight as `cancelled`, then vLLM's processes. Closing twice is once."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._llm.shutdown(timeout=_CLOSE_WITHIN_S)
        self._watchdog.kill()
        self._watchdog.communicate()
        self._stop_loop()

    # On the caller's thread.

    def _known(self, digest: str) -> tuple[LoRARequest, AdapterInfo]:
        if digest not in self._resident:
            known = ", ".join(self._resident) or "none"
            raise NotFoundError(f"adapter {digest} is not resident. Resident: {known}.")
        return self._resident[digest]

    def _stop_ids_of(self, params: SamplingParams) -> frozenset[int]:
        """A grammar ends with one of the model's own, which then nothing can ignore."""
        own = frozenset() if params.ignore_eos and params.json_schema is None else self._stop_ids
        return own | frozenset(params.stop_ids)

    def _sampling(self, request: GenerationRequest, stop_ids: frozenset[int]) -> vllm.SamplingParams:
        """In vLLM's words. Text and stop strings are ours; so is the end: vLLM gets every stop token by its id."""
        params = request.sampling
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        # An adapter that overflows is seen by a log-probability that is no number, and by nothing else.
        watched = request.adapter is not None or current_platform.is_cpu()
        logprobs = params.logprobs if params.logprobs is not None or not watched else 0
        sampling = vllm.SamplingParams(
            max_tokens=max(1, params.max_tokens),  # 0 is for the prompt's log-probabilities alone: the token is dropped
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=None if params.seed is None else params.seed % 2**63,  # vLLM takes -1 for none
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=biases or None,
            logprobs=logprobs,
            prompt_logprobs=params.prompt_logprobs,
            structured_outputs=None if params.json_schema is None else StructuredOutputsParams(json=params.json_schema),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        config = self._llm.vllm_config
        try:
            sampling.verify(config.model_config, None, config.structured_outputs_config, self._llm.tokenizer)
        except ValueError as error:
            raise RequestError(f"vLLM refuses the request: {error}") from error
        return sampling

    def _soon(self, work: Callable[..., None], *arguments: Any) -> None:
        """On the loop's thread; nothing once the engine is closing, which ends all requests itself."""
        with self._lock:
            if not self._closing:
                self._loop.call_soon_threadsafe(work, *arguments)

    def _in_loop(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not future.done():
            wait([future], timeout=1.0)
            if self._llm.errored and not future.done():
                future.cancel()
                self._check_alive()
        return future.result()

    def _check_alive(self) -> None:
        if not self._closing and (self._llm.errored or not self._thread.is_alive()):
            raise RuntimeError("vLLM's process has died: restart the replica; the log has the reason.")

    def _stop_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # On the loop's thread.

    def _admit(self) -> None:
        """Hand on as many requests as may run, the fairest first; the others wait here, where they can be told apart."""
        while True:
            with self._lock:
                if self._closing or len(self._in_flight) - len(self._waiting) >= self.num_slots:
                    return
                running = self._waiting.pop()
            if running is None:
                return
            running.task = self._loop.create_task(self._generate(running))
            running.task.add_done_callback(functools.partial(self._ended, running))

    async def _generate(self, running: _Request) -> Ending:
        """Leaving it, by its end or by cancellation, takes the request out of vLLM."""
        request = running.request
        outputs = self._llm.generate(
            tokens_input(list(request.prompt_ids)), running.sampling, request.id, lora_request=running.lora
        )
        async with aclosing(outputs):
            async for output in outputs:
                if ending := self._take(running, output):
                    return ending
        raise RuntimeError("vLLM ended an answer without a reason")

    def _take(self, running: _Request, output: vllm.RequestOutput) -> Ending | None:
        """Take in the tokens of one step; how the answer ends with them, if it does."""
        params, part = running.request.sampling, output.outputs[0]
        running.num_cached = output.num_cached_tokens or 0
        prompt_scores = []
        if output.prompt_logprobs and not running.prompt_logprobs:
            prompt, top = running.request.prompt_ids, params.prompt_logprobs or 0
            prompt_scores = [_scored(*pair, top) for pair in zip(prompt, output.prompt_logprobs, strict=True)]
        scores = [
            _scored(*pair, params.logprobs or 0) for pair in zip(part.token_ids, part.logprobs or (), strict=False)
        ]
        if any(math.isnan(score.logprob or 0.0) for score in (*prompt_scores, *scores)):
            self._poisoned = current_platform.is_cpu()
            return "error", "", BROKEN
        running.prompt_logprobs += prompt_scores
        if not running.answer:  # the first output comes with the prompt
            self._charge(running, len(running.request.prompt_ids) - running.num_cached)
        if not params.max_tokens:
            return "length", "", None
        self._charge(running, len(part.token_ids))
        texts = ""
        for place, token in enumerate(part.token_ids):
            if params.logprobs is not None:
                running.logprobs.append(scores[place])
            if running.matcher:
                running.matcher.accept(token)
            text, reason = running.take(token)
            if reason != "stop" and running.matcher and running.matcher.is_done:
                text, reason = text + running.text.finish(), "stop"
            texts += text
            if reason:
                return reason, texts, None
        if part.finish_reason:  # for a reason of vLLM's own
            return "error", texts + running.text.finish(), _FAILED.format(f"vLLM: {part.finish_reason}")
        if texts:
            self._send(running, texts)
        return None

    def _charge(self, running: _Request, num_tokens: int) -> None:
        with self._lock:
            self._waiting.charge(running.request.adapter, num_tokens)

    def _ended(self, running: _Request, task: asyncio.Task[Ending]) -> None:
        if task.cancelled():
            self._finish(running, "cancelled", "", None)
        elif error := task.exception():
            log.error("request %s failed", running.request.id, exc_info=error)
            self._finish(running, "error", "", _FAILED.format(type(error).__name__))
        else:
            self._finish(running, *task.result())
        self._admit()

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            running = self._in_flight.get(request_id)
        if running and running.task:
            running.task.cancel()
        elif running:
            self._finish(running, "cancelled", "", None)

    def _ask(self) -> None:
        self._asking = self._loop.create_task(self._answered())

    async def _answered(self) -> None:
        await self._llm.is_sleeping()  # of all that can be asked, the one that costs nothing
        self._asked_at = None

    async def _cancel_all(self) -> None:
        with self._lock:
            everything = list(self._in_flight.values())
        for running in everything:
            self._cancel(running.request.id)
        tasks = [running.task for running in everything if running.task]
        if self._llm.output_handler:  # it would take the end of vLLM's processes for a failure
            self._llm.output_handler.cancel()
            tasks.append(self._llm.output_handler)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, running: _Request, reason: FinishReason, text: str, error: str | None) -> None:
        """Its place is free by the time anybody hears of it."""
        running.finished = True
        with self._lock:
            del self._in_flight[running.request.id]
            if running.task:
                self._waiting.done(running.request.adapter)
            else:
                self._waiting.remove(running.request.adapter, running)
        self._send(running, text, reason, error)

    def _send(self, running: _Request, text: str, reason: FinishReason | None = None, error: str | None = None) -> None:
        try:
            running.on_chunk(running.next_chunk(text, reason, error))
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            self._cancel(running.request.id)


async def _started(arguments: vllm.AsyncEngineArgs) -> AsyncLLM:
    """On the loop it belongs to; nothing else runs there yet."""
    return AsyncLLM.from_engine_args(arguments)


async def _cancel_others() -> None:
    """What vLLM left running on the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _read_shapes(model_dir: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """(in_features, out_features) of every linear layer but the head, by its name in transformers; the vocabulary's size."""
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError) as error:
        raise ModelError(f"{model_dir} holds no readable config.json of a known causal model: {error}") from error
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    shapes = {name: (one.in_features, one.out_features) for name, one in linears.items() if one is not head}
    return shapes, model.get_input_embeddings().num_embeddings


def _kv_bytes(arguments: vllm.AsyncEngineArgs, kv_bytes: int | None, prefix_bytes: int) -> int | None:
    """The key-value memory; None: what vLLM finds free on the GPU. On CPU it would take most of the machine's."""
    if kv_bytes is None and not current_platform.is_cpu():
        return None
    if kv_bytes is None:
        model = arguments.create_model_config()
        heads, layers = model.get_total_num_kv_heads(), model.get_total_num_hidden_layers()
        token_bytes = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
        blocks = arguments.max_num_seqs * math.ceil(arguments.max_model_len / _CPU_BLOCK) + 1  # vLLM keeps one empty
        kv_bytes = blocks * _CPU_BLOCK * token_bytes
    return kv_bytes + prefix_bytes


def _refuse_what_vllm_does_otherwise(params: SamplingParams) -> None:
    if 0.0 < params.temperature < _LEAST_TEMPERATURE:
        raise RequestError(
            f"temperature is {params.temperature}: vLLM takes 0 (greedy), or {_LEAST_TEMPERATURE} and more.",
            "temperature",
        )
    if params.logit_bias and params.repetition_penalty != 1.0:
        raise RequestError(
            "logit_bias and repetition_penalty together: vLLM applies them in another order. Leave one of them out.",
            "repetition_penalty",
        )
    if len(params.logit_bias) > _MOST_BIASES:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} tokens: vLLM takes {_MOST_BIASES} at most.", "logit_bias"
        )
    if params.temperature and params.min_p and params.top_p < 1.0:
        raise RequestError(
            "min_p and top_p together: vLLM applies them in another order. Leave one of them out.", "min_p"
        )
    if params.json_schema is not None and params.logprobs is not None:
        raise RequestError(
            "logprobs and a JSON schema together: vLLM's log-probabilities are those of the tokens that the schema allows, "
            "not the model's own. Leave one of them out.",
            "logprobs",
        )


def _scored(token: int, found: Mapping[int, Any] | None, num_top: int) -> TokenLogprob:
    """vLLM gives the token and the likeliest ones, in one mapping; nothing for the first token of a prompt."""
    if found is None:
        return TokenLogprob(token, None)
    likeliest = sorted(((other, score.logprob) for other, score in found.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, found[token].logprob, tuple(likeliest[:num_top]))
