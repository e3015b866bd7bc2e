"""Cases that schemathesis makes of an endpoint's own document, sent over HTTP: every answer must be one that is documented.

Left alone nearly all would be refused with 404, and the rest generate for hours. `_aim` gives names that exist to most of
them, keeps answers to a few tokens, and lets few wait for an adapter.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks as of_openapi

from serve.openai_api import CHAT
from tests.integration.serving import DEADLINE_S
from tests.integration.tiny import NUM_TOKENS

CHECKS: list[Any] = [
    not_a_server_error,
    of_openapi.status_code_conformance,
    of_openapi.content_type_conformance,
    of_openapi.response_headers_conformance,
    of_openapi.response_schema_conformance,
    of_openapi.negative_data_rejection,
]
_THREADS = (
    3  # that send; the cases are made in one, for CPython 3.11's parser, which Hypothesis calls, fails in several
)
_NAMES = ("base", "red", "blue", "support", "red@1")
_MODELS = ("red@1", "red@2", "blue@1", "foreign@1")
_AIMED, _WAITING = 0.75, 0.02  # shares of the cases
_EACH_ROUND = 100
_MAX_TOKENS, _MAX_N, _WAIT_S = 4, 3, 20.0

Seen = Counter[tuple[str, str, int]]  # cases by operation, mode and status
Operation = APIOperation[Any, Any, Any, Any]


def send_cases(url: str, total: int, prepare: Callable[[], None]) -> Seen:
    """At least `total` cases over all operations, right ones and wrong ones. Raises schemathesis' own failures.

    The same cases every time, in rounds: what one operation has changed, the others find. `prepare` comes before each.
    """
    document = requests.get(f"{url}/openapi.json", timeout=DEADLINE_S).json()
    schema = schemathesis.openapi.from_dict(document)
    operations: list[Operation] = [schema[path][method] for path, item in document["paths"].items() for method in item]
    jobs = [(operation, mode) for operation in operations for mode in GenerationMode]
    seen: Seen = Counter()
    with ThreadPoolExecutor(_THREADS) as pool, requests.Session() as http:

        def answer(case: Case[Any]) -> int:
            return case.call_and_validate(url, http, checks=CHECKS, timeout=DEADLINE_S).status_code

        for round_number in itertools.count():
            left = total - sum(seen.values())
            if left <= 0:
                return seen
            prepare()
            for operation, mode in jobs:
                chance = random.Random(f"{operation.label} {round_number}")
                sent: list[Future[int]] = []

                def send(case: Case[Any], mode: GenerationMode = mode, chance: Any = chance, sent: Any = sent) -> None:
                    _aim(case, mode, chance)
                    sent.append(pool.submit(answer, case))

                # Made in this thread, while those before are being answered.
                _make(operation, mode, min(_EACH_ROUND, -(-left // len(operations))), round_number, send)
                seen.update((operation.label, mode.value, one.result()) for one in sent)
    raise AssertionError("rounds never end")


def _make(
    operation: Operation, mode: GenerationMode, number: int, round_number: int, send: Callable[[Case[Any]], None]
) -> None:
    """At most so many cases of one operation: one that takes nothing has one, and none that is wrong."""

    @seed(round_number)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def make(case: Case[Any]) -> None:
        send(case)

    try:
        make()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE


def _aim(case: Case[Any], mode: GenerationMode, chance: random.Random) -> None:
    """What is against the document stays so: there, nothing is changed but what is right and would take long."""
    body: Any = case.body
    query = case.query
    asks = isinstance(body, dict) and case.operation.path.endswith("/completions")
    if asks:
        _shorten(body)
    if mode is GenerationMode.NEGATIVE:
        return
    if query and "wait" in query and chance.random() > _WAITING:
        del query["wait"]
        query.pop("timeout", None)
    elif query and "timeout" in query:
        query["timeout"] = _WAIT_S
    if chance.random() > _AIMED:
        return
    if asks:
        _reconcile(body)
    if isinstance(body, dict):
        if "model" in body:
            body["model"] = chance.choice(_MODELS if case.method == "PUT" else _NAMES)
        for arm in body.get("arms", {}).values():
            arm["model"] = chance.choice(_MODELS[:3])
    if query and "model" in query:
        query["model"] = chance.choice(_NAMES)
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "support" if "splits" in case.operation.path else chance.choice(_NAMES)


def _reconcile(body: dict[str, Any]) -> None:
    """What no schema says: fields that are right only beside others, and token ids that the model has."""
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("max_tokens") is not None:
        body.pop("max_completion_tokens", None)
    if body.get("max_tokens") == 0:
        body["echo"] = True
    if isinstance(body.get("prompt"), list):
        prompts = [body["prompt"]] if isinstance(body["prompt"][0], int | float) else body["prompt"]
        # To JSON Schema 1.0 is an integer, and to the endpoint it is not.
        body["prompt"] = [p if isinstance(p, str) else [int(token) % NUM_TOKENS for token in p] for p in prompts]
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(token) % NUM_TOKENS): bias for token, bias in body["logit_bias"].items()}


def _shorten(body: dict[str, Any]) -> None:
    """Few tokens and few answers; left out, `max_tokens` would fill the context."""
    for field, most in (("max_tokens", _MAX_TOKENS), ("max_completion_tokens", _MAX_TOKENS), ("n", _MAX_N)):
        if field in body and CHAT[field].takes(body[field]):
            body[field] = min(body[field], most)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = _MAX_TOKENS
