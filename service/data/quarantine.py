"""Good rows and bad ones apart, as the source's own records, the bad ones with the reasons.

    OUT/bad.jsonl       {"row": 7, "file": "", "reasons": ["duplicate: ..."], "record": {...}}
    OUT/good.jsonl      the records that no finding names, as they are

Every record is in one of the two. Each file is there whole or not at all, and `good.jsonl` comes last. A row in which there
is no record (no JSON, say) has its `line` instead, bytes that are no UTF-8 escaped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service import storage
from service.data.checkup import Checkup
from service.data.files import Source
from service.data.findings import meaning
from service.data.rows import Problem
from service.errors import ConfigError

Reasons = Mapping[int, Sequence[str]]  # by the number of a row


@dataclass(frozen=True)
class Quarantined:
    """Where the rows are now, and how many."""

    good: str
    bad: str
    num_good: int
    num_bad: int


def reasons_of(checkup: Checkup, unreadable: Mapping[int, Sequence[str]]) -> Reasons:
    """Why rows are bad: what the problems of unreadable ones say, and every finding that names them."""
    reasons: defaultdict[int, list[str]] = defaultdict(
        list, {number: list(texts) for number, texts in unreadable.items()}
    )
    for mark in checkup.marks:
        if mark.kind != "unreadable":
            for number in mark.rows:
                reasons[number].append(f"{mark.kind}: {meaning(mark.kind)}")
    return reasons


def check_free(out: str) -> None:
    """ConfigError where `out` holds what was set aside before: it is not written over."""
    if there := [file for file in _files(out) if storage.local_path(file).exists()]:
        raise ConfigError(f"--quarantine {out}: {there[0]} is there already. Name another directory, or remove it.")


def set_aside(source: Source, reasons: Reasons, out: str) -> Quarantined:
    """Write the two files below the directory `out`, which is made. Reads the source twice."""
    bad, good = _files(out)
    counts = {bad: 0, good: 0}

    def counted(uri: str, lines: Iterator[dict[str, Any]]) -> Iterator[bytes]:
        for line in lines:
            counts[uri] += 1
            yield json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n"

    storage.write_stream(storage.local_path(bad), counted(bad, _bad(source, reasons)))
    storage.write_stream(storage.local_path(good), counted(good, _good(source, reasons)))
    return Quarantined(good, bad, counts[good], counts[bad])


def _files(out: str) -> tuple[str, str]:
    return storage.join(out, "bad.jsonl"), storage.join(out, "good.jsonl")


def _good(source: Source, reasons: Reasons) -> Iterator[dict[str, Any]]:
    for entry in source.records():
        if not isinstance(entry, Problem) and entry.number not in reasons:
            yield entry.values


def _bad(source: Source, reasons: Reasons) -> Iterator[dict[str, Any]]:
    for entry in source.records():
        if entry.number in reasons:
            if isinstance(entry, Problem):
                held: dict[str, Any] = {"line": entry.line.decode("utf-8", "backslashreplace")}
            else:
                held = {"record": entry.values}
            yield {"row": entry.number, "file": entry.file, "reasons": reasons[entry.number], **held}
