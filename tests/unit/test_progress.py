"""What a terminal shows of a run's metrics."""

from __future__ import annotations

import io
import math
from pathlib import Path

from rich.console import Console

from service.logs import LogWriter
from service.runs import Run
from service.training.progress import ProgressView


def test_a_held_out_loss_that_is_not_a_number_is_shown_and_ends_nothing(tmp_path: Path) -> None:
    run = Run.create(str(tmp_path), "small", "x", {})
    log = LogWriter(run.path("metrics"), "a1-r0", flush_every_s=math.inf)
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        log.append({"step": 1, "train/loss": 2.5, "eval/loss": math.nan})
        log.flush()
        with ProgressView(run, 9, console) as view:  # the row is what an earlier attempt left
            log.append({"step": 2, "train/loss": math.inf, "eval/loss": 1.25})
            log.flush()
            assert [row["step"] for row in view.poll()] == [2]
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "held-out loss nan" in shown and "held-out loss 1.2500" in shown
