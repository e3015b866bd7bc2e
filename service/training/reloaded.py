"""What was saved, loaded and run by plain transformers and PEFT, as any user would: never by the trainer's code.

    model = load_model(base, compute)
    values = log_probs(load_adapter(model, directory), rows, compute)

How the trainer held the base (`Compute`) is given by value, because log-probabilities from a base in 4 bits are
reproduced by a base in 4 bits only. Used by `gate.py` and by `service/merging.py`.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from service.domain import BaseBits
from service.errors import ModelError
from service.quantised import keep_unpacked, loading_options

Rows = Sequence[tuple[list[int], list[int]]]  # token ids, and for each whether its prediction is trained
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LOCAL = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class Compute:
    """How a model is held and computed: the run's `precision`, and the bits of the base under an adapter."""

    precision: Literal["bf16", "fp16", "fp32"]
    base_bits: BaseBits = 16
    double_quant: bool = True  # of 4 bits

    @property
    def dtype(self) -> torch.dtype:
        """The type that unquantised weights are stored in."""
        return _DTYPES[self.precision]


def load_model(directory: Path, compute: Compute) -> Any:
    """The causal language model in `directory`, ready to answer. ModelError where its files do not hold every weight."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    quantisation = loading_options(compute.base_bits, compute.dtype, double_quant=compute.double_quant)
    # "auto": what one GPU does not hold lies in host memory, and still runs on the GPU.
    placed = {"device_map": "auto" if torch.cuda.is_available() else {"": "cpu"}}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=compute.dtype, output_loading_info=True, **_LOCAL, **placed, **quantisation
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{len(missing)} tensors of the model are in none of its files: {', '.join(missing[:5])}.")
    keep_unpacked(model)
    return model.eval()


def load_adapter(model: Any, directory: Path) -> Any:
    """`model` with the adapter in `directory` on it. ModelError where the file holds other tensors than its config asks for."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is about to go, and says of missing tensors what is raised below.
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(model, directory).eval()
    wanted, found = _adapter_names(loaded), _names_in(directory)
    problems = [
        f"{len(names)} tensors {what}: {', '.join(sorted(names)[:5])}"
        for names, what in ((wanted - found, "are missing"), (found - wanted, "belong nowhere"))
        if names
    ]
    if problems:
        raise ModelError(f"the adapter's file does not hold what its configuration asks for; {'; '.join(problems)}.")
    return loaded


def initial_magnitudes(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """DoRA's magnitudes as PEFT makes them before any training, by their names in the adapter's file.

    `model` is the base, which has not computed anything yet, and is not to be used afterwards.
    """
    from peft import PeftConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = get_peft_model(model, PeftConfig.from_pretrained(directory))
    tensors = {name: parameter for name, parameter in fresh.named_parameters() if "lora_magnitude_vector" in name}
    return {name: tensor.detach().float().cpu() for name, tensor in _as_saved(fresh, tensors).items()}


def buffer_names(directory: Path) -> list[str]:
    """The buffers that a model's files may hold: not trained. From the architecture alone, without a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, **_LOCAL))
    return [name for name, _ in model.named_buffers()]


@torch.no_grad()
def log_probs(model: Any, rows: Rows, compute: Compute, *, attention_mask: bool = False) -> list[float]:
    """log p (nats) of every trained token of `rows`, in order, computed in one batch as the trainer computes.

    Padded on the right, where a causal model needs no attention mask; with one, attention takes another road.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
    trained = torch.tensor([m + [0] * (longest - len(m)) for _, m in rows], device=device).bool()
    seen = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows], device=device)
    mask = {"attention_mask": seen} if attention_mask else {}
    with torch.autocast(device.type, dtype=compute.dtype, enabled=compute.precision != "fp32"):
        logits = model(input_ids=ids, use_cache=False, **mask).logits[:, :-1][trained[:, 1:]]
    targets = ids[:, 1:][trained[:, 1:]]
    values: list[float] = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    return values


def free_memory() -> None:
    """After a model's last name is gone: give its memory back, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _adapter_names(model: Any) -> set[str]:
    """The tensors that an adapter on this model has, under the names of PEFT's files."""
    tensors = {n: p for n, p in model.named_parameters() if "lora_" in n or n.endswith("bias")}
    return set(_as_saved(model, tensors))


def _as_saved(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    # Given its tensors, PEFT does not ask for the whole state, which bitsandbytes cannot give on every processor.
    saved: dict[str, Any] = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return saved


def _names_in(directory: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        return set(file.keys())
