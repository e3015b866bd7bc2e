"""Task metrics: did the model give the reference answer, compared as strings and, where it is JSON, field by field.

Pure functions of references and answers: nothing here loads a model or renders a prompt. What produced the answers
decides when this runs; the names of the metrics are here.

    >>> score_json(['{"a": 1, "b": null}'], ['{"b": null, "a": 1}']).as_metrics()["eval/exact_fields"]
    1.0
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScores:
    """Shares of the prompts, 0 to 1. All but `exact_match` are None unless every reference is a JSON object."""

    num_prompts: int
    exact_match: float  # string-equal, but for white space at both ends
    valid_json: float | None = None  # the whole answer is one JSON object
    exact_fields: float | None = None  # the answer's fields are the reference's, none missing, wrong or extra
    per_field: dict[str, float] | None = None  # over the prompts whose reference has the field

    def as_metrics(self) -> dict[str, float]:
        """The scores under the names that metric rows and manifests use; absent where they do not apply."""
        metrics = {"eval/exact_match": self.exact_match}
        if self.valid_json is not None:
            metrics["eval/valid_json"] = self.valid_json
        if self.exact_fields is not None:
            metrics["eval/exact_fields"] = self.exact_fields
        return metrics | {f"eval/field/{name}": share for name, share in (self.per_field or {}).items()}


def score_json(references: Sequence[str], answers: Sequence[str]) -> TaskScores:
    """Scores `answers[i]` against `references[i]`. Raises ValueError when there are none, or not as many of each.

    An answer counts as JSON only if it is an object from its first to its last character, white space aside: prose or
    a code fence around it, NaN, Infinity or a repeated key make it invalid. Values are compared by type, so `true`
    is not `1` and `"1"` is not `1`; but `1.0` is `1`, for JSON has only one kind of number.
    """
    if len(references) != len(answers) or not references:
        raise ValueError(
            f"{len(references)} references and {len(answers)} answers: wanted as many of each, at least one. "
            "Pass the answer to every prompt, an empty string where the model gave none."
        )
    num_prompts = len(references)
    same_text = sum(reference.strip() == answer.strip() for reference, answer in zip(references, answers, strict=True))
    wanted = [fields for reference in references if (fields := json_object(reference)) is not None]
    if len(wanted) < num_prompts:
        return TaskScores(num_prompts, same_text / num_prompts)
    got = [json_object(answer) for answer in answers]
    return TaskScores(
        num_prompts=num_prompts,
        exact_match=same_text / num_prompts,
        valid_json=sum(fields is not None for fields in got) / num_prompts,
        exact_fields=sum(same_json(want, have) for want, have in zip(wanted, got, strict=True)) / num_prompts,
        per_field=_per_field(wanted, [fields or {} for fields in got]),
    )


def json_object(text: str) -> dict[str, Any] | None:
    """The object that `text` is, or None: RFC 8259 strictly, and no key twice."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # not JSON, or nested deeper than any ticket
        return None
    return value if isinstance(value, dict) else None


def same_json(left: object, right: object) -> bool:
    """Equality of two parsed JSON values. Python's own `==` takes `true` for `1` and `false` for `0`."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _per_field(wanted: list[dict[str, Any]], got: list[dict[str, Any]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for want, have in zip(wanted, got, strict=True):
        for name, value in want.items():
            right.setdefault(name, []).append(name in have and same_json(value, have[name]))
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
