"""Writes checkpoints while training goes on: a snapshot to host memory now, the upload in a thread of its own.

Each worker keeps and writes only its share. The first one waits for the others' shares, writes checkpoint.json and deletes
what is no longer kept; on every worker the upload has ended when the checkpoint is whole. Needs host memory for one
snapshot, and room on storage for one checkpoint more than are kept.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from service import storage
from service.config import CheckpointBlock
from service.domain import FileEntry
from service.errors import NotFoundError, StorageError
from service.runs import Run
from service.training import checkpoint_index as layout
from service.training.checkpoint_index import Extra, Identity, Index, NotWholeError, Part, Tensors
from service.training.patience import Patience
from service.training.strategy import World

PEERS_S = 600.0  # for other workers' shares, beside `retry_s` and four times what this worker's own took
LEAVING_S = 60.0  # for them, once this worker's training has ended: they may be dead
FIRST_POLL_S, LONGEST_POLL_S = 0.05, 2.0

Event = Callable[[str, str], None]


@dataclass
class _Save:
    """One worker's part of one save."""

    step: int
    id: str  # of the save, the same on all workers
    directory: str
    share: list[tuple[str, Tensors]]  # emptied on the way
    names: set[str]  # of all parameters, whoever writes them
    extra: Extra
    before_visible: Callable[[], None]
    patience: Patience
    born: float = field(default_factory=time.monotonic)
    written_s: float = 0.0


