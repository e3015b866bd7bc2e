"""A run that goes on from another run's checkpoint, with other rates: what population-based training does.

The new run gets the checkpoint as its own, and the metrics and the ledger up to there, as those of attempt 0: its curve and
its draws are whole. What changes the shapes, the rows or their order cannot differ; loading the checkpoint checks that.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from service import storage
from service.config import ResolvedRun
from service.errors import NotFoundError, StorageError
from service.logs import LogWriter
from service.runs import Run
from service.training import checkpoint_index as layout
from service.training.checkpoint_index import Identity, NotWholeError

WRITER = "a0-r0"
COPIES = 3  # the donor trains on, and may prune what is being copied: then its next checkpoint is taken


def adopt(donor: Run, step: int, run_id: str, name: str, resolved: ResolvedRun) -> tuple[Run, int]:
    """A new run of `resolved` that begins at the donor's checkpoint of `step`, or the next one that is still there.

    The run and the step. Raises StorageError where the donor has none.
    """
    run = Run.create(donor.home, name, resolved.text, resolved.as_json(), id=run_id)
    config = resolved.config.model_dump(mode="json", by_alias=True)
    failure: Exception | None = None
    for attempt in range(COPIES):
        time.sleep(attempt)  # one may be on its way
        for there in [s for s in layout.steps_of(donor.uri) if s >= step]:
            try:
                _copy_checkpoint(donor, there, run, config)
            except (NotFoundError, StorageError, NotWholeError) as error:
                failure = error
                continue
            _copy_logs(donor, there, run)
            return run, there
    raise StorageError(f"run {donor.id} has no whole checkpoint from step {step} on to go on from: {failure}")


def _copy_checkpoint(donor: Run, step: int, run: Run, config: dict[str, object]) -> None:
    """The index last, with the config of its new run."""
    source, target = layout.directory_of(donor.uri, step), layout.directory_of(run.uri, step)
    index = layout.read_index(source)
    with tempfile.TemporaryDirectory(prefix="loray-adopt-") as aside:
        for file, entry in index.files.items():
            local = Path(aside) / file
            storage.fetch_file(storage.join(source, file), local, entry)
            storage.put_file(local, storage.join(target, file))
    identity = Identity(config, index.identity.base_digest, index.identity.train_digest)
    own = index.model_copy(update={"identity": identity})
    storage.write_bytes(storage.join(target, layout.INDEX), own.to_bytes())


def _copy_logs(donor: Run, step: int, run: Run) -> None:
    """Up to `step`. Tokens are left out: the donor has spent them."""
    with LogWriter(run.path("metrics"), WRITER) as metrics:
        for row in donor.metrics():
            if row["step"] <= step:
                metrics.append({name: value for name, value in row.items() if name != "train/tokens"})
    with LogWriter(run.path("ledger"), WRITER) as ledger:
        for row in donor.ledger():
            if row["step"] <= step:
                ledger.append(row)
