"""`loray serve`: an endpoint on this machine, from the first Ctrl-C-able second to its last running request."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn

from service import launcher
from service.cli.terminal import console
from service.config import ServeConfig
from service.settings import Settings


def serve_here(config: ServeConfig, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. A failed start takes back what it deployed, and only that. Raises LorayError."""
    launcher.prepare_environment()  # before anything imports Ray, which reads the mode once
    from serve import app as serve_app

    console.print(f"Loading {config.model.id} ...", markup=False, highlight=False)
    launcher.connect()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which takes SIGTERM when it connects
        signal.signal(number, _interrupt)
    try:
        url = serve_app.start(config, settings)
    except KeyboardInterrupt:
        console.print("Stopped before it was ready.")
        return
    try:
        console.print(f"Serving {config.model.id} at {url}/v1  (Ctrl-C stops)", markup=False, highlight=False)
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("Stopping; running requests may finish (Ctrl-C again to give up) ...")
    finally:
        serve_app.stop(config.endpoint)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
