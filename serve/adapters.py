"""The life of adapters on one replica: pure state, no I/O, no threads; the caller holds a lock and carries out actions.

    registered -> cached -> resident -> draining -> gone
                    pending (waits for columns)   refused (with the reason; until it is withdrawn)

Identity is the digest: a label that now means another version is a new entry, and the old one drains by reference count.
While the new one loads, the label's old version of the same family keeps answering. When columns are short, the least
recently used adapter without running or waiting requests is evicted. Where all are in use, they take turns: the one that
has been resident longest, and at least SLICE_S, lets no more requests in, and is exchanged when those it has are done.
Pinned adapters stay. What others must make room for is read from its files first: it is at hand when they are gone, and
one that cannot be read moves nobody. `adapter_sync.py` carries out the actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from serve.routing import Registered, Source
from service.domain import ModelRef
from service.errors import ConflictError, ModelError, NotFoundError

SLICE_S = 1.0


class AdapterState(StrEnum):
    """Where an adapter is in its life on one replica."""

    REGISTERED = "registered"  # known
    CACHED = "cached"  # its files are verified on this node
    PENDING = "pending"  # waits, mostly for columns: the reason stands beside it
    RESIDENT = "resident"  # answers
    DRAINING = "draining"  # withdrawn, finishing what runs
    REFUSED = "refused"  # cannot be served: the reason stands beside it
    GONE = "gone"


@dataclass
class Adapter:
    """The facts about one adapter; its state follows from them."""

    digest: str
    model: str
    source: Source | None = None  # None: the registry has it
    wanted: bool = True
    cached: bool = False
    resident: bool = False
    unloading: bool = False  # an Unload is being carried out: no request gets in any more
    closing: bool = False  # its turn is over: no request gets in, and it is unloaded when the last one is done
    pinned: bool = False
    loaded_at_s: float = 0.0
    read: bool = False  # since it was last loaded: only a look ahead, its tensors may have been dropped again
    columns: int = 0  # needed; known once cached
    running: int = 0
    waiting: int = 0
    waiting_since: int = 0  # by the table's clock: the one that is waited for longest is loaded first
    fresh: bool = True  # PUT and not loaded since: loads without being asked for
    since: int = 0
    last_used: int = 0
    refusal: str = ""
    shortage: str = ""
    unreadable: bool = False  # just now: nobody makes room for it before something changes

    @property
    def state(self) -> AdapterState:
        """The one word for these facts."""
        if not self.wanted:
            return AdapterState.DRAINING if self.resident else AdapterState.GONE
        if self.refusal:
            return AdapterState.REFUSED
        if self.available:
            return AdapterState.RESIDENT
        if self.shortage:
            return AdapterState.PENDING
        return AdapterState.CACHED if self.cached else AdapterState.REGISTERED

    @property
    def available(self) -> bool:
        """Whether a request can start on it now."""
        return self.resident and not self.unloading and not self.closing

    @property
    def detail(self) -> str:
        """Why it is refused or pending."""
        return self.refusal or ("" if self.available else self.shortage)


@dataclass(frozen=True)
class Fetch:
    """Bring the files of `model` to this node, from its source or else the registry; then call `fetched` or `refuse`."""

    digest: str
    model: str
    source: Source | None = None


@dataclass(frozen=True)
class Read:
    """Read and check its tensors while others make room; then call nothing, or `unread` or `refuse`."""

    digest: str


@dataclass(frozen=True)
class Load:
    """Make it resident; then call `loaded`, `short`, `unread` or `refuse`."""

    digest: str


@dataclass(frozen=True)
class Unload:
    """Free its columns; nothing runs on it. Then call `unloaded`."""

    digest: str


Action = Fetch | Read | Load | Unload


class AdapterTable:
    """All adapters of one replica. Every method is quick and raises before it changes anything."""

    def __init__(self, max_columns: int, max_rank: int | None = None) -> None:
        self.max_columns = max_columns
        self.max_rank = max_columns if max_rank is None else max_rank  # of one adapter
        self.epoch = -1
        self.adapters: dict[str, Adapter] = {}
        self._labels: dict[str, Registered] = {}
        self._previous: dict[str, Registered] = {}  # what a label meant before, until its new version is resident
        self._clock = 0

    def want(self, epoch: int, labels: Mapping[str, Registered]) -> None:
        """Take over a desired state, whole. Idempotent; what could not be done before may be tried again."""
        for label, old in self._labels.items():
            new = labels.get(label)
            if new is not None and new.digest != old.digest and self._is_available(old.digest):
                self._previous[label] = old
        self.epoch, self._labels = epoch, dict(labels)
        for adapter in self.adapters.values():
            adapter.fresh &= not adapter.available  # it was there at the end of the last step: PUT and seen
        # Of two entries with the same content, the registry's is the one to fetch: it does not change.
        for entry in sorted(labels.values(), key=lambda entry: entry.source is None):
            adapter = self.adapters.setdefault(entry.digest, Adapter(entry.digest, entry.model))
            adapter.model, adapter.source = entry.model, entry.source
            if entry.since > adapter.since:
                adapter.since, adapter.refusal, adapter.fresh, adapter.read = entry.since, "", True, False
        pins = {entry.digest for entry in labels.values() if entry.pin}
        for adapter in self.adapters.values():
            adapter.pinned = adapter.digest in pins
        self._settle()

    def knows(self, digest: str) -> bool:
        """Whether a request for exactly this adapter can be taken, whatever a newer desired state says of others."""
        adapter = self.adapters.get(digest)
        return adapter is not None and adapter.wanted and not adapter.refusal

    def acquire(self, digest: str, label: str | None) -> str | None:
        """Count a request in and return the digest that answers it, or None: it has to wait for the load.

        Raises NotFoundError if it was withdrawn, ModelError if it is refused and nothing else answers to the label,
        ConflictError if the pinned adapters leave it no room.
        """
        adapter = self._answering(digest, label)
        if adapter.available:
            self._clock += 1
            adapter.running += 1
            adapter.last_used = self._clock
            return adapter.digest
        if adapter.refusal:
            raise ModelError(f"adapter {adapter.model} is refused by its replica. GET /v1/adapters says why.")
        if not self._could_fit(adapter):
            raise ConflictError(
                f"adapter {adapter.model} needs {adapter.columns} columns, and pinned adapters leave "
                f"{self._unpinned_columns()}. PUT one of those again without its pin."
            )
        return None

    def release(self, digest: str) -> None:
        """Count a request out."""
        self.adapters[digest].running -= 1
        self._settle()

    def awaited(self, digest: str, label: str | None) -> Adapter:
        """The adapter that a request of this digest or label waits for. Raises NotFoundError as `acquire` does."""
        return self._answering(digest, label)

    def wait(self, digest: str) -> None:
        """A request waits for this adapter: it is loaded, and if columns are short an idle one makes room."""
        adapter = self.adapters[digest]
        if not adapter.waiting:
            self._clock += 1
            adapter.waiting_since = self._clock
        adapter.waiting += 1

    def stop_waiting(self, digest: str) -> None:
        """It waits no more: it was let in, or gave up."""
        if digest in self.adapters:
            self.adapters[digest].waiting = max(0, self.adapters[digest].waiting - 1)
            self._settle()

    def next_action(self, free_columns: int, now_s: float) -> Action | None:
        """What to carry out now; None when nothing can be done before something changes, or time goes by."""
        for adapter in self.adapters.values():
            if adapter.state is AdapterState.DRAINING and adapter.running == 0:
                return self._unload(adapter)
        for adapter in self._to_load():
            if adapter.unreadable:
                continue
            if not adapter.cached:
                if not adapter.shortage:
                    return Fetch(adapter.digest, adapter.model, adapter.source)
                continue
            action = self._make_room(adapter, free_columns, now_s)
            if action:
                return action
        return None

    def fetched(self, digest: str, columns: int) -> None:
        """Its files are here and it needs this many columns."""
        adapter = self.adapters[digest]
        adapter.cached, adapter.columns = True, columns
        if columns > self.max_columns:
            adapter.refusal = f"it needs {columns} columns, the endpoint has {self.max_columns} (engine.lora_columns)."
        elif columns > self.max_rank:
            adapter.refusal = (
                f"it has rank {columns}, the endpoint takes {self.max_rank} at most (engine.vllm.max_rank, which "
                "engine.lora_columns must hold)."
            )

    def loaded(self, digest: str, columns: int, now_s: float) -> None:
        """It is resident and owns this many columns; labels that mean it now flip to it."""
        adapter = self.adapters[digest]
        self._clock += 1
        adapter.resident, adapter.columns, adapter.last_used = True, columns, self._clock
        adapter.loaded_at_s = now_s
        adapter.fresh, adapter.read, adapter.shortage = False, False, ""
        self._settle()

    def unloaded(self, digest: str) -> None:
        """Its columns are free: it is evicted (cached) or, if withdrawn, gone."""
        adapter = self.adapters[digest]
        adapter.resident = adapter.unloading = adapter.closing = False
        self._settle()

    def still_in_use(self, digest: str) -> None:
        """The engine has not quite finished with it: the Unload did not happen and comes again."""
        self.adapters[digest].unloading = False

    def short(self, digest: str, reason: str) -> None:
        """It cannot be fetched or loaded just now, for this reason: it is tried again after the next change or poll."""
        self.adapters[digest].shortage = reason

    def unread(self, digest: str, reason: str) -> None:
        """The store does not give its files just now: as `short`, and nobody is moved for it meanwhile."""
        adapter = self.adapters[digest]
        adapter.shortage, adapter.unreadable, adapter.read = reason, True, False

    def refuse(self, digest: str, reason: str) -> None:
        """It cannot be served, for this reason, until it is withdrawn."""
        self.adapters[digest].refusal = reason

    def serving(self) -> dict[str, str]:
        """The digest that answers to each label now; a label whose first version still loads is left out."""
        answering = {label: self._answering(entry.digest, label) for label, entry in self._labels.items()}
        return {label: adapter.digest for label, adapter in answering.items() if adapter.available}

    def _answering(self, digest: str, label: str | None) -> Adapter:
        adapter = self.adapters.get(digest)
        if (
            adapter is None or not adapter.wanted
        ) and label in self._labels:  # swapped while the request was on its way
            adapter = self.adapters.get(self._labels[label].digest)
        if adapter is None or not adapter.wanted:
            raise NotFoundError(
                "the adapter was withdrawn while the request was on its way. GET /v1/models lists what is."
            )
        old = self._previous.get(label) if label else None
        if old is None or adapter.available or not self._is_available(old.digest):
            return adapter
        same_family = ModelRef.parse(old.model).family == ModelRef.parse(adapter.model).family
        return self.adapters[old.digest] if same_family else adapter

    def _unload(self, adapter: Adapter) -> Unload:
        adapter.unloading = True
        return Unload(adapter.digest)

    def _to_load(self) -> list[Adapter]:
        """Wanted and not resident: those that requests wait for first, then new ones; never those evicted for others."""
        absent = [a for a in self.adapters.values() if a.wanted and not a.resident and not a.refusal]
        return sorted((a for a in absent if a.waiting or a.fresh), key=lambda a: (a.waiting == 0, a.waiting_since))

    def _make_room(self, adapter: Adapter, free_columns: int, now_s: float) -> Action | None:
        """Load it, or read it and evict one that is not in use if that can make enough room, or end turns, or leave it pending."""
        if adapter.columns <= free_columns and not adapter.shortage:
            return Load(adapter.digest)
        short_by = max(1, adapter.columns - free_columns)
        movable = [a for a in self.adapters.values() if a.resident and not a.pinned]
        # One that was just loaded for a waiting request is not idle: else two that are waited for evict each other.
        idle = [a for a in movable if a.running == 0 and (a.waiting == 0 or a.closing)]
        can_evict = sum(a.columns for a in idle) >= short_by
        if not can_evict and adapter.waiting and self._could_fit(adapter):
            short_by -= sum(a.columns for a in movable if a.closing or a in idle)
            turns = [a for a in movable if not a.closing and a not in idle and now_s - a.loaded_at_s >= SLICE_S]
            for one in sorted(turns, key=lambda a: a.loaded_at_s):
                if short_by > 0:
                    one.closing = True
                    short_by -= one.columns
        if not adapter.read:
            adapter.read = True
            return Read(adapter.digest)
        if can_evict:
            return self._unload(min(idle, key=lambda a: (not a.closing, a.last_used)))
        adapter.shortage = f"needs {adapter.columns} columns, {free_columns} free"
        return None

    def _could_fit(self, adapter: Adapter) -> bool:
        """Whether it could be resident if everything that is not pinned went. Its columns are 0 until they are known."""
        return adapter.pinned or adapter.columns <= self._unpinned_columns()

    def _unpinned_columns(self) -> int:
        return self.max_columns - sum(a.columns for a in self.adapters.values() if a.pinned and a.resident)

    def _settle(self) -> None:
        """After any change: end finished swaps, mark what is wanted, forget what is gone, let the pending try again."""
        for label, old in list(self._previous.items()):
            entry = self._labels.get(label)
            if entry is None or self._is_available(entry.digest) or not self._is_available(old.digest):
                del self._previous[label]
        kept = {entry.digest for entry in (*self._labels.values(), *self._previous.values())}
        in_line = any(a.waiting and not a.resident and self._could_fit(a) for a in self.adapters.values())
        for digest, adapter in list(self.adapters.items()):
            adapter.closing &= in_line  # nobody to make room for any more
            adapter.wanted = digest in kept
            adapter.shortage, adapter.unreadable = "", False
            if adapter.state is AdapterState.GONE:
                del self.adapters[digest]

    def _is_available(self, digest: str) -> bool:
        return digest in self.adapters and self.adapters[digest].available
