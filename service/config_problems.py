"""What pydantic found wrong with a config, in a user's words: one line a mistake, under the name that the user wrote.

Pydantic tries every member of a union and reports each of them, under places that hold its own names for the members.
Here they become one line at one dotted name. Knows models in general, and no key of any.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# Says that a value has not the type, or is not the word, that one member of a union takes; and of a list whose items are
# wrong, that none is left.
_OTHER_MEMBER = re.compile(r".*_type|literal_error")
_NONE_LEFT = "too_short"


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every leaf of a config model by its dotted name, in order; for a union of blocks, those of all of them."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        found = blocks_of(field.annotation)
        names = [] if found and not _takes_plain_values(field.annotation) else [key]
        names += [name for block in found for name in dotted_names(block, f"{key}.")]
        yield from dict.fromkeys(names)


def annotations_of(model: type[BaseModel], key: str) -> list[Any]:
    """What the field of this dotted name takes: an annotation for each block of a union that has it."""
    blocks: list[type[BaseModel]] = [model]
    found: list[Any] = []
    for part in key.split("."):
        fields = [field for b in blocks for name, field in b.model_fields.items() if (field.alias or name) == part]
        found = [field.annotation for field in fields]
        blocks = [block for annotation in found for block in blocks_of(annotation)]
    return found


def blocks_of(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as `Annotated[Block, ...] | OtherBlock | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks_of(part)]


def problem_lines(model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A line for each mistake in `values`, which `error` is about; shorthands must be written out in them."""
    found: dict[tuple[str, ...], list[_Found]] = {}
    for details in error.errors():
        one = _locate(details, values)
        found.setdefault(one.path, []).append(one)
    inner = {path[:length] for path in found for length in range(1, len(path))}
    lines = []
    for path, here in found.items():
        meant = [one for one in here if not _OTHER_MEMBER.fullmatch(one.details["type"])]
        if path in inner:  # another member of the union took the value, and found its mistake inside
            lines += [_line(model, one) for one in meant if one.details["type"] != _NONE_LEFT]
        elif meant:
            lines += [_line(model, one) for one in meant]
        else:
            lines.append(_no_member(model, here))
    return lines


@dataclass(frozen=True)
class _Found:
    """One of pydantic's errors: where in the user's file, and which member of a union saw it, if one did."""

    details: ErrorDetails
    path: tuple[str, ...]
    tag: str | None

    @property
    def key(self) -> str:
        return ".".join(self.path) or "(file)"


def _locate(details: ErrorDetails, values: Any) -> _Found:
    """Follow the error's place through what was written: a part that is not there is a union's tag."""
    path: list[str] = []
    tag = None
    for part in details["loc"]:
        known = {str(key): value for key, value in values.items()} if isinstance(values, Mapping) else {}
        if str(part) in known:
            values = known[str(part)]
        elif isinstance(part, int) and isinstance(values, Sequence) and part < len(values):
            values = values[part]
        elif details["type"] == "missing" and part == details["loc"][-1]:
            pass
        else:
            tag = str(part)
            continue
        path.append(str(part))
    return _Found(details, tuple(path), tag)


def _line(model: type[BaseModel], found: _Found) -> str:
    details, key = found.details, found.key
    if details["type"] == "extra_forbidden":
        return unknown_key(model, found.path, found.tag)
    if details["type"] == "missing":
        return f"{key}: missing. It has no default."
    if details["type"] == "union_tag_invalid":
        tag = f"{key}.{details['ctx']['discriminator'].strip(chr(39))}"
        return f"{tag}: must be {_choice(details['ctx']['expected_tags'])}, not {details['ctx']['tag']!r}."
    if details["type"] == "value_error" and isinstance(details["input"], Mapping):
        return f"{key}: {details['ctx']['error']}."  # about a block's fields together
    return f"{key}: {_wanted(model, found)}, not {_shown(details['input'])}."


def _no_member(model: type[BaseModel], here: Sequence[_Found]) -> str:
    """A value that no member of a union takes, or that one field does not take."""
    wanted = dict.fromkeys(_wanted(model, one) for one in here)
    either = " or ".join(text.removeprefix("must be ") for text in wanted)
    return f"{here[0].key}: must be {either}, not {_shown(here[0].details['input'])}."


def _wanted(model: type[BaseModel], found: _Found) -> str:
    details = found.details
    if isinstance(details["input"], float) and not math.isfinite(details["input"]):
        return "must be a finite number"
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping{_of_what(model, found.key)}"
    text = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = re.sub(
        r"a valid tuple", "a list", re.sub(r"^Tuple should have (.*) after validation.*", r"must have \1", text)
    )
    return text[0].lower() + text[1:]


def _of_what(model: type[BaseModel], key: str) -> str:
    inside = [name[len(key) + 1 :] for name in dotted_names(model) if name.startswith(f"{key}.")]
    return f" of {' and '.join(inside)}" if 0 < len(inside) <= 3 else ""


def _choice(listed: str) -> str:
    first, _, last = listed.rpartition(", ")
    return f"{first} or {last}" if first else last


def _shown(value: Any) -> str:
    try:
        return "a mapping" if isinstance(value, Mapping) else repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


def unknown_key(model: type[BaseModel], path: Sequence[str], tag: str | None = None) -> str:
    """A line about a key that is not there, or not in this variant (`tag`) of its block: where it is, what is near."""
    names = list(dotted_names(model))
    *parents, last = path
    key, parent = ".".join(path), "".join(f"{part}." for part in parents)
    known = list(dict.fromkeys(name[len(parent) :].split(".")[0] for name in names if name.startswith(parent)))
    field, variants = _variants(model, parents)
    if field and tag in variants:
        owners = [name for name, block in variants.items() if last in block.model_fields]
        if owners:
            other = f"{parent}{field}: {owners[0]}"
            return f"{key}: is no key of {parent}{field} {tag}; it belongs to {', '.join(owners)}. Drop it, or set {other}."
        known = list(variants[tag].model_fields)
    near = difflib.get_close_matches(last, sorted(known), n=1, cutoff=0.5)
    exact = sorted((n for n in names if n.split(".")[-1] == last), key=lambda n: not n.startswith(parent))
    here = [f"{parent}{near[0]}"] if near else []
    ends = {name.split(".")[-1]: name for name in reversed(names)}
    elsewhere = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.75)]
    for guess in (*exact, *here, *elsewhere):
        return f"{key}: unknown key. Did you mean {guess}?"
    return f"{key}: unknown key. Known here: {', '.join(sorted(known)) or 'none'}."


def _variants(model: type[BaseModel], path: Sequence[str]) -> tuple[str | None, dict[str, type[BaseModel]]]:
    """The field that tells the variants of the block at `path` apart, and each variant by its tag."""
    field: FieldInfo | None = None
    blocks = [model]
    for part in path:
        fields = (
            field for block in blocks for name, field in block.model_fields.items() if (field.alias or name) == part
        )
        field = next(fields, None)
        blocks = blocks_of(field.annotation) if field else []
    by = field.discriminator if field and isinstance(field.discriminator, str) else None
    if by is None:
        return None, {}
    return by, {str(tag): block for block in blocks for tag in get_args(block.model_fields[by].annotation)}


def _takes_plain_values(annotation: Any) -> bool:
    """Whether the annotation also admits something that is neither a block nor null."""
    if isinstance(annotation, type):
        return not issubclass(annotation, (BaseModel, NoneType))
    parts = get_args(annotation)
    return any(map(_takes_plain_values, parts)) if blocks_of(annotation) else bool(parts)
