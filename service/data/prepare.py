"""From a run's sources to prepared datasets, before any accelerator is held: each is tokenised once per content.

    prepared = prepare_run(config, renderer, home=settings.home)      # prepared.train, .eval, .test: data cards

A dataset's digest covers the bytes of its source, the renderer, and every option that decides what rows become, so the
same data is never tokenised twice and a change is never missed. Several sources are prepared each by itself; their mixture
is an index over all of them. What is done with one part of a source is in `tokenised.py`, how many of them are done at a
time in `workers.py`, and how datasets lie in storage in `shards.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any

from service import storage
from service.base_models import resolve_base_model
from service.config import AugmentBlock, DataBlock, FilterBlock, Format, ReadingBlock, RunConfig
from service.data import formats, shards
from service.data.augment import read_synonyms
from service.data.checkup import Checkup
from service.data.files import Piece, Source, is_hub, open_source
from service.data.precheck import precheck
from service.data.records import PIECE_BYTES, Record
from service.data.rendered import renderer_for
from service.data.rows import Row
from service.data.shards import DataCard, Part
from service.data.split import Side, Sides
from service.data.tokenised import Block, Found, Recipe, Tally, tokenise
from service.errors import DataError, ModelError, NotFoundError, StorageError
from service.render import Renderer
from service.settings import Settings

# A source smaller than this is done in this process: starting Ray and its workers takes as long as tokenising it.
SPREAD_BYTES = 64 * 2**20
SUMMED = (
    *("rows", "examples", "rows_split_by_turn", "rows_dropped", "rows_truncated", "rows_copied"),
    *("tokens", "supervised_tokens"),
)


@dataclass(frozen=True)
class Prepared:
    """What a run is trained on, evaluated on between its steps, and tested on at its end."""

    train: DataCard
    eval: DataCard | None
    test: DataCard | None
    checkups: tuple[Checkup, ...] = ()  # of the sources; none of what was prepared before

    def as_json(self) -> dict[str, Any]:
        """The cards and the checkups, for machines."""
        return asdict(self) | {"checkups": [checkup.as_json() for checkup in self.checkups]}


def prepare_for(config: RunConfig, settings: Settings) -> Prepared:
    """`prepare_run` with the renderer of the run's base model, which is fetched where it is not here."""
    base = resolve_base_model(config.model.id, settings.cache, config.model.revision, settings.home)
    return prepare_run(config, renderer_for(config, base.path), home=settings.home)


def prepare_run(config: RunConfig, renderer: Renderer, *, home: str) -> Prepared:
    """Prepare all data of a run, or find it prepared. Raises DataError, ModelError."""
    data, block = config.data, config.data.split
    sources = [open_source(source.uri) for source in data.sources]
    reads = list(zip(sources, data.sources, strict=True))
    held_out = {uri: open_source(uri) for uri in (data.eval, data.test) if uri}
    checkups = precheck(reads, [(source, data) for source in held_out.values()], data, home=home)
    sides = _sides(config, sources)

    def of_sources(side: Side) -> DataCard:
        recipes = [_recipe(config, reading, sides, side) for reading in data.sources]
        cards = [prepare(source, recipe, renderer, home=home) for source, recipe in zip(sources, recipes, strict=True)]
        return mixture([_demand_rows(card, data) if side == "train" else card for card in cards], home=home)

    def of_file(uri: str) -> DataCard:
        return _demand_rows(prepare(held_out[uri], _recipe(config, data), renderer, home=home), data)

    def other_side(side: Side, uri: str | None, share: float) -> DataCard | None:
        if uri:
            return of_file(uri)
        return _demand_rows(of_sources(side), data) if share else None

    return Prepared(
        train=of_sources("train"),
        eval=other_side("eval", data.eval, block.eval or (config.run.held_out is not None)),
        test=other_side("test", data.test, block.test),
        checkups=checkups,
    )


