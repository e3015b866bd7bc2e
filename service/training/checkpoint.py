"""Resumable state: float32 trainable weights and optimizer moments by parameter name, in safetensors and JSON.

A checkpoint knows nothing of workers or strategy: any number of them goes on from it. The position in the data and every
random draw follow from the step, because the planner and the dropout seeds are functions of it. This file finds and reads
checkpoints, all workers together; `checkpoint_saver.py` writes them, `checkpoint_index.py` says what they consist of.

    found, passed_over = newest_checkpoint(run.uri, identity, world, cache)
    if found:
        with found:
            strategy.load_state(found.read)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from service import storage
from service.domain import FileEntry
from service.errors import ConfigError, LorayError, NotFoundError, StorageError
from service.training import checkpoint_index as layout
from service.training.checkpoint_index import Extra, Identity, Index, NotWholeError, Tensors
from service.training.checkpoint_saver import CheckpointSaver
from service.training.patience import Patience
from service.training.strategy import World

__all__ = ["Checkpoint", "CheckpointSaver", "Identity", "checkpoint_at", "newest_checkpoint", "newest_step"]

AWAY_S = 300.0  # how long S3 may be away while a checkpoint is looked for

Event = Callable[[str, str], None]


def _silent(kind: str, text: str) -> None:
    """For who has nobody to tell."""


class Checkpoint:
    """What a run goes on from, verified and open; close it when it is loaded. `step` counts finished optimizer steps."""

    def __init__(self, index: Index, files: dict[str, Any], here: dict[str, str]) -> None:
        self._index, self._files = index, files
        self.step: int = index.step
        self.extra: Extra = dict(index.extra)
        self.names: tuple[str, ...] = tuple(sorted(index.tensors))
        self.changes: list[str] = [  # why going on is not bit for bit what never stopping would have been
            f"{what}: {index.made_on.get(what, 'nothing')} there, {here.get(what, 'nothing')} here"
            for what in sorted(here.keys() | index.made_on.keys())
            if here.get(what) != index.made_on.get(what)
        ]

    def read(self, name: str) -> Tensors:
        """The `weight` and moments of one parameter, in memory of their own; nothing else is read."""
        return {
            key: self._files[file].get_tensor(f"{name}/{key}").clone()
            for key, file in self._index.tensors[name].items()
        }

    def close(self) -> None:
        """Let go of the files. What was read stays."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def newest_checkpoint(
    run_uri: str, identity: Identity, world: World, cache: Path, *, retry_s: float = AWAY_S, event: Event = _silent
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, verified, and a line for each newer one that had to be passed over. A collective.

    What one worker finds damaged, all pass over. Raises ConfigError, with every difference, where it is of another
    identity; StorageError where the store itself stays away, because starting over is not what an outage asks for.
    """
    patience = Patience([run_uri], retry_s, f"checkpoints of {run_uri}", event)
    steps: list[int] = []
    problem: Exception | None = None
    try:
        steps = patience.insist(lambda: layout.steps_of(run_uri)) if world.rank == 0 else []
    except LorayError as error:
        problem = error
    _raise_together(world, problem)
    passed_over: list[str] = []
    while (step := world.from_first(steps.pop() if steps else -1)) >= 0:
        found = _open_together(run_uri, step, identity, world, cache, patience)
        if isinstance(found, Checkpoint):
            return found, passed_over
        passed_over.append(f"checkpoint {step:08d} is not whole and was passed over: {found}")
    return None, passed_over


def checkpoint_at(
    run_uri: str,
    step: int,
    identity: Identity,
    world: World,
    cache: Path,
    *,
    retry_s: float = AWAY_S,
    event: Event = _silent,
) -> Checkpoint | str:
    """The checkpoint of this step, verified, or why it is not whole. A collective. Raises as above."""
    patience = Patience([run_uri], retry_s, f"checkpoint of step {step}", event)
    return _open_together(run_uri, step, identity, world, cache, patience)


def is_there(run_uri: str, step: int, world: World, *, retry_s: float = AWAY_S, event: Event = _silent) -> bool:
    """Whether this step has a completed checkpoint, unverified. A collective. Raises StorageError when nobody can tell."""
    index = storage.join(layout.directory_of(run_uri, step), layout.INDEX)
    patience = Patience([run_uri], retry_s, f"checkpoint of step {step}", event)
    found, problem = False, None
    try:
        found = world.rank == 0 and patience.insist(lambda: storage.exists(index))
    except LorayError as error:
        problem = error
    _raise_together(world, problem)
    return world.any(found)


def newest_step(run_uri: str) -> int | None:
    """The step of the newest checkpoint that was completed, unverified; None without one. Not a collective."""
    for step in reversed(layout.steps_of(run_uri)):
        if storage.exists(storage.join(layout.directory_of(run_uri, step), layout.INDEX)):
            return step
    return None


def demand_same(run_uri: str, identity: Identity) -> None:
    """Raises ConfigError, with every difference, where the newest checkpoint is of another identity. Not a collective: for
    whoever has not started workers yet."""
    step = newest_step(run_uri)
    if step is None:
        return
    directory = layout.directory_of(run_uri, step)
    with suppress(NotWholeError, NotFoundError):  # the workers look at the one before
        _demand_same(identity, layout.read_index(directory), directory)


def _open_together(
    run_uri: str, step: int, identity: Identity, world: World, cache: Path, patience: Patience
) -> Checkpoint | str:
    """The checkpoint, or why it is passed over; the same on all workers."""
    found: Checkpoint | None = None
    problem: Exception | None = None
    try:
        found = _open(run_uri, step, identity, world, cache, patience)
    except (NotWholeError, LorayError) as error:
        problem = error
    _raise_together(world, problem if isinstance(problem, LorayError) else None)
    damaged = world.any(problem is not None)
    if not storage.is_local(run_uri):
        _forget_fetched(
            run_uri, cache
        )  # every worker of this node holds its files open now: they go when it closes them
    if found is not None and not damaged:
        return found
    if found is not None:
        found.close()
    return str(problem or "another worker found it damaged.")


def _raise_together(world: World, problem: Exception | None) -> None:
    """Raise on all workers when there is a problem on one, so that none waits for another that has left."""
    if world.any(problem is not None):
        raise problem or StorageError("another worker could not read the run's checkpoints: its log says why.")


def _open(run_uri: str, step: int, identity: Identity, world: World, cache: Path, patience: Patience) -> Checkpoint:
    directory = layout.directory_of(run_uri, step)
    with _damage_is_not_whole(run_uri):
        index = patience.insist(lambda: layout.read_index(directory))
        _demand_same(identity, index, directory)
        if storage.is_local(run_uri):
            paths = {name: storage.local_path(storage.join(directory, name)) for name in index.files}
            for number, name in enumerate(sorted(paths)):
                if number % world.size == world.rank:  # the workers share the work
                    _verify(paths[name], index.files[name])
            files = _open_files(paths, index)
        else:
            with _locked(run_uri, cache) as parent:
                files = _open_files(_fetch(directory, index, parent / index.save, patience), index)
    return Checkpoint(index, files, layout.made_on(world.size))


@contextmanager
def _damage_is_not_whole(run_uri: str) -> Iterator[None]:
    """A file that is missing, or in a directory unreadable, is damage. S3 that does not answer is not: it was insisted on."""
    try:
        yield
    except NotFoundError as error:
        raise NotWholeError(str(error)) from error
    except StorageError as error:
        if not storage.is_local(run_uri):
            raise
        raise NotWholeError(str(error)) from error


def _demand_same(identity: Identity, index: Index, directory: str) -> None:
    if lines := identity.differences(index.identity):
        raise ConfigError(
            "\n  ".join([f"the checkpoint {directory} was made by another training:", *lines])
            + "\nGo on with the run's own config (loray train --resume RUN, without --set), or start a new run."
        )


def _fetch(directory: str, index: Index, local: Path, patience: Patience) -> dict[str, Path]:
    """Download what is not here yet; a file that has its name is verified. Call it under the lock."""
    paths = {name: local / name for name in index.files}
    missing = [name for name in index.files if not paths[name].exists()]
    _demand_space(local, sum(index.files[name].bytes for name in missing))
    for name in missing:
        unverified = local / f"{name}.unverified"
        patience.insist(partial(storage.fetch_file, storage.join(directory, name), unverified, None))
        _verify(unverified, index.files[name])
        unverified.rename(paths[name])
    return paths


def _demand_space(local: Path, needed: int) -> None:
    free = storage.free_bytes(str(local))
    if free is not None and free < needed:
        raise StorageError(
            f"{local} has {free:,} bytes free, the checkpoint needs {needed:,}. Free space, or point LORAY_CACHE elsewhere."
        )


def _verify(path: Path, want: FileEntry) -> None:
    seen = storage.sha256_file(path)
    if seen != want:
        raise NotWholeError(
            f"{path.name} has {seen.bytes} bytes, sha256 {seen.sha256[:12]}, and should have {want.bytes}, {want.sha256[:12]}."
        )


def _open_files(paths: dict[str, Path], index: Index) -> dict[str, Any]:
    """Memory-mapped: they stay readable when their names are deleted."""
    files: dict[str, Any]
    try:
        files = {name: safe_open(str(path), framework="pt", device="cpu") for name, path in paths.items()}
    except (OSError, SafetensorError) as error:
        raise NotWholeError(f"a file of {index.save} cannot be opened: {error}.") from error
    held = {name: set(file.keys()) for name, file in files.items()}
    for parameter, tensors in index.tensors.items():
        absent = [key for key, name in tensors.items() if f"{parameter}/{key}" not in held.get(name, ())]
        if absent:
            raise NotWholeError(f"{parameter} has no {absent[0]} in {tensors[absent[0]]}.")
    return files


@contextmanager
def _locked(run_uri: str, cache: Path) -> Iterator[Path]:
    """The directory for this run's files on this node, for one worker at a time."""
    parent = cache / "checkpoints" / hashlib.sha256(run_uri.encode()).hexdigest()[:16]
    with storage.locked(parent):
        yield parent


def _forget_fetched(run_uri: str, cache: Path) -> None:
    """Also what a killed worker left there."""
    with _locked(run_uri, cache) as parent:
        storage.delete_tree(str(parent))
