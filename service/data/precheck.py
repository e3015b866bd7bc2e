"""The checkup that the sources of every run go through before they are tokenised: once for the same content.

Only its cheap part, without tokens and near duplicates, and of the first CHECKED_ROWS rows: `loray data check` looks at all
of everything. What stops training is raised; what is to be judged, and which sources were not read to their end, stands in
`loray plan`. Kept beside the datasets, under
`datasets/checkups/<digest>.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from service import storage
from service.config import DataBlock, ReadingBlock
from service.data.checkup import Checkup, check, refuse
from service.data.files import Source
from service.data.formats import read_source
from service.data.rows import Problem, Row
from service.errors import DataError, NotFoundError

VERSION = 3  # of what is looked for: another one looks again
CHECKED_ROWS = 200_000  # of a source; half a minute at 0.2 ms a row, in this process

Read = tuple[Source, ReadingBlock]  # a source, and how its rows are understood


def precheck(sources: Sequence[Read], held_out: Sequence[Read], data: DataBlock, *, home: str) -> tuple[Checkup, ...]:
    """A checkup of each source, against what is held out: the evaluation data, and the test's. Raises DataError with the errors of all of them."""
    checkups = tuple(_checked(read, held_out, data, home) for read in sources)
    errors: list[str] = []
    for checkup in checkups:
        try:
            refuse(checkup)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return checkups


def _checked(read: Read, held_out: Sequence[Read], data: DataBlock, home: str) -> Checkup:
    uri = storage.join(home, "datasets", "checkups", f"{_digest(read, held_out, data)}.json")
    try:
        return Checkup.from_json(json.loads(storage.read_bytes(uri)))
    except NotFoundError:
        pass
    source = read[0]
    rows = read_source(*read)
    checkup = check(
        islice(rows, CHECKED_ROWS),
        renderer=None,
        data=data,
        name=source.uri,
        against=_numbered_on(held_out) if held_out else None,
        against_name=" and then ".join(source.uri for source, _ in held_out),
    )
    checkup = replace(checkup, whole=next(rows, None) is None)
    if checkup.errors:
        return checkup
    document = json.dumps(checkup.as_json())
    storage.write_bytes(uri, document.encode())
    return Checkup.from_json(json.loads(document))  # as it will be read, without the numbers of all rows


def _numbered_on(held_out: Sequence[Read]) -> Iterator[Row | Problem]:
    """The rows of all of them, each file's numbers after those of the files before."""
    before = last = 0
    for read in held_out:
        for row in read_source(*read):
            last = before + row.number
            yield replace(row, number=last)
        before = last


def _digest(read: Read, held_out: Sequence[Read], data: DataBlock) -> str:
    def parts(read: Read) -> list[Any]:
        source, reading = read
        return [source.uri, source.sha256, source.kind, reading.model_dump(exclude={"uri", "weight"})]

    asked = data.model_dump(mode="json", exclude={"train", "eval", "test"})
    document = [VERSION, CHECKED_ROWS, parts(read), [parts(one) for one in held_out], asked]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
