"""The base model over slots: loading, refusing what would be wrong, and the two forwards (one prompt; one step for all).

Works with transformers' own causal decoders whose every layer is full attention. What cannot be read off a config is
tried at construction: a prompt and a step over slots must give the logits of the model's own forward, or ModelError.
Better refused than silently wrong. `slots.py` is the memory, `lora_bank.py` the adapters, `torch_engine.py` the order.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from service.errors import ModelError
from service.inference.slots import SlotCache

# Largest accepted difference to the model's own forward, in standard deviations of the logits. Right models were seen
# at 1e-6 (float32) and 0.03 (bfloat16); a wrong position or mask moves logits by 0.5 and more.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class Decoder:
    """A causal language model and its slots. `prefill` opens a row, `decode` advances all rows, `release` closes one."""

    def __init__(
        self, model_dir: Path, *, dtype: torch.dtype, device: torch.device, num_slots: int, max_context: int
    ) -> None:
        config = _checked_config(model_dir, max_context, dtype)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
            )
        except (ValueError, OSError, ImportError) as error:
            raise ModelError(f"{model_dir} cannot be loaded as a causal language model with sdpa: {error}") from error
        self.model: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.vocabulary_size: int = self.model.get_input_embeddings().num_embeddings
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._options: dict[str, Any] = {"use_cache": True, "return_dict": True, **last_only}
        num_heads, head_dim = self._cache_shape(config)
        self.slots = SlotCache(
            num_layers=config.num_hidden_layers,
            num_slots=num_slots,
            num_heads=num_heads,
            max_context=max_context,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        self._probe(config)

    @torch.inference_mode()
    def prefill(self, prompt_ids: tuple[int, ...]) -> torch.Tensor:
        """Open the next row with this prompt; the logits [1, V] after its last token."""
        self.slots.begin_prefill(len(prompt_ids))
        ids_1T = torch.tensor([prompt_ids], device=self.device)
        positions_1T = torch.arange(len(prompt_ids), device=self.device)[None]
        out = self.model(input_ids=ids_1T, position_ids=positions_1T, past_key_values=self.slots, **self._options)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, last_tokens: list[int]) -> torch.Tensor:
        """Append each row's last token to its slot; the logits [n, V] that follow."""
        positions_B1, mask_B11T = self.slots.begin_decode()
        ids_B1 = torch.tensor(last_tokens, device=self.device)[:, None]
        out = self.model(
            input_ids=ids_B1,
            attention_mask=mask_B11T,
            position_ids=positions_B1,
            past_key_values=self.slots,
            **self._options,
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Close a row; the last row takes its number."""
        self.slots.release(row)

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
    def _probe(self, config: Any) -> None:
        """Two rows of unequal length, prefilled and advanced together, against the model's own forward of each."""
        count = min(2, self.slots.num_slots)
        texts = [[(7 * i + 11 * row + 3) % config.vocab_size for i in range(6 - 2 * row)] for row in range(count)]
        expected_BV = torch.cat(
            [
                self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[:, -1]
                for ids in texts
            ]
        ).float()
        try:
            for ids in texts:
                self.prefill(tuple(ids[:-1]))
            seen_BV = self.decode([ids[-1] for ids in texts]).float()
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise ModelError(f"{config.model_type} models cannot be decoded in slots: {error}") from error
        for _ in texts:
            self.release(0)
        off = float((seen_BV - expected_BV).abs().max() / expected_BV.std().clamp_min(1e-6))
        if not off <= _PROBE_TOLERANCE.get(self.model.dtype, 0.0):
            raise ModelError(
                f"{config.model_type}: decoding in slots differs from the model's own forward by {off:.3g} standard "
                "deviations of its logits, so its answers would be wrong. Use vLLM for this model."
            )


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
    limits = (
        _window(config),
        *(getattr(config, name, None) for name in ("attention_chunk_size", "max_position_embeddings")),
    )
    return min(wanted, *(limit for limit in limits if isinstance(limit, int)))


def _window(config: Any) -> int | None:
    """The sliding window, where some layer has one."""
    layer_types = getattr(config, "layer_types", None) or []
    windowed = "sliding_attention" in layer_types or (not layer_types and getattr(config, "use_sliding_window", True))
    return getattr(config, "sliding_window", None) if windowed else None


def _attention_problems(config: Any, max_context: int) -> list[str]:
    layer_types = getattr(config, "layer_types", None) or []
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    window, chunk = _window(config), getattr(config, "attention_chunk_size", None)
    problems = []
    if other:
        problems.append(f"layers of type {', '.join(other)}: only full attention is served right in slots.")
    if isinstance(window, int) and window < max_context:
        problems.append(
            f"sliding window of {window} tokens, max_context {max_context}: set max_context to {window} or less."
        )
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
