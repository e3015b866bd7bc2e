"""The base model over slots: loading, refusing what would be wrong, and the one forward that there is.

A forward takes pieces: the next token of every decoding row, and parts of prompts. Works with transformers' own causal
decoders whose layers are full or sliding attention. What cannot be read off a config is tried at construction: pieces
over slots must give the logits of the model's own forward, or ModelError. Better refused than silently wrong.
`slots.py` is the memory, `slot_attention.py` reads it, `lora_bank.py` has the adapters, `torch_engine.py` the order.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from service.domain import BaseBits
from service.errors import ModelError
from service.inference import slot_attention
from service.inference.lora_bank import LoraBank
from service.inference.products import Ways
from service.inference.slot_attention import Piece, Reading, reading
from service.inference.slots import Slots
from service.quantised import keep_unpacked, loading_options

# Largest accepted difference to the model's own forward, in standard deviations of the logits. Right models were seen
# at 1e-6 (float32) and 0.03 (bfloat16); a wrong position or mask moves logits by 0.5 and more.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
_PROBE_TOKENS = 6


class Decoder:
    """A causal language model, its slots and its adapters' bank. Only one thread may run forwards.

    `kv_bytes` limits the slots' memory: there are as many slots as fit, at most `num_slots`.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int,
        max_context: int,
        max_lora_columns: int,
        kv_bytes: int | None = None,
        base_bits: BaseBits = 16,
        double_quant: bool = True,
    ) -> None:
        config = _checked_config(model_dir, max_context, dtype)
        options = loading_options(base_bits, dtype, double_quant=double_quant, alone=True)
        if options:
            options["device_map"] = {"": str(device)}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, local_files_only=True, use_safetensors=True, **options
            )
        except (ValueError, OSError, ImportError) as error:
            raise ModelError(f"{model_dir} cannot be loaded as a causal language model: {error}") from error
        keep_unpacked(model)
        self.model: PreTrainedModel = (model if options else model.to(device)).eval().requires_grad_(False)
        self.device = device
        self.vocabulary_size: int = self.model.get_input_embeddings().num_embeddings
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        num_heads, head_dim = self._cache_shape(config)
        shape = {"num_layers": config.num_hidden_layers, "num_heads": num_heads, "head_dim": head_dim}
        slot_bytes = 2 * config.num_hidden_layers * num_heads * head_dim * max_context * dtype.itemsize
        self.slots = Slots(
            num_slots=_slots_within(kv_bytes, slot_bytes, num_slots),
            max_context=max_context,
            dtype=dtype,
            device=device,
            **shape,
        )
        texts = [[(7 * i + 11 * row + 3) % config.vocab_size for i in range(_PROBE_TOKENS)] for row in range(2)]
        expected_BV = self._own_logits(texts)
        ways = Ways(rows=self.slots.num_slots)
        self.bank = LoraBank(self.model, max_lora_columns, self._carriers(texts[0]), ways)
        _replace_head(self.model, ways)
        slot_attention.install(self.model)
        # In 8 bits, inputs are rounded too: a difference in the last place becomes a whole step here and there.
        tolerance = _PROBE_TOLERANCE[torch.bfloat16 if base_bits == 8 else dtype]
        self._probe(config, texts, expected_BV, tolerance)

    @torch.inference_mode()
    def forward(
        self, pieces: Sequence[Piece], adapters: Sequence[str | None], every: Sequence[int] = ()
    ) -> torch.Tensor:
        """Append these pieces to their slots; the logits [n, V] after the last token of each, in their order.

        `adapters` has a piece's adapter or None. After those n rows come the logits at all tokens of the pieces whose
        numbers `every` gives. When it raises, the pieces' slots hold rubbish and must be released.
        """
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number].tokens) > 1)
        forward = Reading(self.slots, [pieces[number] for number in order])
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[str | None] = []
        spans: dict[int, range] = {}
        for number in order:
            piece = pieces[number]
            start = self.slots.lengths[piece.slot]
            spans[number] = range(len(tokens), len(tokens) + len(piece.tokens))
            tokens += piece.tokens
            positions += range(start, start + len(piece.tokens))
            owners += [adapters[number]] * len(piece.tokens)
            self.slots.lengths[piece.slot] += len(piece.tokens)
        keep = [spans[number][-1] for number in range(len(pieces))]
        keep += [at for number in every for at in spans[number]]
        self.bank.select(owners)
        ids_1N, positions_1N = (torch.tensor([values], device=self.device) for values in (tokens, positions))
        with reading(forward):
            self._windows = forward.windows
            return self._logits(ids_1N, positions_1N, torch.tensor(keep, device=self.device))

    def _logits(self, ids_1N: torch.Tensor, positions_1N: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        out = self.model(input_ids=ids_1N, position_ids=positions_1N, use_cache=False, return_dict=True, **options)
        logits_NV: torch.Tensor = out.logits[0]
        return logits_NV if self._keeps else logits_NV[keep]

    def release(self, slot: int) -> None:
        """Close a slot and zero it."""
        with torch.inference_mode():
            self.slots.release(slot)

    @torch.inference_mode()
    def _own_logits(self, texts: list[list[int]]) -> torch.Tensor:
        """The model's own last logits for each text, [B, V], before anything is changed in it."""
        ids = [torch.tensor([text], device=self.device) for text in texts]
        return torch.cat([self.model(input_ids=ids_1T, use_cache=False).logits[:, -1] for ids_1T in ids]).float()

    @torch.inference_mode()
    def _carriers(self, text: list[int]) -> list[list[str]]:
        """The linear layers that can carry adapters, those that are given the same tensor together.

        They are called once in a forward, with one row for every token in its place. Others (experts are given some of
        the tokens, in an order of their own) could not tell whose token is whose.
        """
        seen: list[tuple[torch.Tensor, list[str]]] = []  # the tensors too, so that none is mistaken for another

        def note(name: str, x: torch.Tensor) -> None:
            if seen and seen[-1][0] is x:
                seen[-1][1].append(name)
            else:
                seen.append((x, [name]))

        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        self.model(input_ids=torch.tensor([text], device=self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        times = Counter(name for _, names in seen for name in names)
        in_place = [names for x, names in seen if x.dim() == 3 and x.shape[:2] == (1, len(text))]
        return [once for names in in_place if (once := [name for name in names if times[name] == 1])]

    @torch.inference_mode()
    def _cache_shape(self, config: Any) -> tuple[int, int]:
        """Key-value heads and head size, as the model itself fills a cache; they must be the same in all layers."""
        try:
            cache = self.model(input_ids=torch.tensor([[0, 1]], device=self.device), use_cache=True).past_key_values
            kinds = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
            shapes = {tuple(tensor.shape) for layer in cache.layers for tensor in (layer.keys, layer.values)}
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"{config.model_type} models cannot be run with a key-value cache here: {error}"
            ) from error
        if kinds or len(shapes) != 1 or len(cache.layers) != config.num_hidden_layers:
            raise ModelError(
                f"{config.model_type} keeps a cache of another kind (layers {sorted(kinds)}, shapes {sorted(shapes)}); "
                "the embedded engine needs one key and one value tensor of one shape in every layer. Use vLLM for it."
            )
        _, num_heads, _, head_dim = shapes.pop()
        return num_heads, head_dim

    @torch.inference_mode()
    def _probe(self, config: Any, texts: list[list[int]], expected_BV: torch.Tensor, tolerance: float) -> None:
        """Two rows in pieces, together and apart, against the model's own forward of each."""
        rows = texts[: self.slots.num_slots]
        try:
            taken = [self.slots.take() for _ in rows]
            bounds = [(0, 3, 5, _PROBE_TOKENS), (0, 2, 3, _PROBE_TOKENS)]
            for step in range(3):
                cut = [slice(bounds[row][step], bounds[row][step + 1]) for row in range(len(rows))]
                pieces = [Piece(slot, tuple(rows[row][cut[row]])) for row, slot in enumerate(taken)]
                seen_BV = self.forward(pieces, [None] * len(pieces)).float()
            windows = [self._windows.get(layer) for layer in range(config.num_hidden_layers)]
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, LookupError) as error:
            raise ModelError(f"{config.model_type} models cannot be decoded in slots: {error}") from error
        for slot in taken:
            self.release(slot)
        if windows != _windows(config):
            raise ModelError(
                f"{config.model_type}: its layers attend with windows {windows}, its config says {_windows(config)}; "
                "the embedded engine cannot tell what is right. Use vLLM for this model."
            )
        off = float((seen_BV - expected_BV[: len(rows)]).abs().max() / expected_BV.std().clamp_min(1e-6))
        if not off <= tolerance:
            raise ModelError(
                f"{config.model_type}: decoding in slots differs from the model's own forward by {off:.3g} standard "
                "deviations of its logits, so its answers would be wrong. Use vLLM for this model."
            )


class _Head(nn.Module):
    """The output head, by the fastest product."""

    def __init__(self, head: nn.Linear, ways: Ways) -> None:
        super().__init__()
        self._product = ways.product(head.weight, head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def _replace_head(model: PreTrainedModel, ways: Ways) -> None:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    for name, module in list(model.named_modules()):
        if module is head and type(module) is nn.Linear:
            model.set_submodule(name, _Head(module, ways))


def _slots_within(kv_bytes: int | None, slot_bytes: int, num_slots: int) -> int:
    if kv_bytes is None:
        return num_slots
    if kv_bytes < slot_bytes:
        raise ModelError(
            f"a slot of the key-value memory takes {slot_bytes} bytes, the budget is {kv_bytes}: raise it "
            "(engine.kv_bytes), or lower max_context."
        )
    return min(num_slots, kv_bytes // slot_bytes)


def _checked_config(model_dir: Path, max_context: int, dtype: torch.dtype) -> Any:
    """The text config, or ModelError with every reason why this model would not be served right."""
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, OSError) as error:
        raise ModelError(f"{model_dir} holds no readable config.json of a known model: {error}") from error
    problems = []
    if dtype not in _PROBE_TOLERANCE:
        problems.append(f"dtype {dtype} is not served: use bfloat16 or float32.")
    if getattr(config, "is_encoder_decoder", False):
        problems.append(f"{config.model_type} is an encoder-decoder; the engine serves decoder-only models.")
    text = config.get_text_config()
    problems += _attention_problems(text, max_context) + _position_problems(text, max_context)
    if problems:
        raise ModelError(f"{model_dir} cannot be served by the embedded engine:\n" + "\n".join(problems))
    return text


def longest_context(model_dir: Path, wanted: int) -> int:
    """`wanted` tokens, or as many as the model knows positions for and sees at once."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True).get_text_config()
    limits = [getattr(config, name, None) for name in ("attention_chunk_size", "max_position_embeddings")]
    return min(wanted, *(limit for limit in limits if isinstance(limit, int)))


def _windows(config: Any) -> list[int | None]:
    """The sliding window of every layer, or None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "use_sliding_window", True) else "full_attention"]
        kinds *= config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _attention_problems(config: Any, max_context: int) -> list[str]:
    layer_types = getattr(config, "layer_types", None) or []
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    chunk = getattr(config, "attention_chunk_size", None)
    problems = []
    if other:
        problems.append(f"layers of type {', '.join(other)}: only full and sliding attention are served in slots.")
    if isinstance(chunk, int) and chunk < max_context:
        problems.append(f"attention in chunks of {chunk} tokens, max_context {max_context}: set it to {chunk} or less.")
    return problems


def _position_problems(config: Any, max_context: int) -> list[str]:
    problems = []
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and max_context > longest:
        problems.append(
            f"max_context is {max_context}, the model knows {longest} positions: set it to {longest} or less."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # Rotations that change once the longest row passes a length would make a row depend on its neighbours.
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        limit = part.get("original_max_position_embeddings") or longest
        if part.get("rope_type") in ("dynamic", "longrope") and isinstance(limit, int) and max_context > limit:
            problems.append(
                f"rope type {part['rope_type']} changes beyond {limit} tokens, max_context {max_context}: "
                f"set it to {limit} or less."
            )
    return problems
