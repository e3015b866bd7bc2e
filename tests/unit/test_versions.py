"""A manifest and an image of different versions are told apart."""

from __future__ import annotations

import importlib.metadata

from service.versions import skew


def test_pods_of_one_version_and_processes_outside_of_pods_have_nothing_to_say() -> None:
    assert skew({}) is None
    assert skew({"LORAY_MANIFEST_VERSION": importlib.metadata.version("loray")}) is None


def test_both_versions_are_named_and_what_to_change() -> None:
    told = skew({"LORAY_MANIFEST_VERSION": "9.9.9"})
    assert told and "asked for by loray 9.9.9" in told and "Take an image of 9.9.9" in told
    assert f"its image has loray {importlib.metadata.version('loray')}" in told
