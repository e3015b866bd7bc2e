"""`loray gc`: what nothing can reach any more. It never touches a model that readers can see, nor a run."""

from __future__ import annotations

from service.registry import Registry
from service.settings import Settings

ABANDONED_AFTER_S = 24 * 3600  # no upload of one model takes longer; a younger claim's publisher may be at work


def collect(settings: Settings, *, delete: bool) -> list[tuple[str, str]]:
    """(URI, reason) of everything collectable; deleted when `delete`."""
    registry = Registry(settings.home)
    reason = f"a publisher claimed this version over {ABANDONED_AFTER_S // 3600} hours ago and never finished it"
    found = [(uri, reason) for uri in registry.unfinished(ABANDONED_AFTER_S)]
    if delete:
        for uri, _ in found:
            registry.discard(uri)
    return found
