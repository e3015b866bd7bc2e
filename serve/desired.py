"""What an endpoint should serve and what its replicas do serve, as files under `LORAY_HOME/endpoints/<endpoint>/`.

`desired.json` is changed by compare-and-swap (the gateway) and polled (the replicas); its epoch grows with every change.
`replicas/<id>.json` is written by that replica alone. This is the storage edge of `serve/`: what follows from these
values is decided in `routing.py` and `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.routing import Registered, Split
from service import storage
from service.errors import ConflictError, NotFoundError, StorageError

HEARTBEAT_EVERY_S = 3.0
# Five missed heartbeats: a replica that is only slow to write is not taken for dead.
HEARTBEAT_LIMIT_S = 15.0
_ATTEMPTS = 20


@dataclass(frozen=True)
class Base:
    """The base model of an endpoint, as all its processes must see it. `source` is what `resolve_base_model` takes."""

    name: str
    source: str
    revision: str | None
    chat_template: str | None  # its text, not its path
    digest: str
    renderer_digest: str


class Desired(BaseModel):
    """The content of `desired.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    adapters: dict[str, Registered] = {}
    splits: dict[str, Split] = {}


class AdapterReport(BaseModel):
    """One adapter on one replica. `state` is a word of `adapters.AdapterState`, `detail` its reason where it has one."""

    model_config = ConfigDict(frozen=True)

    model: str
    state: str
    detail: str = ""
    running: int = 0
    columns: int = 0  # of the bank: its rank
    bytes: int = 0  # of its matrices in the engine; 0 while it is not resident


class ReplicaReport(BaseModel):
    """The content of `replicas/<id>.json`. `epoch` is the last desired state it has seen; adapters are by digest."""

    model_config = ConfigDict(frozen=True)

    replica: str
    heartbeat_at: float  # seconds since 1970, by the replica's clock
    epoch: int
    base_digest: str
    running: int = 0
    waiting: int = 0
    prefix_bytes: int = 0
    slots: int = 0
    free_columns: int = 0
    max_columns: int = 0
    serving: dict[str, str] = {}  # label -> digest that answers to it now
    adapters: dict[str, AdapterReport] = {}


@dataclass
class _Seen:
    """The newest epoch that this process has read or written."""

    epoch: int = 0


@dataclass(frozen=True)
class EndpointFiles:
    """The files of one endpoint. A desired state that goes back is a StorageError: storage that is away can look empty."""

    home: str
    endpoint: str
    _seen: _Seen = field(default_factory=_Seen, repr=False, compare=False)

    def read(self) -> Desired:
        """The desired state; empty, epoch 0, before anything was registered."""
        return self._read_tagged()[0]

    def change(self, edit: Callable[[Desired], Desired]) -> Desired:
        """Write what `edit` makes of the desired state, by compare-and-swap; once more, afresh, when somebody was first.

        What `edit` is given has the next epoch already.
        """
        for _ in range(_ATTEMPTS):
            desired, tag = self._read_tagged()
            changed = edit(desired.model_copy(update={"epoch": desired.epoch + 1}))
            try:
                storage.compare_and_swap(self._desired, changed.model_dump_json(indent=1).encode(), tag)
            except ConflictError:
                continue
            self._seen.epoch = max(self._seen.epoch, changed.epoch)
            return changed
        raise ConflictError(f"{self._desired} was changed by others {_ATTEMPTS} times in a row. Try again.")

    def write_report(self, report: ReplicaReport) -> None:
        """Publish a replica's own state."""
        storage.write_bytes(self._report(report.replica), report.model_dump_json().encode())

    def delete_report(self, replica: str) -> None:
        """A replica that ends takes its state away; one that was killed leaves a heartbeat that stops."""
        storage.delete_tree(self._report(replica))

    def reports(self) -> list[ReplicaReport]:
        """Every replica's last state, the dead ones' too."""
        directory = storage.join(self.home, "endpoints", self.endpoint, "replicas")

        def read(name: str) -> ReplicaReport | None:
            try:
                return _parsed(ReplicaReport, storage.read_bytes(storage.join(directory, name)), name)
            except NotFoundError:
                return None  # ended between listing and reading

        found = storage.read_together(read, storage.list_names(directory), self.home)
        return [report for report in found if report is not None]

    def live_reports(self, now_s: float) -> list[ReplicaReport]:
        """The state of the replicas whose heart still beats."""
        return live(self.reports(), now_s)

    @property
    def _desired(self) -> str:
        return storage.join(self.home, "endpoints", self.endpoint, "desired.json")

    def _report(self, replica: str) -> str:
        return storage.join(self.home, "endpoints", self.endpoint, "replicas", f"{replica}.json")

    def _read_tagged(self) -> tuple[Desired, str | None]:
        desired, tag, seen = Desired(), None, self._seen.epoch  # others may see a newer one while this is read
        try:
            data, tag = storage.read_tagged(self._desired)
            desired = _parsed(Desired, data, self._desired)
        except NotFoundError:
            pass
        if desired.epoch < seen:
            now = "is not there" if tag is None else f"is at {desired.epoch}"
            raise StorageError(
                f"{self._desired} was at epoch {seen} and {now}, and epochs only grow: is LORAY_HOME still the storage that "
                "it was (a mount that is away looks empty)? Where the file was removed on purpose, restart the endpoint."
            )
        self._seen.epoch = max(self._seen.epoch, desired.epoch)
        return desired, tag


def live(reports: Sequence[ReplicaReport], now_s: float) -> list[ReplicaReport]:
    """Those of which the heart still beat at this time."""
    return [report for report in reports if now_s - report.heartbeat_at < HEARTBEAT_LIMIT_S]


ContentT = TypeVar("ContentT", bound=BaseModel)


def _parsed(model: type[ContentT], data: bytes, name: str) -> ContentT:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        raise StorageError(
            f"{name} is no {model.__name__}: {problem['msg']} at {'.'.join(map(str, problem['loc'])) or 'the top'}. "
            "Delete it, restart the endpoint, and register the adapters again."
        ) from None
