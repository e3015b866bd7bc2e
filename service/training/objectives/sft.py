"""Supervised fine-tuning: the negative log-likelihood of the assistant's tokens, and of nothing else.

Shapes: B examples, T tokens of the longest, N supervised tokens in the micro-batch, D hidden, V vocabulary. The head and
the cross-entropy run on supervised positions only, in chunks, so that [N, V] logits never stand in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

CHUNK = 1024  # supervised positions whose logits stand in memory at once: 1024 x 49,152 float32 is 200 MB

TokenArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
Hidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. `trained_BT[b, t]` says that the prediction *of* token t is trained."""

    ids_BT: torch.Tensor
    trained_BT: torch.Tensor

    @property
    def targets_N(self) -> torch.Tensor:
        """The supervised tokens, row by row. A first token has nothing before it and is never one."""
        return self.ids_BT[:, 1:][self.trained_BT[:, 1:]]


def collate(examples: Sequence[TokenArrays], device: torch.device) -> Batch:
    """Pad examples on the right. No attention mask is needed: a causal model's tokens never see what stands after them.

    Without one, attention takes its faster causal form. Padding is never trained.
    """
    longest = max(len(ids) for ids, _ in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    trained_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(examples):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        trained_BT[row, : len(ids)] = torch.from_numpy(mask.astype(bool))
    return Batch(ids_BT.to(device), trained_BT.to(device))


class SupervisedLoss:
    """The loss of a causal language model, by the fast road where the model allows it, else by its own forward.

    The fast road takes the decoder's hidden states of the supervised positions through the head's weight. Heads that do
    more (soft-capping, scaling, a bias) would be wrong there, so `probe` compares both on a real batch first.
    """

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._causal = causal
        self._decoder = getattr(causal, causal.base_model_prefix)
        self._head = causal.get_output_embeddings()
        self.own_forward = not (type(self._head) is torch.nn.Linear and self._head.bias is None)

    def probe(self, batch: Batch, tolerance: float) -> float:
        """The largest difference in log-probability (nats) between both roads; over `tolerance`, the model's own is taken.

        `tolerance` is 1e-4 in float32; in bfloat16 logits near 16 are rounded to 1/16, so 0.25 is their noise.
        """
        if self.own_forward:
            return 0.0
        fast = self.log_probs(batch)
        self.own_forward = True
        difference = float((fast - self.log_probs(batch)).abs().max().item())
        self.own_forward = not difference <= tolerance
        return difference

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """The sum over supervised tokens of -log p, in nats, with its gradient."""
        if self.own_forward:
            logits_NV = self._own_logits(batch)
            return functional.cross_entropy(logits_NV.float(), batch.targets_N, reduction="sum")
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            self._hidden(batch), self._head.weight, batch.targets_N
        )
        return loss

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> torch.Tensor:
        """log p of every supervised token, [N], float32."""
        targets_N = batch.targets_N
        if self.own_forward:
            return _log_probs(self._own_logits(batch), targets_N)
        hidden_ND = self._hidden(batch)
        parts = [
            _log_probs(functional.linear(hidden, self._head.weight), targets)
            for hidden, targets in zip(torch.split(hidden_ND, CHUNK), torch.split(targets_N, CHUNK), strict=True)
        ]
        return torch.cat(parts)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        output = self._decoder(input_ids=batch.ids_BT, use_cache=False)
        hidden_ND: torch.Tensor = output.last_hidden_state[:, :-1][batch.trained_BT[:, 1:]]
        return hidden_ND

    def _own_logits(self, batch: Batch) -> torch.Tensor:
        output = self._causal(input_ids=batch.ids_BT, use_cache=False)
        logits_NV: torch.Tensor = output.logits[:, :-1][batch.trained_BT[:, 1:]]
        return logits_NV


def _log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy with the gradient computed on the way forward, chunk by chunk: d loss / d logits = p - y."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets_N), CHUNK):
            part = slice(start, start + CHUNK)
            targets = targets_N[part, None]
            logits = functional.linear(hidden_ND[part], weight_VD).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss += (normaliser - logits.gather(1, targets)).sum()
            slope = logits.sub_(normaliser).exp_().scatter_add_(1, targets, -torch.ones_like(normaliser))
            slope_low = slope.to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope_low @ weight_VD
            if grad_weight is not None:
                grad_weight += (slope_low.T @ hidden_ND[part].to(slope_low.dtype)).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (upstream,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * upstream).to(ctx.weight_dtype),
            None,
        )
