"""Which engine replica takes a request: one that is not busy, has the adapter, and has seen the conversation. Pure.

The score is counted in turns of a replica's slots: waiting for a turn, waiting for an adapter, computing a long prompt
again. So an adapter's replicas are preferred until they are a turn busier than another, which then loads it, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve.openai_api import Ask, Prompt

ABSENT_ADAPTER = 1.0
EVICTION = 1.0  # times the share of the columns that are taken, where the adapter is absent
STRANGE_CONVERSATION = 0.5
MAX_TEXT = 256  # characters or tokens of a prompt that is no conversation


@dataclass(frozen=True)
class Candidate:
    """A replica: requests that it has now, how many run at once, resident adapters' digests, share of taken columns."""

    name: str
    num_requests: int
    num_slots: int
    resident: frozenset[str]
    taken: float = 0.0


def conversation_of(ask: Ask) -> str:
    """What stays the same while a conversation grows: all up to its first user message; of a text, its beginning."""
    return hashlib.sha256(json.dumps(_beginning(ask.prompts[0])).encode()).hexdigest()


def _beginning(prompt: Prompt) -> object:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return prompt[:MAX_TEXT]
    first_user = next((index for index, message in enumerate(prompt) if message["role"] == "user"), len(prompt))
    return prompt[: first_user + 1]


def ranked(candidates: Iterable[Candidate], digest: str | None, conversation: str) -> Sequence[str]:
    """Names of replicas, best first, for a request to this adapter (None: the base) in this conversation."""
    found = list(candidates)
    key = f"{digest}:{conversation}"
    home = max(found, key=lambda candidate: _weight(candidate.name, key), default=None)

    def cost(candidate: Candidate) -> tuple[float, int]:
        absent = digest is not None and digest not in candidate.resident
        turns = candidate.num_requests / candidate.num_slots
        load = absent * (ABSENT_ADAPTER + EVICTION * candidate.taken)
        return turns + load + STRANGE_CONVERSATION * (candidate is not home), _weight(candidate.name, key)

    return [candidate.name for candidate in sorted(found, key=cost)]


def _weight(name: str, key: str) -> int:
    """Rendezvous hashing (Thaler and Ravishankar 1998): a conversation moves only when its replica goes."""
    return int.from_bytes(hashlib.sha256(f"{name}:{key}".encode()).digest()[:8])
