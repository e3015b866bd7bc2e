"""Supervised fine-tuning: the negative log-likelihood of the assistant's tokens, and of nothing else.

Examples may share a sequence (packing): positions begin again with each, and no example sees another. Whether a model
keeps that promise is not assumed but probed. Shapes: B sequences, T tokens of the longest, N supervised tokens in the
micro-batch, D hidden, V vocabulary. The head is in `head.py`, packed attention on CPUs in `attention.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from service.training.methods.fused import plainly
from service.training.objectives.attention import SHORT, attend_by_example, attend_by_mask, attends_by_example
from service.training.objectives.head import Head, LogitShape, compute_dtype

PROBE_TOKENS = 256  # of each example that a probe packs
# Mean nats between two computations of the same: so much at least, and so much of the mean -log p. Rounding is relative, so
# it grows with the surprise: seen were 1e-6 in float32, in bfloat16 0.01 at 2.5 nats a token (text) and 0.08 at 14 (random
# tokens, where bfloat16 was 0.09 from float32). Wrong positions or neighbours cost far more. Single tokens scatter by 1.3
# times the mean, so that a mean over N of them is up to 4 / sqrt(N) above its own (three standard errors).
ROUNDING = {torch.float32: (1e-4, 0.0), torch.float16: (0.05, 0.02), torch.bfloat16: (0.05, 0.02)}

TokenArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. `trained_BT[b, t]` says that the prediction *of* token t is trained.

    `positions_BT` counts from 0 in every example, and in the padding after them; None where each sequence is one example.
    """

    ids_BT: torch.Tensor
    trained_BT: torch.Tensor
    positions_BT: torch.Tensor | None = None

    @property
    def targets_N(self) -> torch.Tensor:
        """The supervised tokens, sequence by sequence. An example's first token has nothing before it and is never one."""
        return self.ids_BT[:, 1:][self.trained_BT[:, 1:]]

    def to(self, device: torch.device) -> Batch:
        """The same on a device; out of pinned memory without waiting."""
        positions_BT = None if self.positions_BT is None else self.positions_BT.to(device, non_blocking=True)
        ids_BT, trained_BT = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BT, self.trained_BT))
        return Batch(ids_BT, trained_BT, positions_BT)

    def pinned(self) -> Batch:
        """The same in host memory that a GPU reads by itself."""
        positions_BT = None if self.positions_BT is None else self.positions_BT.pin_memory()
        return Batch(self.ids_BT.pin_memory(), self.trained_BT.pin_memory(), positions_BT)


def collate(packs: Sequence[Sequence[TokenArrays]], device: torch.device) -> Batch:
    """Each pack, of one or several examples, is one sequence; shorter ones are padded on the right.

    No attention mask is needed for padding: a causal model's tokens never see what stands after them. Without one, and
    without positions where nothing is packed, attention takes its faster causal form.
    """
    examples = [example for pack in packs for example in pack]
    lengths: Integers = np.fromiter((len(ids) for ids, _ in examples), dtype=np.int64, count=len(examples))
    starts: Integers = np.cumsum(lengths) - lengths
    ends = np.cumsum([len(pack) for pack in packs])
    tokens = np.diff(np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], ends])])  # of each pack
    longest = int(tokens.max())
    place = np.arange(lengths.sum()) + np.repeat(np.arange(len(packs)) * longest - np.cumsum(tokens) + tokens, tokens)
    mask = np.concatenate([mask for _, mask in examples]).astype(bool)
    mask[starts] = False  # it would be predicted from the example before

    def scattered(values: npt.NDArray[Any], empty: npt.NDArray[Any]) -> torch.Tensor:
        empty.reshape(-1)[place] = values
        return torch.from_numpy(empty).to(device)

    shape = len(packs), longest
    positions_BT = None
    if len(examples) > len(packs):
        padding = np.arange(longest) - tokens[:, None]  # from 0 again: one more example, which nobody looks at
        positions_BT = scattered(np.arange(lengths.sum()) - np.repeat(starts, lengths), padding)
    return Batch(
        scattered(np.concatenate([ids for ids, _ in examples]), np.zeros(shape, dtype=np.int64)),
        scattered(mask, np.zeros(shape, dtype=bool)),
        positions_BT,
    )


