"""What is wrong with data, before it costs anything: findings with row numbers, each with its remedy.

    checkup = check(read_source(open_source(uri)), renderer=None, data=config.data, name=uri)
    refuse(checkup)                      # DataError with all errors at once

One pass, streamed: `observed.py` looks at the rows, `findings.py` says what is wrong with them and from where on
(`thresholds.py`), `card.py` shows it. An error stops training; a warning is for somebody to judge. Cheap by default: what
costs more than 0.2 ms a row (tokens, near duplicates) has to be asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from service.config import DataBlock
from service.data import thresholds as at
from service.data.findings import Finding, Mark, findings_of, marks_of
from service.data.observed import Against, Observed
from service.data.rows import Problem, Row
from service.errors import DataError
from service.render import Renderer


@dataclass(frozen=True)
class Tokens:
    """What the model reads, special tokens included, before `data.over_long` cuts or drops anything."""

    examples: int
    total: int
    supervised: int
    longest: int
    seq_len: int
    split_by_turn: int  # rows that are several examples, because the template rewrites earlier turns
    edges: tuple[int, ...]  # of the histogram, in tokens, one more than counts
    counts: tuple[int, ...]

    @property
    def supervised_share(self) -> float:
        """Trained tokens / all tokens."""
        return self.supervised / self.total


@dataclass(frozen=True)
class Checkup:
    """The card of one data set. `marks`: the numbers of all rows of each finding about rows."""

    name: str
    rows: int  # that could be read
    unreadable: int
    kinds: Mapping[str, int]  # conversation, text, preference, labelled, tagged, extraction
    near_rows: int  # of them compared nearly
    languages: Mapping[str, int]  # of the rows looked at
    against: str | None
    against_rows: int
    tokens: Tokens | None
    findings: tuple[Finding, ...]
    whole: bool = True  # False: there are more rows, which were not looked at
    marks: tuple[Mark, ...] = field(default=(), repr=False, compare=False)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What stops training."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What somebody should look at."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def as_json(self) -> dict[str, Any]:
        """A few kB, whatever the number of rows."""
        values = {key: value for key, value in vars(self).items() if key != "marks"}
        return {
            **values,
            "kinds": dict(self.kinds),
            "languages": dict(self.languages),
            "tokens": asdict(self.tokens) | {"supervised_share": self.tokens.supervised_share} if self.tokens else None,
            "findings": [asdict(finding) for finding in self.findings],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Checkup:
        """The card as it was stored; `marks` are not."""
        tokens = values["tokens"]
        if tokens:
            known = {key: value for key, value in tokens.items() if key != "supervised_share"}
            tokens = Tokens(**{**known, "edges": tuple(tokens["edges"]), "counts": tuple(tokens["counts"])})
        findings = tuple(Finding(**{**finding, "rows": tuple(finding["rows"])}) for finding in values["findings"])
        return cls(**{**values, "tokens": tokens, "findings": findings})


def check(
    rows: Iterable[Row | Problem],
    *,
    renderer: Renderer | None,
    data: DataBlock,
    name: str = "data",
    against: Iterable[Row | Problem] | None = None,
    against_name: str = "the evaluation data",
    near_rows: int = 0,
) -> Checkup:
    """Look at all rows once. Without a renderer nothing is said about tokens; `near_rows` are compared nearly.

    `against` is evaluation data: training rows that ask the same are findings.
    """
    there = None if against is None else Against(against, near_rows)
    seen = Observed(data, renderer, there, near_rows)
    seen.look_at(rows)
    marks = marks_of(seen, data)
    languages = sorted(seen.languages.items(), key=lambda item: -len(item[1]))
    return Checkup(
        name=name,
        rows=seen.num_rows,
        unreadable=seen.num_unreadable,
        kinds=dict(seen.kinds),
        near_rows=seen.num_near,
        languages={language: len(numbers) for language, numbers in languages},
        against=against_name if there else None,
        against_rows=there.num_rows if there else 0,
        tokens=_tokens(seen, data),
        findings=tuple(findings_of(seen, marks)),
        marks=tuple(marks),
    )


def refuse(checkup: Checkup) -> None:
    """Raise DataError with every error of a checkup, its rows and its remedy; nothing where there is none."""
    if not checkup.errors:
        return
    lines = [f"  {finding.text}. {finding.rows_named()}{finding.fix}" for finding in checkup.errors]
    count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
    raise DataError("\n".join([f"{checkup.name}: {count} in the data.", *lines]))


def _tokens(seen: Observed, data: DataBlock) -> Tokens | None:
    """The figures of what was rendered, with a histogram of bins that each are wider than the one before by the same factor."""
    if not seen.tokens:
        return None
    lengths = np.frombuffer(seen.tokens, dtype=np.uint32)
    edges = np.unique(np.rint(np.geomspace(lengths.min(), int(lengths.max()) + 1, at.HISTOGRAM_BINS + 1)).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return Tokens(
        examples=len(lengths),
        total=int(lengths.sum()),
        supervised=seen.supervised,
        longest=int(lengths.max()),
        seq_len=data.seq_len,
        split_by_turn=seen.split_by_turn,
        edges=tuple(int(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )
