"""What an endpoint's adapters are, over all its replicas: the body of `GET /v1/adapters`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.desired import AdapterReport, Desired, ReplicaReport

SHOWN_OF_REPLICA = {"epoch", "running", "waiting", "slots", "free_columns", "max_columns", "prefix_bytes"}
# Where replicas differ, the state furthest from answering is the one to show.
_WORST_FIRST = ("refused", "pending", "registered", "cached", "draining", "resident")


def adapters_body(
    desired: Desired, reports: Sequence[ReplicaReport], behind: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Registered adapters by name, then those that only drain (their name is null).

    `behind` says of names why they have not followed their alias.
    """
    data = []
    for label, entry in sorted(desired.adapters.items()):
        row = _row(label, entry.model, entry.digest, reports)
        row["uri"], row["follows"] = entry.source.uri if entry.source else None, entry.follows
        row["detail"] = row["detail"] or (behind or {}).get(label, "")
        serving = {r.serving[label] for r in reports if label in r.serving}
        row["serving"] = sorted(entry.model if d == entry.digest else _model_of(d, reports) for d in serving)
        data.append(row)
    registered = {entry.digest for entry in desired.adapters.values()}
    others = {digest: a.model for r in reports for digest, a in r.adapters.items() if digest not in registered}
    data += [_row(None, model, digest, reports) for digest, model in sorted(others.items())]
    replicas = {r.replica: r.model_dump(include=SHOWN_OF_REPLICA) for r in reports}
    return {"object": "list", "epoch": desired.epoch, "data": data, "replicas": replicas}


def _row(name: str | None, model: str, digest: str, reports: Sequence[ReplicaReport]) -> dict[str, Any]:
    absent = AdapterReport(model=model, state="registered")
    seen = {r.replica: r.adapters.get(digest, absent) for r in reports}
    worst = min(seen.values(), key=lambda a: _WORST_FIRST.index(a.state), default=absent)
    return {
        "object": "adapter",
        "name": name,
        "model": model,
        "digest": digest,
        "uri": None,
        "follows": None,
        "state": worst.state,
        "detail": worst.detail,
        "replicas": {replica: report.model_dump(exclude={"model"}) for replica, report in seen.items()},
    }


def _model_of(digest: str, reports: Sequence[ReplicaReport]) -> str:
    return next(r.adapters[digest].model for r in reports if digest in r.adapters)
