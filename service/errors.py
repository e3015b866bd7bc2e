"""Every error that loray raises on purpose, drawn as one tree.

    LorayError
    ├── ConfigError       (ValueError)        a run file, a serve file, a setting or a command-line value
    ├── DataError         (ValueError)        a data file: names the row and the field
    ├── ModelError        (ValueError)        a base model, an adapter, or the two together
    │   └── GateError                         what was saved is not what was trained
    ├── NotFoundError     (LookupError)       a name that nothing answers to: names the known ones
    ├── ConflictError     (FileExistsError)   somebody else was first, or something still points here
    ├── RequestError      (ValueError)        an HTTP request's own mistake: carries the field
    ├── BusyError         (RuntimeError)      as much is in line as is taken: the same may be taken later
    ├── StorageError      (OSError)           bytes could not be read, written or verified
    ├── ClusterError      (RuntimeError)      Ray: address, authentication, resources
    │   └── WorkerLostError                   a worker or its node died: trying again may help
    └── TrainingError     (RuntimeError)      a run that cannot go on: names the step and the rows
        └── OutOfMemoryError                  the micro-batch does not fit a worker

A message says what was wrong, the value seen, the value wanted, and what to do next. Each class also inherits its
standard-library twin and survives pickling, because Ray carries exceptions between processes. Only `serve/` turns them
into HTTP statuses. This file imports nothing.
"""

from __future__ import annotations


class LorayError(Exception):
    """Base of the tree: catch it to catch everything loray reports to a user."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(LorayError, ValueError):
    """All the problems of one configuration, one a line."""


class DataError(LorayError, ValueError):
    """A data file that cannot be used as it is: file, row and field are in the message."""


class ModelError(LorayError, ValueError):
    """A base model or adapter that cannot be used, alone or with the other."""


class GateError(ModelError):
    """The saved model does not reproduce the trained one: never published."""


class NotFoundError(LorayError, LookupError):
    """No run, model, version, alias or adapter answers to this name."""


class ConflictError(LorayError, FileExistsError):
    """The thing exists already, changed meanwhile, or is still in use."""


class RequestError(LorayError, ValueError):
    """A request that cannot be served as it stands. `param` is the field of the body, as OpenAI names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str | None]]:
        return (type(self), (self.message, self.param))


class BusyError(LorayError, RuntimeError):
    """As many requests are running or in line as are taken; nothing is wrong with this one, and nothing is broken."""


class StorageError(LorayError, OSError):
    """Reading, writing or verifying bytes failed; nothing half-written is visible."""


class ClusterError(LorayError, RuntimeError):
    """Ray cannot do what was asked: unreachable, unauthenticated or too small."""


class WorkerLostError(ClusterError):
    """The process that worked on it was killed, or its node went away; nothing in the run or request itself was wrong."""


class TrainingError(LorayError, RuntimeError):
    """Training cannot go on from here: the step and the rows are in the message."""


class OutOfMemoryError(TrainingError):
    """A micro-batch of `micro` sequences did not fit a worker's memory: half of it is tried next."""

    def __init__(self, message: str, micro: int) -> None:
        super().__init__(message)
        self.micro = micro

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str, int]]:
        return (type(self), (self.message, self.micro))
