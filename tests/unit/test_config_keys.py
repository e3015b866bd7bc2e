"""No key of a config is read by nothing: each is looked for in the source, by its whole dotted name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from service import config_blocks
from service.config import RunConfig, ServeConfig, dotted_names
from service.config_problems import blocks_of
from service.sweep_config import SweepConfig

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = Path(config_blocks.__file__)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field, blocks too, with its annotation; those of all members of a union."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field.annotation
        for block in blocks_of(field.annotation):
            yield from _fields(block, f"{key}.")


def _settled(model: type[BaseModel]) -> set[str]:
    """Keys with one possible value (`objective: sft`): the config checks them, and they have nothing to change yet."""
    values: dict[str, set[Any]] = defaultdict(set)
    for key, annotation in _fields(model):
        values[key] |= set(get_args(annotation)) if get_origin(annotation) is Literal else {"any", "other"}
    return {key for key, possible in values.items() if len(possible) == 1}


class _Reads:
    """The dotted names that a source file reads off a config.

    `config.optim.lr` is one; so is `block.every.steps` where `block` is annotated as a CheckpointBlock, or was assigned
    from `config.checkpoint`, or goes through several that were. What is called `config` is taken for one.
    """

    def __init__(self, model: type[BaseModel], tree: ast.AST) -> None:
        self._paths: dict[str, set[str]] = defaultdict(set)  # by class: where in the config such a block stands
        self._paths[model.__name__].add("")
        for key, annotation in _fields(model):
            for cls in (cls for block in blocks_of(annotation) for cls in block.__mro__ if issubclass(cls, BaseModel)):
                self._paths[cls.__name__] |= {f"{key}."} if cls.model_fields else set()
        self._names: dict[str, set[str]] = defaultdict(set, {"config": {""}})
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
                target = node if isinstance(node, ast.arg) else node.target
                words = {name.id for name in ast.walk(node.annotation) if isinstance(name, ast.Name)}
                self._names[_called(target)] |= {path for word in words for path in self._paths.get(word, ())}
        for node in nodes:
            if isinstance(node, ast.Assign):
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
                self._assign(node.target, node.iter)
        self.found = {p.rstrip(".") for node in nodes if isinstance(node, ast.Attribute) for p in self._resolve(node)}

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its)
        elif _called(target) != "config":
            self._names[_called(target)] |= self._resolve(value)

    def _resolve(self, node: ast.expr) -> set[str]:
        """What an expression may stand for: `optim.batch.` for a block, the same without a meaning for a value."""
        known = self._names.get(_called(node), set())
        inside = (
            {f"{path}{node.attr}." for path in self._resolve(node.value)} if isinstance(node, ast.Attribute) else set()
        )
        return known | inside


def _called(node: ast.AST) -> str:
    """`block` for a variable, an argument, and for `self.block`."""
    return str(getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", ""))


def _properties() -> Iterator[tuple[str, str, set[str]]]:
    """(class, property, fields that it reads) of every property of a block: its fields are read by who reads it."""
    tree = ast.parse(BLOCKS.read_text(encoding="utf-8"))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for member in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
            if any(_called(decorator) == "property" for decorator in member.decorator_list):
                texts = (ast.unparse(node) for node in ast.walk(member) if isinstance(node, ast.Attribute))
                yield cls.name, member.name, {text.removeprefix("self.") for text in texts if text.startswith("self.")}


def _read(model: type[BaseModel], *packages: str) -> set[str]:
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py")) if file != BLOCKS]
    read = {name for file in files for name in _Reads(model, ast.parse(file.read_text(encoding="utf-8"))).found}
    for cls, name, fields in _properties():
        for key, annotation in _fields(model):
            if f"{key}.{name}" in read and cls in {block.__name__ for block in blocks_of(annotation)}:
                read |= {f"{key}.{field}" for field in fields}
    return read


@pytest.mark.parametrize(
    ("model", "packages"),
    [(RunConfig, ("service", "jobs")), (ServeConfig, ("service", "serve")), (SweepConfig, ("tune",))],
    ids=["run", "serve", "sweep"],
)
def test_no_key_is_read_by_nothing(model: type[BaseModel], packages: tuple[str, ...]) -> None:
    read = _read(model, *packages)
    keys = [name for name in dotted_names(model) if name not in _settled(model)]
    assert [key for key in keys if key not in read] == []


def test_reading_is_seen_through_arguments_assignments_loops_and_attributes() -> None:
    code = """
class Saver:
    def __init__(self, block: CheckpointBlock, config: RunConfig) -> None:
        self._block, optim = block, config.optim
        print(optim.batch.rows, unrelated.seed)

    def due(self) -> int:
        return self._block.every.steps

def weights(sources: Sequence[SourceBlock], reading: ReadingBlock):
    return [source.weight for source in sources], reading.columns
"""
    found = _Reads(RunConfig, ast.parse(code)).found
    assert {"optim.batch.rows", "checkpoint.every.steps", "data.train.weight", "data.train.columns"} <= found
    assert not {"evaluate.every.steps", "seed", "optim.lr", "checkpoint.keep_last"} & found
