"""What Prometheus reads: counted as it passes, by version and arm, with a bounded number of labels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.desired import AdapterReport, ReplicaReport
from serve.metrics import MAX_SERIES, Metrics
from serve.parts import Part, Started

STARTED = Started("tickets@1", "d1", 7)
SERIES = ("tickets@1", "tickets", "control")


class Stream:
    """Parts that come a second apart, by a clock of its own."""

    def __init__(self, *parts: Part, error: Exception | None = None) -> None:
        self.parts, self.error, self.now_s, self.cancelled = parts, error, 100.0, False

    async def __aiter__(self) -> AsyncIterator[Part]:
        for part in self.parts:
            self.now_s += 1.0
            yield part
        if self.error:
            raise self.error

    def cancel(self) -> None:
        self.cancelled = True


def _values(metrics: Metrics, *reports: ReplicaReport) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.text(reports).decode())
    order = ("model", "split", "arm", "end", "status", "replica", "state")
    return {
        (sample.name, *(sample.labels[name] for name in order if name in sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


async def _read(stream: Stream, metrics: Metrics, take: int = 99) -> None:
    observed = metrics.observed(stream, STARTED, SERIES, since=99.5)
    try:
        async for _ in observed:
            take -= 1
            if not take:
                break
    finally:
        observed.cancel()


def test_tokens_latencies_and_ends_are_counted_by_version_and_arm() -> None:
    stream = Stream(Part(0, "a", 1, num_cached_tokens=4), Part(0, "bc", 2), Part(0, "", 1, "stop", num_cached_tokens=4))
    metrics = Metrics(lambda: stream.now_s)
    asyncio.run(_read(stream, metrics))
    values = _values(metrics)
    expected = {
        "loray_requests_total": 1, "loray_prompt_tokens_total": 7, "loray_cached_prompt_tokens_total": 4,
        "loray_completion_tokens_total": 4, "loray_requests_in_flight": 0, "loray_request_seconds_sum": 3.5,
        "loray_time_to_first_token_seconds_sum": 1.5, "loray_inter_token_seconds_sum": 0.5 + 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        labels = (*SERIES, "ok") if name == "loray_requests_total" else SERIES
        assert values[(name, *labels)] == pytest.approx(value), name
    assert stream.cancelled


def test_each_request_ends_once_and_as_it_did() -> None:
    clients_that_left, errors = Metrics(), Metrics()
    asyncio.run(_read(Stream(Part(0, "a", 1), Part(0, "b", 1)), clients_that_left, take=1))
    asyncio.run(_read(Stream(Part(0, "a", 1), Part(0, "", 0, "error", "broken")), errors))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(_read(Stream(Part(0, "a", 1), error=ZeroDivisionError()), errors))
    ends = {name[-1]: value for name, value in _values(clients_that_left).items() if name[0] == "loray_requests_total"}
    assert ends == {"cancelled": 1}
    ends = {name[-1]: value for name, value in _values(errors).items() if name[0] == "loray_requests_total"}
    assert ends == {"error": 2}
    assert _values(errors)[("loray_requests_in_flight", *SERIES)] == 0


def test_the_number_of_labels_is_bounded() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES + 50):
        metrics.observed(Stream(), STARTED, (f"m@{number}", "", ""), since=0.0)
    models = {name[1] for name in _values(metrics) if name[0] == "loray_requests_in_flight"}
    assert len(models) == MAX_SERIES + 1 and "other" in models  # all of them are in flight


def test_a_new_version_takes_the_place_of_the_one_that_was_idle_for_longest() -> None:
    metrics = Metrics()
    running = metrics.observed(Stream(), STARTED, ("m@0", "", ""), since=0.0)
    for number in range(1, MAX_SERIES + 51):
        metrics.observed(Stream(), STARTED, (f"m@{number}", "", ""), since=0.0).cancel()
    values = _values(metrics)
    newest = {"m@0", *(f"m@{number}" for number in range(52, MAX_SERIES + 51))}
    assert {name[1] for name in values if name[0] == "loray_requests_in_flight"} == newest
    assert {name[1] for name in values if name[0] == "loray_requests_total"} == newest - {"m@0"}
    running.cancel()
    assert _values(metrics)[("loray_requests_in_flight", "m@0", "", "")] == 0


def test_replicas_refusals_and_keyless_requests_are_told() -> None:
    metrics = Metrics()
    metrics.refused(404)
    metrics.keyless("tickets")
    adapters = {
        str(i): AdapterReport(model="m@1", state=state) for i, state in enumerate(("resident", "resident", "pending"))
    }
    report = ReplicaReport(
        replica="r1", heartbeat_at=0.0, epoch=3, base_digest="b", running=2, waiting=5, slots=4, adapters=adapters
    )
    values = _values(metrics, report)
    assert values[("loray_refused_requests_total", "404")] == values[("loray_keyless_requests_total", "tickets")] == 1
    assert values[("loray_replica_running", "r1")] == 2 and values[("loray_replica_waiting", "r1")] == 5
    assert values[("loray_replica_adapters", "r1", "resident")] == 2
    assert values[("loray_replica_adapters", "r1", "pending")] == 1
