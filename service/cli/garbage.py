"""`loray gc`: what nothing can reach any more. It never touches a model that readers can see, nor a run."""

from __future__ import annotations

from service.registry import Registry
from service.settings import Settings


def collect(settings: Settings, *, delete: bool) -> list[tuple[str, str]]:
    """(URI, reason) of everything collectable; deleted when `delete`."""
    registry = Registry(settings.home)
    found = [(uri, "a publisher claimed this version and never finished it") for uri in registry.unfinished()]
    if delete:
        for uri, _ in found:
            registry.discard(uri)
    return found
