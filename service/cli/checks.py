"""`loray doctor`: the checks of `service/doctor.py`, made here or inside a cluster, for a person or a machine."""

from __future__ import annotations

import dataclasses
import json as json_format
import os

from service import launcher
from service.cli.terminal import console, print_json
from service.cli.training import FORWARDED
from service.errors import ClusterError
from service.settings import load_settings


def doctor(address: str | None, workers: int, *, json: bool) -> bool:
    """Print what was found; whether all is good. Raises ClusterError when the cluster cannot be asked."""
    from service.doctor import Check, as_table, examine

    if address is None:
        launcher.connect()
        checks = examine(load_settings(), workers)
    else:
        env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        log = launcher.run_doctor(address, workers, env_vars)
        try:
            checks = [Check(**check) for check in json_format.loads(log.strip().splitlines()[-1])]
        except (IndexError, ValueError, TypeError):
            raise ClusterError(f"the cluster at {address} could not be examined:\n{log[-2000:]}") from None
    if json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        console.print(as_table(checks))
    return all(check.ok for check in checks)