def stacked(batches: Sequence[Batch]) -> Batch:
    """Their sequences in one batch, padded to the longest, in order."""
    longest = max(batch.ids_BT.shape[1] for batch in batches)

    def padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([functional.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])

    positions_BT = None
    if any(batch.positions_BT is not None for batch in batches):
        positions_BT = torch.cat([_positions(batch, longest) for batch in batches])
    return Batch(
        padded([batch.ids_BT for batch in batches]), padded([batch.trained_BT for batch in batches]), positions_BT
    )


def _positions(batch: Batch, longest: int) -> torch.Tensor:
    """[B, longest]: what is added as padding is one more example, which nobody looks at."""
    own_BT = batch.positions_BT
    if own_BT is None:
        own_BT = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device).expand_as(batch.ids_BT)
    more = torch.arange(longest - own_BT.shape[1], device=own_BT.device).expand(len(own_BT), -1)
    return torch.cat([own_BT, more], dim=1)


def rounding_noise(dtype: torch.dtype, log_probs: torch.Tensor) -> float:
    """How far, in mean nats a token, other products in this type may be from these log-probabilities."""
    least, share = ROUNDING.get(dtype, ROUNDING[torch.float32])
    return max(least, share * -float(log_probs.mean())) * (1 + 4 / math.sqrt(len(log_probs)))