class CheckpointSaver:
    """One at a time: a second `save` waits for the first. Every worker's training thread makes the same calls.

    `event(kind, text)` is called from the upload's thread: `storage_away`, `storage_back`, `checkpoint`.
    """

    def __init__(self, run: Run, world: World, identity: Identity, block: CheckpointBlock, event: Event) -> None:
        self._run, self._world, self._identity, self._block, self._event = run, world, identity, block, event
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._raised = False
        self._leaving = threading.Event()

    def save(
        self,
        step: int,
        state: Iterator[tuple[str, Tensors]],
        extra: Mapping[str, float | int | None],
        before_visible: Callable[[], None],
    ) -> None:
        """Take the snapshot of `state`, a collective, and start the upload. Raises what an earlier upload failed with.

        `before_visible` is called in the upload's thread before anything is written: what it flushes is never behind a
        checkpoint. `extra["metric"]` (lower is better; None: not measured) is what `checkpoint.keep_best` looks at.
        """
        self.wait()
        id = f"{self._world.from_first(secrets.randbits(62)):016x}"
        share, names = layout.deal(state, self._world.rank, self._world.size)
        patience = Patience([self._run.uri], self._block.retry_s, f"checkpoint of step {step}", self._event)
        directory = layout.directory_of(self._run.uri, step)
        save = _Save(step, id, directory, share, names, dict(extra), before_visible, patience)
        self._thread = threading.Thread(target=self._upload, args=(save,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def raise_if_failed(self) -> None:
        """Raise what an upload has failed with; never waits."""
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def wait(self) -> None:
        """Return when the last checkpoint is whole, or raise what its upload failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def close(self) -> None:
        """Wait for the upload to end; raises its failure, unless that was raised before."""
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        if not self._raised:
            self.raise_if_failed()

    def _upload(self, save: _Save) -> None:
        try:
            save.patience.insist(save.before_visible)
            if self._world.rank == 0:
                self._complete(save)
            else:
                self._contribute(save)
        except BaseException as error:
            self._failure = error  # for the training thread, which raises it

    def _complete(self, save: _Save) -> None:
        """The first worker's part: its share, then the index, then what may go."""
        insist = save.patience.insist
        insist(lambda: _clear(save, unless_whole=True))
        mine = self._write_share(save)
        index = self._index(save, [mine, *self._parts_of_others(save)])
        insist(lambda: storage.write_bytes(storage.join(save.directory, layout.INDEX), index.to_bytes()))
        size = sum(entry.bytes for entry in index.files.values())
        text = f"step {save.step} is whole: {size:,} bytes, {time.monotonic() - save.born:.1f} s after its snapshot"
        self._event("checkpoint", text)
        insist(lambda: _clear(save, unless_whole=False))
        insist(lambda: prune(self._run.uri, save.step, self._block.keep_last, self._block.keep_best))

    def _contribute(self, save: _Save) -> None:
        """Another worker's part: its share, then waiting for the first."""
        part = self._write_share(save).model_dump_json().encode()
        uri = storage.join(save.directory, _part_name(self._world.rank, save))
        save.patience.insist(lambda: storage.write_bytes(uri, part))
        self._await(save, lambda: [] if _is_whole(save) else ["the first worker's checkpoint.json"], times=2)

    def _write_share(self, save: _Save) -> Part:
        began = time.monotonic()
        files: dict[str, FileEntry] = {}
        tensors: dict[str, dict[str, str]] = {}
        left = sum(tensor.nbytes for _, parts in save.share for tensor in parts.values())
        for number, shard in enumerate(layout.shards(save.share)):
            name = f"{save.id}-{self._world.rank:05d}-{number:05d}.safetensors"
            chunks = layout.as_safetensors({f"{parameter}/{key}": tensor for (parameter, key), tensor in shard.items()})
            uri = storage.join(save.directory, name)
            files[name] = save.patience.insist(partial(_write, uri, chunks, left))
            for parameter, key in shard:
                tensors.setdefault(parameter, {})[key] = name
            left -= sum(tensor.nbytes for tensor in shard.values())
        save.written_s = time.monotonic() - began
        return Part(files=files, tensors=tensors)

    def _parts_of_others(self, save: _Save) -> list[Part]:
        wanted = {_part_name(rank, save): f"worker {rank}" for rank in range(1, self._world.size)}

        def missing() -> list[str]:
            there = set(storage.list_names(save.directory))
            return [worker for name, worker in wanted.items() if name not in there]

        self._await(save, missing, times=1)
        uris = [storage.join(save.directory, name) for name in wanted]
        return [Part.model_validate_json(data) for data in save.patience.insist(lambda: storage.read_many(uris))]

    def _await(self, save: _Save, missing: Callable[[], list[str]], times: int) -> None:
        """Return when nothing is missing any more; StorageError says what was when time was up."""
        deadline = time.monotonic() + times * (PEERS_S + self._block.retry_s + 4 * save.written_s)
        pause_s = FIRST_POLL_S
        while absent := save.patience.insist(missing):
            now = time.monotonic()
            if self._leaving.is_set():
                deadline = min(deadline, now + LEAVING_S)
            if now > deadline:
                raise StorageError(
                    f"the checkpoint of step {save.step} is not whole: {', '.join(absent)} did not arrive. "
                    f"The one before stays; go on from it: loray train --resume {self._run.id}"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)

    def _index(self, save: _Save, parts: list[Part]) -> Index:
        index = Index(
            step=save.step,
            save=save.id,
            identity=self._identity,
            extra=save.extra,
            files={name: entry for part in parts for name, entry in part.files.items()},
            tensors={name: tensors for part in parts for name, tensors in part.tensors.items()},
            made_on=layout.made_on(self._world.size),
        )
        assert set(index.tensors) == save.names, "the workers went through different states"
        return index


def prune(run_uri: str, newest: int, keep_last: int, keep_best: int) -> None:
    """Delete what need not be kept now that step `newest` is whole, and what killed attempts left before it.

    Nothing beyond `newest` that has no index is touched: it may be being written.
    """
    metrics: dict[int, float | None] = {}
    steps = layout.steps_of(run_uri)
    for step in steps:
        try:
            metrics[step] = layout.read_index(layout.directory_of(run_uri, step)).extra.get("metric")
        except (NotFoundError, NotWholeError):
            continue  # never whole
    keep = layout.kept(metrics, newest, keep_last, keep_best)
    for step in steps:
        if step not in keep and (step in metrics or step < newest):
            directory = layout.directory_of(run_uri, step)
            # First: a checkpoint whose deletion is cut short is not whole either.
            storage.delete_tree(storage.join(directory, layout.INDEX))
            storage.delete_tree(directory)


def _write(uri: str, chunks: Sequence[bytes | memoryview], still_to_come: int) -> FileEntry:
    free = storage.free_bytes(uri)
    if free is not None and free < still_to_come:
        raise StorageError(
            f"{uri} cannot be written: {still_to_come:,} bytes of the checkpoint are still to come, {free:,} are free there. "
            "Free space, lower checkpoint.keep_last, or point LORAY_HOME to a larger disk."
        )
    return storage.write_chunks(uri, chunks)


def _clear(save: _Save, *, unless_whole: bool) -> None:
    """Delete what other saves of the same step left; before this one is whole only if none of them was."""
    names = storage.list_names(save.directory)
    if unless_whole and layout.INDEX in names:
        return
    for name in (*names, *storage.list_torn(save.directory)):
        if name != layout.INDEX and save.id not in name:
            storage.delete_tree(storage.join(save.directory, name))


def _is_whole(save: _Save) -> bool:
    try:
        return layout.read_index(save.directory).save == save.id
    except (NotFoundError, NotWholeError):
        return False


def _part_name(rank: int, save: _Save) -> str:
    return f"part-{rank:05d}-{save.id}.json"
