"""Choosing one token from one row of logits: row by row, so that a row never depends on its batch.

Plain greedy rows need no float32 copy of the vocabulary. Sampling draws a single uniform number per token from the
request's own generator on the CPU and inverts the cumulative distribution in vocabulary order, so that the same seed
gives the same tokens on any device and beside any neighbours, up to the rounding of the logits themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from service.inference.engine import SamplingParams, TokenLogprob
from service.inference.grammar import Matcher

NOT_FINITE = -1  # in place of a token: this row's logits hold NaN or +inf
_CANDIDATES = 256  # likeliest tokens that are looked at first for a nucleus; nearly always it lies within


class Sampler:
    """One request's way to choose its tokens, and what it has chosen."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], matcher: Matcher | None = None) -> None:
        self.params, self._matcher = params, matcher
        self._counts: Counter[int] = Counter()
        self._prompt_ids = set(prompt_ids) if params.repetition_penalty != 1.0 else set()
        self._adjusts = bool(
            params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or matcher
        )
        self._generator = generator_for(params)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is always the one."""
        return self._generator is None and not self._adjusts

    def choose(self, logits_V: torch.Tensor) -> int:
        """The next token from finite logits."""
        adjusted_V = self._adjusted(logits_V) if self._adjusts else logits_V
        if self._generator is None:
            return int(adjusted_V.argmax())
        p = self.params
        return sample(adjusted_V, p.temperature, self._generator, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if self._adjusts:
            self._counts[token] += 1
        if self._matcher:
            self._matcher.accept(token)

    @property
    def is_done(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.is_done

    def _adjusted(self, logits_V: torch.Tensor) -> torch.Tensor:
        p, logits_V, device = self.params, logits_V.float().clone(), logits_V.device
        if p.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(self._prompt_ids | set(self._counts)), device=device)
            old = logits_V[ids]
            logits_V[ids] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        if self._counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), device=device)
            logits_V[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if p.logit_bias:
            ids = torch.tensor([token for token, _ in p.logit_bias], device=device)
            logits_V.index_add_(0, ids, torch.tensor([bias for _, bias in p.logit_bias], device=device))
        if self._matcher:
            logits_V.masked_fill_(~self._matcher.allowed().to(device), float("-inf"))
        return logits_V


def generator_for(params: SamplingParams) -> torch.Generator | None:
    """A fresh random stream for one request; none for a greedy one."""
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def likeliest(logits_BV: torch.Tensor) -> list[int]:
    """The token of the largest logit in each row, `NOT_FINITE` for rows that are broken. Here the device is waited for."""
    best_B, tokens_B = logits_BV.max(dim=-1)  # NaN and +inf win every maximum
    best, tokens = torch.stack((best_B.double(), tokens_B.double())).tolist()
    return [
        int(token) if float("-inf") < value < float("inf") else NOT_FINITE
        for value, token in zip(best, tokens, strict=True)
    ]


def sample(
    logits_V: torch.Tensor,
    temperature: float,
    generator: torch.Generator,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One draw at `temperature` from what `candidates` leaves."""
    exact_V = logits_V.double()
    scaled_V = (exact_V - exact_V.max()) / temperature  # so that no temperature makes them overflow
    ids, weights = candidates(scaled_V, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = weights.cumsum(dim=-1)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).to(cumulative.device)
    # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability zero.
    at = torch.searchsorted(cumulative, (uniform * cumulative[-1]).reshape(1), right=True).clamp_max_(len(weights) - 1)
    return int(at if ids is None else ids[at])


def candidates(
    scaled_V: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token ids in vocabulary order (None: all of them) and their weights, which need not sum to one.

    Of the `top_k` likeliest, those of the nucleus (Holtzman et al. 2020, eq. 2) that have at least `min_p` times the
    probability of the likeliest (Nguyen et al. 2024, eq. 2).
    """
    if not top_k and top_p == 1.0 and min_p == 0.0:
        return None, torch.softmax(scaled_V, dim=-1)
    size = len(scaled_V)
    first = min(top_k or (size if top_p == 1.0 else _CANDIDATES), size)
    values, ids = scaled_V.topk(first)
    everything = values if top_k else scaled_V
    shares = (values - everything.logsumexp(-1)).exp()
    if top_p < 1.0:
        before = shares.cumsum(-1) - shares
        if not top_k and first < size and float(before[-1] + shares[-1]) < top_p:  # the nucleus is larger
            values, ids = scaled_V.sort(descending=True)
            shares = (values - everything.logsumexp(-1)).exp()
            before = shares.cumsum(-1) - shares
        shares = shares.where(before < top_p, 0.0)
    if min_p > 0.0:
        shares = shares.where(shares >= min_p * shares[0], 0.0)
    kept = shares > 0.0
    ids, order = ids[kept].sort()
    return ids, shares[kept][order]


def logprobs_of(logits_TV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The log-probability of a token at each of T places, and the `num_top` likeliest tokens there."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    chosen = logprobs_TV.gather(1, torch.tensor(tokens, device=logprobs_TV.device)[:, None])[:, 0].tolist()
    values, ids = (found.tolist() for found in logprobs_TV.topk(num_top, dim=-1))
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[place], values[place], strict=True)))
        for place, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))
    ]