def _sides(config: RunConfig, sources: Sequence[Source]) -> Sides | None:
    """Which side of the split each row of the sources is on; None where nothing is held out of them."""
    split = config.data.split
    if not (split.eval or split.test or config.run.held_out):
        return None

    def rows() -> Iterator[Row]:
        read = (formats.read_source(*both) for both in zip(sources, config.data.sources, strict=True))
        return (entry for entry in chain.from_iterable(read) if isinstance(entry, Row))

    return Sides.of(split, rows, config.run.held_out)


def _recipe(config: RunConfig, reading: ReadingBlock, sides: Sides | None = None, side: Side | None = None) -> Recipe:
    """What becomes of the rows on a side of `data.train`; of a file for evaluation or the test without a `side`."""
    data, training = config.data, side == "train"
    return Recipe(
        reading=reading,
        train_on=data.train_on,
        seq_len=data.seq_len,
        over_long=data.over_long,
        sides=sides,
        side=side or "train",
        filter=data.filter if side else FilterBlock(),
        augment=data.augment if training else AugmentBlock(),
        synonyms=read_synonyms(data.augment.synonyms) if training and data.augment.synonyms else {},
        seed=config.seed,
        score=data.curriculum if training and data.curriculum != "length" else None,
    )


def prepare(
    source: Source, recipe: Recipe, renderer: Renderer, *, home: str, spread_bytes: int = SPREAD_BYTES
) -> DataCard:
    """The dataset of one source, found or made; it may have no example. Raises DataError with all problems, ModelError."""
    digest = recipe.digest(source.sha256, source.kind, renderer.digest)
    try:
        return _as_named(shards.find(digest, home=home), source)
    except NotFoundError:
        pass
    try:
        with shards.attempt(digest, home=home) as place:
            card = _made(source, recipe, renderer, digest, place, home, spread_bytes)
            return shards.publish(_as_named(card, source), home=home)
    except (StorageError, NotFoundError):
        if not storage.exists(storage.join(home, "datasets", digest, "card.json")):
            raise
        # Another preparation of the same content was done first, and has removed what this one was writing.
        return _as_named(shards.find(digest, home=home), source)


def _made(
    source: Source, recipe: Recipe, renderer: Renderer, digest: str, place: str, home: str, spread_bytes: int
) -> DataCard:
    """The card of a dataset whose files now lie at `place`, below datasets/."""
    root = storage.join(home, "datasets")
    shape = formats.detect((r for r in source.records() if isinstance(r, Record)), recipe.reading, source.uri)
    groups = _groups(source)
    work = partial(_block, groups, shape, recipe, renderer, root, place)
    blocks = list(_blocks(work, len(groups), source, spread_bytes))
    tally = sum((block.tally for block in blocks), Tally())
    _demand_sound(source.uri, tally, recipe)
    index = f"{place}/index.arrow"
    written = [shard for block in blocks for shard in block.shards]
    counts = shards.write_index(storage.join(root, index), [block.index for block in blocks], written)
    return DataCard(
        source=source.uri,
        digest=digest,
        source_sha256=source.sha256,
        renderer_digest=renderer.digest,
        rows=tally.rows,
        rows_split_by_turn=tally.split_by_turn,
        rows_dropped=tally.dropped,
        rows_truncated=tally.truncated,
        rows_copied=tally.copied,
        rows_filtered=dict(tally.filtered),
        last_row=tally.last_row,
        index=index,
        **counts,
    )


def _blocks(work: Callable[[int], Block], number: int, source: Source, spread_bytes: int) -> Iterator[Block]:
    """All blocks in order, until the template refuses a row. Only a large source is worth starting Ray for."""
    if source.num_bytes < spread_bytes:
        blocks: Iterator[Block] = map(work, range(number))
    else:
        from service.data.workers import on_all_cpus

        blocks = on_all_cpus(work, number, here=storage.is_local(source.uri))
    for block in blocks:
        yield block
        if block.tally.refused:
            return


def _block(
    groups: Sequence[Sequence[Piece]],
    shape: Format,
    recipe: Recipe,
    renderer: Renderer,
    root: str,
    place: str,
    number: int,
) -> Block:
    return tokenise(groups[number], shape, recipe, renderer, root, f"{place}/tokens-{number:05d}")


