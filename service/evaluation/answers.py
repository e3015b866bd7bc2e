"""A model's own answers to held-out prompts, by the engine that serves it, and their scores beside the base's.

    comparison = compare(registry.resolve(ModelRef.parse("tickets@1")), "eval.jsonl", settings)

Greedy decoding. The prompts are the rows' messages before the last assistant's turn, that turn is the reference. The base
may be given messages of its own before them (`base_prompt`: a schema, an example), to know what the tuned one has learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.base_models import BaseModel, resolve_base_model
from service.config import RunConfig
from service.data.formats import read_rows
from service.data.rendered import renderer_for
from service.data.rows import Row
from service.domain import ModelRef
from service.errors import DataError, ModelError
from service.evaluation.task import TaskScores, score_json
from service.inference.decoder import longest_context
from service.inference.engine import GenerationRequest, SamplingParams
from service.inference.torch_engine import TorchEngine
from service.registry import Registry
from service.render import Chat, Message, load_renderer
from service.settings import Settings


@dataclass(frozen=True)
class Comparison:
    """Answers of the base and of the tuned model to the same prompts, with their scores."""

    model: str
    rows: list[Row]
    base_answers: list[str]
    tuned_answers: list[str]
    base: TaskScores
    tuned: TaskScores


class LoadedModel:
    """A published model in this process, ready to answer, and the base it came from to compare with.

    An adapter shares its engine with the base; a full model has one of its own, and its base is loaded when it is asked.
    """

    def __init__(self, ref: ModelRef, settings: Settings, *, slots: int = 16) -> None:
        registry = Registry(settings.home)
        self.manifest = registry.manifest(ref)
        self._settings, self._slots = settings, slots
        self._config = RunConfig.model_validate(self.manifest.config)
        published = registry.fetch(ModelRef.parse(self.manifest.ref), settings.cache)
        is_adapter = self.manifest.kind == "adapter"
        self.adapter = self.manifest.digest if is_adapter else None  # what a request names to get the tuned model
        directory = self._base().path if is_adapter else published
        # A full model carries the template it was trained with; an adapter's is the base's, or the one its run named.
        self.renderer = renderer_for(self._config, directory) if is_adapter else load_renderer(directory)
        if self.renderer.digest != self.manifest.renderer_digest:
            raise ModelError(
                f"{self.manifest.ref} was trained with the chat template and tokenizer "
                f"{self.manifest.renderer_digest[:12]}, here they are {self.renderer.digest[:12]}. Restore model.chat_template."
            )
        self.engine = self._engine(directory)
        if self.adapter:
            self.engine.load_adapter(self.adapter, published)

    def answers(self, prompts: Sequence[Chat], *, tuned: bool, max_tokens: int) -> list[str]:
        """Greedy answers, in order; by the tuned model, or by the base alone. As long as fits beside a long prompt."""
        requests = []
        for index, prompt in enumerate(prompts):
            ids = tuple(self.renderer.prompt_ids(*prompt))
            room = max(1, min(max_tokens, self.engine.max_context - len(ids)))
            sampling = SamplingParams(max_tokens=room, temperature=0.0)
            requests.append(GenerationRequest(str(index), ids, sampling, self.adapter if tuned else None))
        shared = tuned or self.adapter is not None
        return (self.engine if shared else self._engine(self._base().path)).generate(requests)

    def _base(self) -> BaseModel:
        asked = self._config.model
        base = resolve_base_model(asked.id, self._settings.cache, asked.revision, self._settings.home)
        if base.digest != self.manifest.base_digest:
            raise ModelError(
                f"{self.manifest.ref} was trained on a base with sha256 {self.manifest.base_digest[:12]}, "
                f"{asked.id} is now {base.digest[:12]}. Restore the base it was trained on."
            )
        return base

    def _engine(self, directory: Path) -> TorchEngine:
        import torch

        return TorchEngine(
            directory,
            tokenizer=self.renderer.tokenizer,
            stop_ids=self.renderer.stop_ids,
            dtype=torch.bfloat16 if self._config.precision == "bf16" else torch.float32,
            device="cuda" if torch.cuda.is_available() else "cpu",
            num_slots=self._slots,
            max_context=longest_context(directory, self._config.data.seq_len + 1024),
            max_lora_columns=self.manifest.rank,
        )


def compare(
    ref: ModelRef, data: str, settings: Settings, *, base_prompt: Sequence[Message] = (), limit: int | None = None
) -> Comparison:
    """Both models' answers to a data file. Raises DataError, NotFoundError, ModelError."""
    rows = read_rows(data)[:limit]
    model = LoadedModel(ref, settings)
    references = [row.reference() for row in rows]
    lengths = [len(model.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    # Room for half as much again as the longest reference: a model that never stops must not take for ever.
    max_tokens = max(lengths) * 3 // 2 + 16
    base_prompts = [(with_prompt(row.prompt(), base_prompt), row.tools) for row in rows]
    base_answers = model.answers(base_prompts, tuned=False, max_tokens=max_tokens)
    tuned_answers = model.answers([(row.prompt(), row.tools) for row in rows], tuned=True, max_tokens=max_tokens)
    return compared(model.manifest.ref, rows, base_answers, tuned_answers)


def compared(model: str, rows: list[Row], base_answers: list[str], tuned_answers: list[str]) -> Comparison:
    """Answers with their scores against the rows' references, wherever the answers came from."""
    references = [row.reference() for row in rows]
    base, tuned = score_json(references, base_answers), score_json(references, tuned_answers)
    return Comparison(model, rows, base_answers, tuned_answers, base, tuned)


def with_prompt(messages: Sequence[Message], before: Sequence[Message]) -> list[Message]:
    """`before`, then the messages without their system prompt; just the messages when `before` is empty."""
    return [*before, *(m for m in messages if m["role"] != "system" or not before)]


def read_prompt(uri: str) -> tuple[Message, ...]:
    """The messages of a data file's only row. Raises DataError."""
    rows = read_rows(uri)
    if len(rows) != 1:
        raise DataError(
            f"{uri} has {len(rows)} rows. A base prompt is one row: the messages to put before each prompt."
        )
    return rows[0].messages


def side_by_side(comparison: Comparison, num_rows: int) -> Any:
    """A rich table of the first answers: prompt, reference, base, tuned."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(comparison.rows)} prompts, the first {num_rows}", show_lines=True)
    for heading in ("message", "reference", "base", comparison.model):
        table.add_column(heading, overflow="fold", ratio=1)
    answers = zip(comparison.rows, comparison.base_answers, comparison.tuned_answers, strict=True)
    for row, base, tuned in list(answers)[:num_rows]:
        cells = (row.prompt()[-1]["content"], row.reference(), _shortened(base), _shortened(tuned))
        table.add_row(*(Text(cell) for cell in cells))  # not markup: models write brackets
    return table


def summary(comparison: Comparison) -> str:
    """`exact fields: base 0.03 -> tickets@1 0.94 | valid JSON: 0.20 -> 1.00 | 64 prompts`, or exact match without JSON."""
    base, tuned, name = comparison.base, comparison.tuned, comparison.model
    if tuned.exact_fields is None:
        scores = [f"exact match: base {base.exact_match:.2f} -> {name} {tuned.exact_match:.2f}"]
    else:
        scores = [
            f"exact fields: base {base.exact_fields:.2f} -> {name} {tuned.exact_fields:.2f}",
            f"valid JSON: {base.valid_json:.2f} -> {tuned.valid_json:.2f}",
        ]
    return " | ".join([*scores, f"{len(comparison.rows)} prompts"])


def _shortened(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:237]}..."
