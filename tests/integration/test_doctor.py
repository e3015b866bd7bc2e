"""`loray doctor` on a real cluster, and on storage that nodes do not share."""

from __future__ import annotations

import json

from tests.integration.place import Place, base, place

__all__ = ["base", "place"]  # fixtures


def test_a_good_cluster_passes_every_check_with_a_figure(place: Place) -> None:
    checks = json.loads(place.loray("doctor", "--workers", "2", "--json"))
    assert {check["name"] for check in checks} == {
        "versions", "shared storage", "disk", "memory", "shared memory", "workers", "collectives"
    }  # fmt: skip
    assert all(check["ok"] for check in checks), checks
    (rate,) = [check["found"] for check in checks if check["name"] == "collectives"]
    assert float(rate.split(" MB/s")[0].replace(",", "")) > 0


def test_a_cluster_that_is_too_small_is_told_with_what_to_do(place: Place) -> None:
    output = place.loray("doctor", "--workers", "64", expect=1)
    assert "64 are wanted" in output and "Add nodes" in output


def test_a_cluster_is_examined_from_inside_through_its_address(place: Place) -> None:
    output = place.loray("doctor", "--address", place.dashboard, "--json")
    checks, _ = json.JSONDecoder().raw_decode(output[output.index("[") :])
    assert all(check["ok"] for check in checks), checks
