"""`loray chat`: a published model answers lines, in this process, token by token."""

from __future__ import annotations

from typing import TextIO

from service.cli.terminal import console
from service.domain import ModelRef
from service.errors import ModelError
from service.evaluation.answers import LoadedModel
from service.inference.engine import Chunk, GenerationRequest, SamplingParams
from service.render import Message
from service.settings import load_settings


def chat_lines(model: str, max_tokens: int, lines: TextIO) -> None:
    """Answer each line as the next turn of one conversation. Raises NotFoundError, ModelError, RequestError."""
    loaded = LoadedModel(ModelRef.parse(model), load_settings(), slots=1)
    console.print(
        f"{loaded.manifest.ref}, trained from {loaded.manifest.base_model}. End with Ctrl-D.", highlight=False
    )
    messages: list[Message] = []
    interactive = lines.isatty()
    while True:
        if interactive:
            console.print("[bold]> [/]", end="")
        line = lines.readline()
        if not line:
            return
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            messages.append({"role": "assistant", "content": _answer(loaded, messages, max_tokens)})


def _answer(loaded: LoadedModel, messages: list[Message], max_tokens: int) -> str:
    pieces: list[str] = []
    failures: list[str] = []

    def show(chunk: Chunk) -> None:
        pieces.append(chunk.text)
        failures.extend([chunk.error or "unknown error"] if chunk.finish_reason == "error" else [])
        console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)

    prompt = tuple(loaded.renderer.prompt_ids(messages))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    loaded.engine.submit(GenerationRequest(str(len(messages)), prompt, sampling, loaded.adapter), show)
    while loaded.engine.step():
        pass
    console.print()
    if failures:
        raise ModelError(f"{loaded.manifest.ref} failed on this prompt: {failures[0]}")
    return "".join(pieces)
