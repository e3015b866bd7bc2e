"""From a sweep file to a complete sweep, or to one error that lists everything wrong with it, in both of its files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.config import ResolvedRun, changed, checked, report, run_from_text
from service.config_blocks import RunConfig, expanded, has_rows_to_evaluate, several_trainings
from service.config_problems import annotations_of, blocks_of, dotted_names, unknown_key
from service.config_values import mapping, override, put, read_text, take_out, value_at
from service.errors import ConfigError
from service.sweep_config import LIVE, MOST_TRIALS, RANGES, SHARING, Dimension, PbtBlock, SweepConfig
from tune import space as spaces

OWN = ("search", "stop", "publish")
DEFAULT_TRIALS = 16
CHECKED_DRAWS = 1000  # of those that will be tried


@dataclass(frozen=True)
class ResolvedSweep:
    """A sweep, complete: `base` holds the values of a run file in which nothing varies; `text` is the sweep file's."""

    config: SweepConfig
    space: dict[str, Dimension]
    base: dict[str, Any]
    text: str

    @property
    def known_draws(self) -> list[spaces.Draw] | None:
        """The values of all trials, where they do not follow from how earlier ones went."""
        search = self.config.search
        if search.algorithm == "grid":
            return spaces.grid(self.space, self.base)
        if search.algorithm == "random":
            return [spaces.draw(self.space, search.seed, number) for number in range(1, self.num_trials + 1)]
        return None

    def first_draws(self, count: int) -> list[spaces.Draw]:
        """So many of those, at most; none where they are not known."""
        search = self.config.search
        if search.algorithm == "random":
            return [spaces.draw(self.space, search.seed, 1 + i) for i in range(min(count, self.num_trials))]
        too_many = spaces.num_combinations(self.space) > MOST_TRIALS
        return [] if too_many else (self.known_draws or [])[:count]

    @property
    def num_trials(self) -> int:
        """How many trials there will be at most."""
        if self.config.search.algorithm == "grid":
            return len(spaces.grid(self.space, self.base))
        return self.config.search.trials or DEFAULT_TRIALS

    def changes(self, draw: Mapping[str, Any]) -> dict[str, Any]:
        """What a draw sets in the run file, by dotted name."""
        return spaces.changes(self.space, draw, self.base)

    def trial(self, name: str, draw: Mapping[str, Any], also: Mapping[str, Any]) -> ResolvedRun:
        """The run of a trial, with a complete run file of its own; `also` is what the sweep itself sets."""
        values = changed(self.base, {**also, **self.changes(draw)})
        text = f"# {name}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
        return run_from_text(text, name)

    def as_json(self) -> dict[str, Any]:
        """What `resolved.json` holds."""
        space = {key: dimension.model_dump(mode="json", exclude_defaults=True) for key, dimension in self.space.items()}
        config = self.config.model_dump(mode="json", by_alias=True)
        return {"schema": 1, "config": config, "space": space, "base": self.base, "text": self.text}


def sweep_from_json(document: Mapping[str, Any]) -> ResolvedSweep:
    """The inverse of `ResolvedSweep.as_json`."""
    space = {key: Dimension.model_validate(values) for key, values in document["space"].items()}
    config = SweepConfig.model_validate(document["config"])
    return ResolvedSweep(config, space, dict(document["base"]), str(document["text"]))


def load_sweep(path: str, overrides: Sequence[str] = ()) -> ResolvedSweep:
    """Read a sweep file and its base. `overrides` are `dotted.key=value`, of the sweep or else of its base.

    Raises ConfigError with every problem: of both files, of each range, and of the runs that they would come to.
    """
    text = read_text(path, "sweep file")
    written = mapping(text, path)
    parts = _sweep_file(written, path) if "base" in written or "space" in written else _run_file_with_ranges(written)
    base, ranges, own, problems = parts
    for key, value in map(override, overrides):
        if key == "stop.type":  # another rule has other fields
            own["stop"] = value
        elif key in _OWN_NAMES:
            put(own, key, value) if "." in key else own.update({key: value})
        else:
            ranges.pop(key, None)
            base = changed(base, {key: value})
    if base.get("publish") is not None:
        own.setdefault("publish", base["publish"])
    base.pop("publish", None)
    space, wrong = _dimensions(ranges, base)
    config, wrong_too = checked(SweepConfig, own)
    problems += [*wrong, *wrong_too]
    whole = {key: one for key, one in space.items() if not any(f"space.{key}" in line for line in wrong)}
    if config is not None:
        problems += across(config, whole, base)
    problems += _of_the_runs(ResolvedSweep(config or SweepConfig(), whole, base, text))
    if problems or config is None:
        raise ConfigError(report(path, list(dict.fromkeys(problems))))
    return ResolvedSweep(config, space, base, text)


_Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]
_MAIN_KEYS = {"search": "algorithm", "stop": "type", "publish": "name"}
_OWN_NAMES = {*dotted_names(SweepConfig), *OWN}


