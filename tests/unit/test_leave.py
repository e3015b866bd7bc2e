"""The hook that a pod runs before it goes, where there is no cluster to leave. On a real one: tests/integration/test_nodes.py."""

from __future__ import annotations

import pytest

from jobs import leave


def test_a_process_that_is_on_no_node_says_so_and_starts_no_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert leave.main(["--within", "10"]) == 1
    assert "RAY_ADDRESS is not set, so this is no node of a cluster" in capsys.readouterr().err