class SupervisedLoss(torch.nn.Module):
    """The loss of a causal language model, by the fast road where the model allows it, else by its own forward.

    The fast road takes the decoder's hidden states of the supervised positions through the head's weight. Heads that do
    more than scaling and soft-capping would be wrong there, so `probe_head` compares both on a real batch first.
    `own_forward` says which is taken. The model's parameters keep their names in `model.named_parameters()`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        linear = self._causal.get_output_embeddings()
        plain = self._decoder is not None and type(linear) is torch.nn.Linear and linear.bias is None
        shape = LogitShape.of(self._causal.config.get_text_config())
        self.head = Head(linear.weight, shape) if plain else None
        self.own_forward = self.head is None

    # Properties, because an attribute would make these modules children a second time.
    @property
    def _causal(self) -> Any:
        """The transformers model, inside of PEFT's where there is one."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _decoder(self) -> Any:
        causal = self._causal
        return getattr(causal, causal.base_model_prefix, None)

    @property
    def roads(self) -> tuple[bool, bool]:
        """What the probes have chosen for this model: its own head, and attention example by example."""
        return self.own_forward, attends_by_example(self._causal)

    def forward(self, batch: Batch, summed: bool = True) -> torch.Tensor:
        """The sum over supervised tokens of -log p, in nats, with its gradient; not `summed`, each log p, [N] float32."""
        return self._loss(self._at_supervised(batch), batch.targets_N, summed)

    def each(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The loss of every batch, as `forward` sums it, out of one pass over all of them."""
        counts = [len(batch.targets_N) for batch in batches]
        parts = torch.split(self._at_supervised(stacked(batches)), counts)
        return [self._loss(values, batch.targets_N, True) for values, batch in zip(parts, batches, strict=True)]

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> torch.Tensor:
        """log p of every supervised token, [N], float32."""
        result: torch.Tensor = self(batch, summed=False)
        return result

    @torch.no_grad()
    def plain_log_probs(self, batch: Batch) -> torch.Tensor:
        """The same by transformers' and PEFT's own products, as whoever loads the saved model will compute them."""
        causal = self._causal
        by_example = attends_by_example(causal)
        if by_example:
            attend_by_mask(causal)
        try:
            with plainly(self.model):
                return self.log_probs(batch)
        finally:
            if by_example:
                attend_by_example(causal)

    def probe_head(self, batch: Batch, tolerance: float) -> float:
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

    def probe_packing(self, examples: Sequence[TokenArrays]) -> str | None:
        """None where examples may share a sequence; else the reason against it. In eval mode, after `probe_head`.

        Packs the examples, changes the first one, and demands the same bits for the others; and about the same as alone.
        On a CPU this also chooses how packed sequences attend: example by example, or else by a mask.
        """
        if "position_ids" not in inspect.signature((self._decoder or self._causal).forward).parameters:
            return f"{type(self._causal).__name__} takes no position ids"
        lengths = [PROBE_TOKENS, SHORT, *[PROBE_TOKENS] * len(examples)]  # short ones attend by another road
        pair = examples if len(examples) > 1 else [*examples, *examples]
        first, *others = [(ids[:n], np.ones_like(mask[:n])) for n, (ids, mask) in zip(lengths, pair, strict=False)]
        alone = torch.cat([self._probed([[example]]) for example in (first, *others, others[0])])
        if not alone.isfinite().all():
            return f"{type(self._causal).__name__} gives log-probabilities that are not finite"
        if attend_by_example(self._causal):
            if self._leak(first, others, alone) is None:
                return self.probe_causality(first)
            attend_by_mask(self._causal)
        return self._leak(first, others, alone) or self.probe_causality(first)

    def probe_causality(self, example: TokenArrays) -> str | None:
        """None where no token's probability changes with those after it; else what is wrong with the model. In eval mode.

        A model that sees the token it is to predict learns nothing, packed or not.
        """
        ids, mask = example[0][:PROBE_TOKENS], np.ones_like(example[1][:PROBE_TOKENS])
        other_end = np.append(ids[:-1], _another(ids[-1:])).astype(ids.dtype)
        if torch.equal(self._probed([[(ids, mask)]])[:-1], self._probed([[(other_end, mask)]])[:-1]):
            return None
        return f"{type(self._causal).__name__} is no causal model: a token's probability changes with those after it"

    def _leak(self, first: TokenArrays, others: list[TokenArrays], alone: torch.Tensor) -> str | None:
        name = type(self._causal).__name__
        ids, mask = first
        packed = self._probed([[first, *others], [others[0]]])
        changed = self._probed([[(_another(ids), mask), *others], [others[0]]])
        after = len(ids) - 1
        if not torch.equal(packed[after:], changed[after:]):
            worst = float((packed - changed)[after:].abs().max().item())
            return f"in {name} an example sees the one before it in its sequence ({worst:.2g} nats)"
        difference = float((packed - alone).abs().mean().item())
        if not difference <= rounding_noise(compute_dtype(next(self.model.parameters())), alone):
            return f"in {name} a packed example differs from itself alone (by {difference:.2g} nats a token)"
        return None

    def _probed(self, packs: Sequence[Sequence[TokenArrays]]) -> torch.Tensor:
        return self.log_probs(collate(packs, next(self.model.parameters()).device))

    def _loss(self, values_NX: torch.Tensor, targets_N: torch.Tensor, summed: bool) -> torch.Tensor:
        """From what `_at_supervised` gives."""
        if self.head is None or self.own_forward:
            loss = functional.cross_entropy(values_NX.float(), targets_N, reduction="sum" if summed else "none")
            return loss if summed else -loss
        result: torch.Tensor = self.head(values_NX, targets_N, summed)
        return result

    def _at_supervised(self, batch: Batch) -> torch.Tensor:
        """Where a supervised token is predicted, [N, ...]: logits on the model's own road, hidden states on the fast one."""
        module, output = self._decoder, "last_hidden_state"
        if self.head is None or self.own_forward:
            module, output = self._causal, "logits"
        ids_BT, positions_BT = batch.ids_BT, batch.positions_BT
        if positions_BT is None:
            values_BTX = getattr(module(input_ids=ids_BT, use_cache=False), output)
        else:  # transformers looks for packing only without a cache and without a mask
            if self._causal.config._attn_implementation.startswith("flash"):  # and there only in a single sequence
                ids_BT, positions_BT = ids_BT.reshape(1, -1), positions_BT.reshape(1, -1)
            values_BTX = getattr(module(input_ids=ids_BT, position_ids=positions_BT, use_cache=False), output)
        values_BTX = values_BTX.reshape(*batch.ids_BT.shape, -1)
        supervised: torch.Tensor = values_BTX[:, :-1][batch.trained_BT[:, 1:]]
        return supervised


def _another(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Other ids of the same vocabulary, every one changed."""
    return np.where(ids > 0, ids - 1, ids + 1)
