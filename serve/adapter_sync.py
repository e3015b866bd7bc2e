"""Keeps one replica's adapters as the endpoint's desired state wants them: a thread, a lock, and the effects.

The thread polls `desired.json` every second, asks `adapters.AdapterTable` what to do, does it (fetch from the registry,
load into and unload from the engine) off the decode path, and publishes what came of it. A second thread is the
heartbeat: a load that takes minutes does not make the replica look dead. Requests are counted in and out here. What is
decided, and why, is in `adapters.py`; this file imports no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from serve.adapter_uris import AdapterUris
from serve.adapters import Action, AdapterTable, Fetch, Load, Read
from serve.desired import HEARTBEAT_EVERY_S, AdapterReport, EndpointFiles, ReplicaReport
from serve.lines import Lines
from serve.routing import Source, Target
from service.domain import ModelRef
from service.errors import ConflictError, LorayError, NotFoundError, StorageError
from service.inference.engine import Engine
from service.registry import Registry, model_digest

POLL_EVERY_S = 1.0
# A request waits this long for its adapter: a cold fetch of some 100 MB from an object store, with a margin.
LOAD_WAIT_S = 120.0
# Replicas that were killed leave their last report; the next one to start sweeps up after this time.
FORGET_AFTER_S = 3600.0
_log = logging.getLogger(__name__)
StoredT = TypeVar("StoredT")


class AdapterSync:
    """One replica's adapters. `admit` belongs to one event loop; `release` and `close` may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        files: EndpointFiles,
        base_digest: str,
        replica: str,
        cache: Path,
        uris: AdapterUris = AdapterUris(),  # noqa: B008  frozen; it allows none
        heartbeat_every_s: float = HEARTBEAT_EVERY_S,
    ) -> None:
        self._engine, self._files, self._cache, self._uris = engine, files, cache, uris
        self._registry = Registry(files.home)
        self._base_digest, self._replica = base_digest, replica
        self._table = AdapterTable(engine.max_columns, engine.max_rank)
        self.lines = Lines(engine.num_slots)  # of requests that have not been admitted yet, and of those that have
        self._lock = threading.Lock()
        self._running = 0
        self._away = False  # the store did not answer this step's question
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._heartbeat_every_s = heartbeat_every_s
        self._publishing = threading.Lock()
        self._published: ReplicaReport | None = None
        self._threads = [
            threading.Thread(target=self._run, name="loray-adapters", daemon=True),
            threading.Thread(target=self._beat, name="loray-heartbeat", daemon=True),
        ]

    def start(self) -> None:
        """Take over the desired state once, so that the first report is a true one, then go on in the threads."""
        for report in self._files.reports():
            if time.time() - report.heartbeat_at > FORGET_AFTER_S:
                self._files.delete_report(report.replica)
        self._step()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads and take the report away."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)
        with self._publishing:  # a thread that is still loading does not publish any more
            self._files.delete_report(self._replica)

    async def admit(self, target: Target, epoch: int) -> Target:
        """Who answers a request for `target`, counted in until `release`; waits while the adapter is loaded.

        `epoch` is the desired state in which the target was found: an older one here is brought up to date first.
        Raises what `AdapterTable.acquire` raises, and ConflictError after LOAD_WAIT_S.
        """
        if target.is_base:
            with self._lock:
                self._running += 1
            return target
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LOAD_WAIT_S):
                return await self._admitted(target, epoch)
        except TimeoutError:
            with self._lock:
                adapter = self._table.adapters.get(target.digest)
                state = adapter.state if adapter else "unknown here"
            raise ConflictError(
                f"adapter {target.model} was not loaded within {LOAD_WAIT_S:g} s; it is {state}. "
                "Try again, or unload others with DELETE /v1/adapters/NAME."
            ) from None

    def available(self) -> list[str]:
        """The digests of the adapters on which a request can start now."""
        with self._lock:
            return [digest for digest, adapter in self._table.adapters.items() if adapter.available]

    def release(self, answering: Target) -> None:
        """The engine has finished a request that `admit` let in."""
        with self._lock:
            self._running -= 1
            if not answering.is_base:
                self._table.release(answering.digest)
        self._wake.set()

    async def _admitted(self, target: Target, epoch: int) -> Target:
        waiting, woken = None, False  # the digest that is waited for
        try:
            while True:
                changed = self._changed  # taken before looking: a change in between is not missed
                with self._lock:
                    up_to_date = self._table.epoch >= epoch or self._table.knows(target.digest)
                    digest = self._table.acquire(target.digest, target.label) if up_to_date else None
                    if digest is not None:
                        self._running += 1
                        return self._answering(target, digest)
                    if up_to_date and waiting != (awaited := self._table.awaited(target.digest, target.label).digest):
                        if waiting is not None:  # its label means another version now
                            self._table.stop_waiting(waiting)
                        self._table.wait(awaited)
                        waiting, woken = awaited, False
                if not woken:
                    self._wake.set()
                    woken = True
                await changed.wait()
        finally:
            if waiting is not None:
                with self._lock:
                    self._table.stop_waiting(waiting)
                self._notify()  # a turn that was over may go on

    def _answering(self, target: Target, digest: str) -> Target:
        if digest == target.digest:
            return target
        return Target(self._table.adapters[digest].model, digest, target.label)

    def _beat(self) -> None:
        while not self._stopping.wait(self._heartbeat_every_s):
            try:
                self._files.read()  # or a mount that is away would be written under
                self._publish()
            except StorageError as error:
                _log.warning("the heartbeat could not be written: %s", error)
            except Exception:
                _log.exception("the heartbeat could not be written; trying again")

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(POLL_EVERY_S)  # turns end by the clock, too
            self._wake.clear()
            try:
                self._step()
            except StorageError as error:
                _log.warning("adapters stay as they are, the store does not answer: %s", error)
            except Exception:
                _log.exception("the adapters could not be brought up to date; trying again")

    def _step(self) -> None:
        try:
            desired = self._files.read()
        except StorageError as error:  # what is known goes on: turns, and loads from this node's cache
            if self._table.epoch < 0:
                raise
            self._away = True
            _log.warning("no news of the adapters, the store does not answer: %s", error)
        else:
            self._away = False
            with self._lock:
                self._table.want(desired.epoch, desired.adapters)
        self._notify()
        while not self._stopping.is_set():
            with self._lock:
                action = self._table.next_action(self._engine.free_columns, time.monotonic())
            if action is None or not self._carry_out(action):
                break
            self._notify()
            if not self._away:
                self._publish()
        self._notify()
        if not self._away:
            self._publish()

    def _notify(self) -> None:
        """Let waiting requests look again."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fire)

    def _fire(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _carry_out(self, action: Action) -> bool:
        """Do it and tell the table. False: the engine is still busy with it, leave the rest for the next step."""
        if isinstance(action, Fetch):
            self._fetch(action)
        elif isinstance(action, Read | Load):
            self._load(action)
        else:
            try:
                self._engine.unload_adapter(action.digest)
            except ConflictError:
                with self._lock:
                    self._table.still_in_use(action.digest)
                return False
            except NotFoundError:
                _log.warning("adapter %s was not in the engine any more", action.digest)
            with self._lock:
                self._table.unloaded(action.digest)
        return True

    def _fetch(self, action: Fetch) -> None:
        problem, rank = "", 0
        try:
            if action.source is None:
                manifest = self._stored(lambda: self._registry.manifest(ModelRef.parse(action.model)))
                found, base, rank = manifest.digest, manifest.base_digest, manifest.rank
            else:
                found, base = model_digest(action.source.files), action.source.base_digest
            problem = self._mismatch(action.digest, found, base)
            if not problem:
                directory = self._copy(action.digest, action.model, action.source)
                rank = rank or _declared_rank(directory)
        except StorageError as error:
            _log.warning("adapter %s cannot be fetched yet: %s", action.model, error)
            with self._lock:
                self._table.short(action.digest, f"cannot be fetched yet: {error}")
            return
        except Exception as error:
            problem = _reason(error, action.model)
        with self._lock:
            if problem:
                self._table.refuse(action.digest, problem)
            else:
                self._table.fetched(action.digest, rank)

    def _copy(self, digest: str, model: str, source: Source | None) -> Path:
        """A verified copy on this node: the one it has, while no store answers. Raises what registry or URI raise."""
        copied = self._cache / "adapters" / digest
        if self._away and copied.is_dir():
            return copied
        if source is None:
            return self._stored(lambda: self._registry.fetch(ModelRef.parse(model), self._cache))
        return self._uris.fetch(source, self._cache)

    def _stored(self, read: Callable[[], StoredT]) -> StoredT:
        """What `read` finds in the store. StorageError where it finds nothing because the store is away and looks empty."""
        try:
            return read()
        except NotFoundError:
            self._files.read()
            raise

    def _mismatch(self, wanted: str, found: str, base: str) -> str:
        if wanted != found:
            return f"its files are {found[:12]}, registered was {wanted[:12]}. DELETE it and PUT it again."
        if base != self._base_digest:
            return f"it was made for base model {base[:12]}, this endpoint serves {self._base_digest[:12]}."
        return ""

    def _load(self, action: Read | Load) -> None:
        digest = action.digest
        with self._lock:
            adapter = self._table.adapters[digest]
            model, source = adapter.model, adapter.source
        try:
            directory = self._copy(digest, model, source)
            if isinstance(action, Read):
                self._engine.read_adapter(digest, directory)
                return
            info = self._engine.load_adapter(digest, directory)
        except ConflictError as error:
            with self._lock:
                self._table.short(digest, str(error))
        except StorageError as error:
            with self._lock:
                self._table.unread(digest, str(error))
        except Exception as error:
            with self._lock:
                self._table.refuse(digest, _reason(error, model))
        else:
            with self._lock:
                self._table.loaded(digest, info.num_columns, time.monotonic())

    def _publish(self) -> None:
        """Write the report if it says something new, or for the heartbeat."""
        with self._publishing:
            report, last = self._report(), self._published
            same = last is not None and last.model_copy(update={"heartbeat_at": report.heartbeat_at}) == report
            age_s = report.heartbeat_at - last.heartbeat_at if last else 0.0
            if self._stopping.is_set() or (same and 0 <= age_s < 0.9 * self._heartbeat_every_s):
                return
            self._files.write_report(report)
            self._published = report

    def _report(self) -> ReplicaReport:
        resident, stats = self._engine.adapters(), self._engine.stats()
        with self._lock:
            adapters = {
                a.digest: AdapterReport(
                    model=a.model,
                    state=a.state,
                    detail=a.detail,
                    running=a.running,
                    columns=a.columns,
                    bytes=resident[a.digest].bytes if a.digest in resident else 0,
                )
                for a in self._table.adapters.values()
            }
            serving, running, epoch = self._table.serving(), self._running, self._table.epoch
        return ReplicaReport(
            replica=self._replica,
            heartbeat_at=time.time(),
            epoch=epoch,
            base_digest=self._base_digest,
            running=running,
            waiting=stats.num_waiting + self.lines.num_waiting,
            prefix_bytes=stats.prefix_bytes,
            slots=self._engine.num_slots,
            free_columns=self._engine.free_columns,
            max_columns=self._engine.max_columns,
            serving=serving,
            adapters=adapters,
        )


def _declared_rank(directory: Path) -> int:
    """The columns that an adapter without a manifest needs; ModelError for what cannot be served whatever its tensors are."""
    from service.inference.adapter_files import declared_rank  # imports torch, which only the engine's process has

    return declared_rank(directory)


def _reason(error: Exception, model: str) -> str:
    """Why an adapter is refused; an error nobody expected goes to the log with its traceback."""
    if not isinstance(error, LorayError):
        _log.error("adapter %s could not be fetched or loaded", model, exc_info=error)
        return f"{type(error).__name__}: {error}"
    return str(error) or type(error).__name__
