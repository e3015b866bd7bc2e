"""`loray data check`: one data file through the checkup; its card printed and written, its rows set apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from service import storage
from service.cli.terminal import console, print_json, say
from service.config import DataBlock, ReadingBlock
from service.data import card, quarantine
from service.data import thresholds as at
from service.data.checkup import Checkup, check
from service.data.files import open_source
from service.data.formats import read_source
from service.data.rows import Problem, Row
from service.render import Renderer

Read = tuple[str, ReadingBlock]  # a data file, and how its rows are understood


@dataclass(frozen=True)
class Outputs:
    """What becomes of a checkup: where the rows go, where its card goes, and whether JSON is printed."""

    quarantine: str | None
    markdown: str | None
    json: bool


def check_file(
    file: Read, against: Read | None, data: DataBlock, renderer: Renderer | None, outputs: Outputs
) -> Checkup:
    """The checkup of a file, printed. Raises DataError where it cannot be read at all, ConfigError."""
    if outputs.quarantine:
        quarantine.check_free(outputs.quarantine)
    source, unreadable = open_source(file[0]), defaultdict[int, list[str]](list)
    checkup = check(
        _remembered(read_source(source, file[1]), unreadable),
        renderer=renderer,
        data=data,
        name=file[0],
        against=read_source(open_source(against[0]), against[1]) if against else None,
        against_name=against[0] if against else "",
        near_rows=at.NEAR_ROWS,
    )
    if outputs.json:
        print_json(checkup.as_json())
    else:
        console.print(card.table(checkup))
    if outputs.markdown:
        storage.write_bytes(outputs.markdown, card.markdown(checkup).encode())
    if outputs.quarantine:
        apart = quarantine.set_aside(source, quarantine.reasons_of(checkup, unreadable), outputs.quarantine)
        if not outputs.json:
            say(f"{apart.num_good:,} good rows are in {apart.good}, {apart.num_bad:,} bad ones in {apart.bad}.")
    return checkup


def _remembered(rows: Iterable[Row | Problem], unreadable: dict[int, list[str]]) -> Iterator[Row | Problem]:
    """The same rows; what is wrong with those that cannot be read is added by their numbers."""
    for row in rows:
        if isinstance(row, Problem):
            unreadable[row.number].append(row.text)
        yield row