def _groups(source: Source) -> list[list[Piece]]:
    """The pieces that are done together: of many small files, enough to be worth a task and a shard."""
    number = max(1, round(PIECE_BYTES * len(source.pieces) / max(1, source.num_bytes)))
    pieces = [_reachable(piece) for piece in source.pieces]
    return [pieces[start : start + number] for start in range(0, len(pieces), number)]


def _reachable(piece: Piece) -> Piece:
    """As a worker finds it, who stands in another directory."""
    local = not is_hub(piece.uri) and storage.is_local(piece.uri)
    return replace(piece, uri=str(storage.local_path(piece.uri))) if local else piece


def _demand_sound(uri: str, tally: Tally, recipe: Recipe) -> None:
    """Raises ModelError where the template refuses rows, DataError that lists whatever else is wrong with them."""
    if tally.refused:
        raise ModelError(f"{uri}: {tally.refused}")
    problems: list[str] = []
    if tally.problems.number:
        lines = [f"{uri}: {tally.problems.number} problem(s). Mend these rows.", *_listed(tally.problems)]
        problems.append("\n  ".join(lines))
    if tally.over_long.number and recipe.over_long == "error":
        problems.append(
            f"{uri}: {tally.over_long.number} row(s) have more than data.seq_len = {recipe.seq_len} tokens: "
            f"{', '.join(_listed(tally.over_long))}. Raise data.seq_len, shorten them, or set data.over_long: drop or truncate."
        )
    if problems:
        raise DataError("\n".join(problems))


def _listed(found: Found) -> list[str]:
    more = found.number - len(found.first)
    return [*found.first, *([f"... and {more} more"] if more else [])]


def _demand_rows(card: DataCard, data: DataBlock) -> DataCard:
    """The card itself, of a dataset that has an example. Raises DataError."""
    if card.examples:
        return card
    filtered = [f"{number} {why}" for why, number in card.rows_filtered.items()]
    dropped = [f"{card.rows_dropped} over data.seq_len = {data.seq_len}"] if card.rows_dropped else []
    raise DataError(
        f"{card.source}: no row is left, of {card.rows} on this side of the split"
        + (f" ({', '.join([*filtered, *dropped])})" if card.rows else "")
        + ". Give more rows, or look at data.split, data.filter and data.seq_len."
    )


def _as_named(card: DataCard, source: Source) -> DataCard:
    """The card as this source has it: the same content may have been prepared under other names."""
    files = tuple({piece.uri: piece.first - 1 for piece in reversed(source.pieces)}.items())[::-1]
    part = Part(source=source.uri, digest=card.digest, examples=card.examples, files=files)
    return replace(card, source=source.uri, parts=(part,))


def mixture(cards: Sequence[DataCard], *, home: str) -> DataCard:
    """Several datasets as one, in this order; rows have the numbers after those of the sources before theirs."""
    if len(cards) == 1:
        return cards[0]
    before = [0, *accumulate(card.last_row for card in cards)]
    first = [0, *accumulate(card.examples for card in cards)]
    parts = tuple(
        replace(part, examples_from=start, rows_before=rows)
        for card, rows, start in zip(cards, before, first, strict=False)
        for part in card.parts
    )
    digest = hashlib.sha256(json.dumps(["mixture", *(card.digest for card in cards)]).encode()).hexdigest()
    try:
        return replace(shards.find(digest, home=home), parts=parts)
    except NotFoundError:
        pass
    with shards.attempt(digest, home=home) as place:
        index = f"{place}/index.arrow"
        shards.join_indices([card.index for card in cards], before, index, home=home)
        card = DataCard(
            source=", ".join(card.source for card in cards),
            digest=digest,
            source_sha256=hashlib.sha256("".join(card.source_sha256 for card in cards).encode()).hexdigest(),
            renderer_digest=cards[0].renderer_digest,
            longest=max(card.longest for card in cards),
            rows_filtered={
                why: sum(card.rows_filtered.get(why, 0) for card in cards)
                for card in cards
                for why in card.rows_filtered
            },
            last_row=before[-1],
            parts=parts,
            index=index,
            **{name: sum(getattr(card, name) for card in cards) for name in SUMMED},
        )
        return shards.publish(card, home=home)
