"""The card of a checkup: for a terminal, and as Markdown. `Checkup.as_json()` is the third of its shapes.

Nothing of the data stands on it but names of files and classes and what problems quote, all of it escaped.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from service.data.checkup import Checkup, Tokens
from service.data.findings import Finding

_COLOURS = {"error": "bold red", "warning": "yellow"}
_BAR = 40  # characters of the largest bin
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def table(checkup: Checkup) -> RenderableType:
    """For a terminal: the figures, the histogram of tokens, the findings."""
    figures = Table("figure", "value", title=Text(_plain(checkup.name)), title_justify="left", show_header=False)
    for name, value in _figures(checkup):
        figures.add_row(name, Text(value))
    parts: list[RenderableType] = [figures]
    if checkup.tokens:
        parts.append(_histogram(checkup.tokens))
    if checkup.findings:
        found = Table(
            "", "count", "rows", "finding", "what to do", title="findings", title_justify="left", show_lines=True
        )
        for finding in checkup.findings:
            level = Text(finding.level, _COLOURS[finding.level])
            count = Text(f"{finding.count:,}", justify="right")
            found.add_row(level, count, Text(_numbers(finding)), Text(finding.text), Text(finding.fix))
        parts.append(found)
    colour = "red" if checkup.errors else "yellow" if checkup.warnings else "green"
    return Group(*parts, Text(verdict(checkup), f"bold {colour}"))


def markdown(checkup: Checkup) -> str:
    """The same for a file beside the data, or for a pull request."""
    lines = [f"# Data card: {_cell(_plain(checkup.name))}", "", verdict(checkup), "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in _figures(checkup)]
    if checkup.tokens:
        lines += ["", "| tokens | examples |", "|---|---|"]
        lines += [f"| {span} | {count:,} |" for span, count in _bins(checkup.tokens)]
    if checkup.findings:
        lines += ["", "| level | count | rows | finding | what to do |", "|---|---|---|---|---|"]
    for finding in checkup.findings:
        cells = (finding.level, f"{finding.count:,}", _numbers(finding), _cell(finding.text), _cell(finding.fix))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(checkup: Checkup) -> str:
    """One line."""
    if not checkup.findings:
        return "Nothing is wrong with this data as far as the checkup looks."
    counts = ((len(checkup.errors), "error"), (len(checkup.warnings), "warning"))
    shown = " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count)
    return f"{shown}. Errors stop a training." if checkup.errors else f"{shown}. Training goes on with warnings."


def _figures(checkup: Checkup) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in checkup.kinds.items())
    unreadable = f", and {checkup.unreadable:,} that cannot be read" if checkup.unreadable else ""
    yield "rows", f"{checkup.rows:,}{f' ({kinds})' if kinds else ''}{unreadable}"
    looked_at = sum(checkup.languages.values())
    if looked_at:
        shares = ", ".join(f"{name} {count / looked_at:.1%}" for name, count in [*checkup.languages.items()][:8])
        yield "languages", f"{shares} (of {looked_at:,} rows)"
    yield "near duplicates", f"looked for in {checkup.near_rows:,} rows" if checkup.near_rows else "not looked for"
    if checkup.against:
        yield "compared with", f"{_plain(checkup.against)} ({checkup.against_rows:,} rows)"
    if not checkup.tokens:
        yield "tokens", "not counted: --run RUN.YAML names the model"
        return
    tokens = checkup.tokens
    yield (
        "tokens",
        f"{tokens.total:,} in {tokens.examples:,} examples, the longest {tokens.longest:,} of {tokens.seq_len:,}",
    )
    yield "trained on", f"{tokens.supervised:,} ({tokens.supervised_share:.0%})"
    if tokens.split_by_turn:
        yield "split by turn", f"{tokens.split_by_turn:,} rows: the chat template rewrites earlier turns"


def _numbers(finding: Finding) -> str:
    return ", ".join(map(str, finding.rows)) + (", ..." if finding.count > len(finding.rows) > 0 else "")


def _histogram(tokens: Tokens) -> Table:
    bars = Table("tokens", "examples", "", title="tokens of an example", title_justify="left", box=None)
    for span, count in _bins(tokens):
        bars.add_row(
            Text(span, justify="right"),
            Text(f"{count:,}", justify="right"),
            Text(_bar(count / max(tokens.counts)), "cyan"),
        )
    return bars


def _bins(tokens: Tokens) -> Iterator[tuple[str, int]]:
    for first, after, count in zip(tokens.edges, tokens.edges[1:], tokens.counts, strict=False):
        yield f"{first:,} - {after - 1:,}" if after - 1 > first else f"{first:,}", count


def _bar(share: float) -> str:
    """A bar of _BAR characters for 1, drawn in eighths of a character."""
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _plain(text: str) -> str:
    """A name of a file, which may hold anything, without what a terminal obeys."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table, with nothing in it that Markdown would read."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|" else char for char in text)