def _own(written: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The sweep's own blocks, shorthands written out, so that one of their fields can be set."""
    found = {name: written[name] for name in names if name in written}
    return {name: {_MAIN_KEYS[name]: block} if isinstance(block, str) else block for name, block in found.items()}


def _sweep_file(written: Mapping[str, Any], path: str) -> _Parts:
    """The base, the space and the sweep's own blocks of a sweep file, and what is wrong with it."""
    problems = [_unknown(key) for key in written if key not in ("base", "space", "schema", *OWN)]
    if (schema := written.get("schema", 1)) != 1:
        problems.append(f"schema: must be 1, not {schema!r}. A later one is a later loray's.")
    name, ranges = written.get("base"), written.get("space")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: base is {name!r}, and must be the path of a run file, as seen from this file.")
    if not isinstance(ranges, Mapping) or not ranges:
        problems.append("space: nothing varies. Give a range, such as space: {optim.lr: {log: [1.0e-5, 1.0e-3]}}.")
        ranges = {}
    file = str(Path(path).parent / name)
    base = mapping(read_text(file, "the base, a run file,"), file)
    within = list(_ranges(base))
    problems += [
        f"base: {key} is a range there. Give it in space, or leave base out of this file." for key, _ in within
    ]
    return base, {str(key): values for key, values in ranges.items()}, _own(written, *OWN), problems


def _unknown(key: str) -> str:
    near = unknown_key(SweepConfig, [key])
    return near if "Did you mean" in near else f"{key}: unknown key. Known here: base, space, {', '.join(OWN)}, schema."


def _run_file_with_ranges(written: Mapping[str, Any]) -> _Parts:
    """The same of a plain run file, in which `search` is the sweep's."""
    base = {key: value for key, value in written.items() if key != "search"}
    ranges = dict(_ranges(base))
    for key in ranges:
        take_out(base, key)
    problem = (
        "nothing varies: this is a run file without a range. Train it: loray train RUN.YAML, or write a sweep file."
    )
    return base, ranges, _own(written, "search"), [] if ranges else [problem]


def _ranges(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a run file that holds a range: a mapping with one in it, or a list where the field takes none."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        takes = annotations_of(RunConfig, key)
        plain = bool(takes) and not any(map(blocks_of, takes))
        if isinstance(value, Mapping) and plain and set(value) & {*RANGES, "ratio_of"}:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _ranges(value, f"{key}.")
        elif isinstance(value, list) and plain and not any("tuple" in str(annotation) for annotation in takes):
            yield key, value


def _dimensions(ranges: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[dict[str, Dimension], list[str]]:
    found: dict[str, Dimension] = {}
    problems: list[str] = []
    for key, values in ranges.items():
        written = {"choose": values} if isinstance(values, list) else values
        wrong = list(_no_dimension(key, written))
        if not wrong:
            dimension, wrong = checked(Dimension, written)
            wrong = [f"space.{key}: {line.removeprefix('(file): ')}" for line in wrong]
            if dimension:
                found[key] = dimension
                wrong += _comparable(key, dimension)
        problems += wrong
    for key, dimension in found.items():
        problems += _references(key, dimension, list(ranges), found, base)
        problems += _never(key, dimension, found, base)
    return found, problems


def _no_dimension(key: str, written: Any) -> Iterator[str]:
    names = list(dotted_names(RunConfig))
    inside = [name for name in names if name.startswith(f"{key}.")]
    if key not in names and inside:
        yield f"space.{key}: is a block of fields. Name one of them, such as {inside[0]}."
    elif key not in names:
        yield f"space.{unknown_key(RunConfig, key.split('.'))}"
    elif key.startswith("publish") or key == "schema":
        yield f"space.{key}: cannot vary. The best trial's model is published, under the sweep's own `publish`."
    elif not isinstance(written, Mapping):
        yield f"space.{key}: is {written!r}, and must be a range or a list of values."


def _comparable(key: str, dimension: Dimension) -> Iterator[str]:
    if (dimension.ends or dimension.ratio_of) and not spaces.takes_numbers(key):
        yield f"space.{key}: takes no numbers, so nothing lies between two of its values. List them: {key}: [...]."


def _references(
    key: str, dimension: Dimension, drawn: list[str], found: spaces.Space, base: Mapping[str, Any]
) -> Iterator[str]:
    """What a range says of other fields: they have a value, and have it before."""
    others = [("ratio_of", dimension.ratio_of)] if dimension.ratio_of else []
    for what, other in [*others, *(("when", other) for other in dimension.when)]:
        if other not in dotted_names(RunConfig):
            yield f"space.{key}.{what}: {unknown_key(RunConfig, other.split('.'))}"
        elif other in drawn and drawn.index(other) >= drawn.index(key):
            yield f"space.{key}.{what}: {other} is drawn after {key}. Write {other} before it."
        elif other not in drawn and value_at(base, other) is None:
            yield f"space.{key}.{what}: {other} has no value. Give it one, in space or in the base."
        elif what == "ratio_of" and other in drawn and _may_be_missing(other, found, base):
            yield (
                f"space.{key}.ratio_of: {other} has no value in trials that do not meet its own condition. Give it one in the base."
            )
        elif what == "ratio_of" and not spaces.takes_numbers(other):
            yield f"space.{key}.ratio_of: {other} takes no numbers, so nothing can be a multiple of it."


def _may_be_missing(key: str, space: spaces.Space, base: Mapping[str, Any]) -> bool:
    return bool(key in space and space[key].when) and value_at(base, key) is None


def _never(key: str, dimension: Dimension, space: spaces.Space, base: Mapping[str, Any]) -> Iterator[str]:
    """A condition that no trial can meet."""
    for other, wanted in dimension.when.items():
        drawn = space.get(other)
        if drawn is None or drawn.ratio_of:
            continue
        values = list(drawn.choose or ())
        if drawn.when and (kept := value_at(base, other)) not in values:  # where its own condition does not hold
            values.append(kept)
        wants = wanted if isinstance(wanted, list) else [wanted]
        if not any(want in values or spaces.may_be(drawn, want) for want in wants):
            seen = "from {:g} to {:g}".format(*drawn.ends) if drawn.ends else " or ".join(map(str, values))
            yield f"space.{key}.when: {other} is {seen}, never {wanted}, so {key} is never searched. Mend one of the two."


def across(config: SweepConfig, space: spaces.Space, base: Mapping[str, Any]) -> Iterator[str]:
    """What cannot go together in a sweep."""
    search = config.search
    corners = [expanded(changed(base, spaces.changes(space, draw, base))) for draw in spaces.corners(space)]
    if search.metric.startswith("eval/") and not all(map(has_rows_to_evaluate, corners)):
        yield f"search.metric: no run reports {search.metric} without rows to evaluate on. Set data.eval in the base."
    if key := next(filter(None, map(several_trainings, corners)), None):
        yield f"base: {key}: asks for several trainings, and a trial is one. Leave it out, or train one fold: run.fold."
    if search.algorithm == "grid":
        for key, dimension in space.items():
            if dimension.log or dimension.uniform:
                yield f"space.{key}: a grid goes through values, and this is a range. List them: {key}: [...]."
        if (size := spaces.num_combinations(space)) > MOST_TRIALS:
            yield f"search: a grid of {size:,} combinations, and {MOST_TRIALS:,} is the most. List fewer values, or search: random."
        if search.trials is not None:
            yield f"search.trials: {search.trials}, and a grid tries all its values. Leave trials out, or search: random."
    if search.algorithm == "tpe" and importlib.util.find_spec("optuna") is None:
        yield "search: tpe is Optuna's, which is not installed: pip install 'loray[tpe]'. Or set search: random."
    if search.algorithm == "tpe":
        for key, dimension in space.items():
            if any(isinstance(value, list | Mapping) for value in dimension.choose or ()):
                yield f"space.{key}: search: tpe chooses among numbers, words, true and false. Set search: random."
    if search.share_base:
        for key in space:
            if key not in SHARING:
                yield f"space.{key}: trials that share a base differ in {', '.join(SHARING)} only. Fix it in the base."
        written = expanded(base)
        for key, needed in (("method.type", ("lora", "qlora", None)), ("method.bias", ("none", None))):
            if value_at(written, key) not in needed:
                yield f"base: {key}: {value_at(written, key)} changes the base that search.share_base shares. Use lora or qlora without biases."
        for key, one in (("scale.workers", 1), ("scale.strategy", "ddp")):
            if (value := value_at(written, key)) not in (None, one):
                yield f"base: {key}: {value}, and with search.share_base all trials train in one worker. Set {one}."
    if isinstance(config.stop, PbtBlock):
        if search.parallel is not None:
            yield f"search.parallel: {search.parallel}, and stop: pbt trains all trials at once. Leave it out."
        if not live(space):
            yield f"stop: pbt has nothing to change. Give a range of numbers for one of {', '.join(LIVE)}."
        for key in space:
            if key.split(".")[0] in ("model", "data", "seed") or key.startswith(("optim.batch", "optim.epochs")):
                yield f"space.{key}: under stop: pbt all trials learn the same rows in the same steps. Fix it in the base."


def live(space: spaces.Space) -> list[str]:
    """The dimensions that population-based training changes."""
    return [key for key, dimension in space.items() if key in LIVE and dimension.ends and not dimension.ratio_of]


def _of_the_runs(sweep: ResolvedSweep) -> Iterator[str]:
    """What is wrong with the run files of the trials: of those that are known, else of the ends of each range."""
    draws = [*spaces.corners(sweep.space), *sweep.first_draws(CHECKED_DRAWS)]
    found: dict[str, str] = {}
    for one in draws:
        for line in checked(RunConfig, changed(sweep.base, sweep.changes(one)))[1]:
            key = line.split(":")[0]
            found.setdefault(key, f"space.{line}" if key in sweep.space else f"base: {line}")
    yield from found.values()
