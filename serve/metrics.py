"""What Prometheus reads of an endpoint: requests as the gateway sees them, slots and adapters as the replicas report them.

Labels are few on purpose: `model` is the version that answered, `split` and `arm` say why. There are at most MAX_SERIES of
them: a new one takes the place of the one that was idle for longest, or counts as "other" while all are in use.
`gateway.py` calls this; no HTTP here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily

from serve.desired import ReplicaReport
from serve.parts import Counts, Part, Started
from service.errors import WorkerLostError

MAX_SERIES = 200
_LABELS = ("model", "split", "arm")
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_GAP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Series = tuple[str, str, str]
OTHER: Series = ("other", "", "")


class Metrics:
    """One gateway's numbers. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._in_flight: dict[Series, int] = {}  # of every series, the one that began a request last at the end
        made: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("loray_requests", "Requests by how they ended.", (*_LABELS, "end"), **made)
        self._prompt = Counter("loray_prompt_tokens", "Tokens of prompts.", _LABELS, **made)
        self._cached = Counter("loray_cached_prompt_tokens", "Of these, not computed again.", _LABELS, **made)
        self._tokens = Counter("loray_completion_tokens", "Tokens of answers.", _LABELS, **made)
        self._keyless = Counter("loray_keyless_requests", "Requests to a split without a key.", ("split",), **made)
        self._refused = Counter(
            "loray_refused_requests", "Requests refused before anybody answered.", ("status",), **made
        )
        self._again = Counter("loray_requests_sent_again", "Requests of a lost replica, asked of another.", **made)
        self._running = Gauge("loray_requests_in_flight", "Requests being answered.", _LABELS, **made)
        self._first = Histogram("loray_time_to_first_token_seconds", "", _LABELS, buckets=_TTFT_S, **made)
        self._gaps = Histogram(
            "loray_inter_token_seconds", "Between parts, per token.", _LABELS, buckets=_GAP_S, **made
        )
        self._whole = Histogram(
            "loray_request_seconds", "From request to last token.", _LABELS, buckets=_WHOLE_S, **made
        )

    def keyless(self, split: str) -> None:
        """A request to this split carried none of its keys."""
        self._keyless.labels(split).inc()

    def refused(self, status: int) -> None:
        """A request was answered with an error before it had begun."""
        self._refused.labels(str(status)).inc()

    def sent_again(self) -> None:
        """A request's replica was lost before anything had gone out, and another is asked."""
        self._again.inc()

    def now(self) -> float:
        """The clock, in seconds."""
        return self._clock()

    def observed(
        self, stream: Any, started: Started, series: Series, since: float, n: int = 1, *, may_be_lost: bool = False
    ) -> Observed:
        """The stream of `n` answers to each prompt, counted as it passes. One that `may_be_lost` is no error then."""
        if series not in self._in_flight and len(self._in_flight) >= MAX_SERIES and not self._forget_one():
            series = OTHER
        self._in_flight[series] = self._in_flight.pop(series, 0) + 1
        return Observed(self, stream, started, series, since, n, may_be_lost=may_be_lost)

    def ended(self, series: Series) -> None:
        """One of the streams of this series has ended."""
        self._in_flight[series] -= 1

    def _forget_one(self) -> bool:
        """Forget the series that was idle for longest; False where each has a request in flight."""
        idle = next((series for series, running in self._in_flight.items() if not running and series != OTHER), None)
        if idle is None:
            return False
        del self._in_flight[idle]
        counters = (self._requests, self._prompt, self._cached, self._tokens)
        for metric in (*counters, self._running, self._first, self._gaps, self._whole):
            metric.remove_by_labels(dict(zip(_LABELS, idle, strict=True)))
        return True

    def text(self, reports: Sequence[ReplicaReport]) -> bytes:
        """All of it in Prometheus' text format, with what the live replicas report."""
        return generate_latest(self._registry) + generate_latest(_Replicas(reports))


class Observed:
    """A stream of parts that counts what passes. `cancel` is the stream's."""

    def __init__(
        self,
        metrics: Metrics,
        stream: Any,
        started: Started,
        series: Series,
        since: float,
        n: int,
        *,
        may_be_lost: bool,
    ) -> None:
        self._metrics, self._stream, self._series, self._since = metrics, stream, series, since
        self._may_be_lost = may_be_lost
        self._open = True
        self._counts = Counts(started, n)
        metrics._running.labels(*series).inc()

    def cancel(self) -> None:
        """The caller wants no more; what had not ended by then was cancelled."""
        self._stream.cancel()
        self._end("cancelled")

    async def __aiter__(self) -> AsyncIterator[Part]:
        m, series = self._metrics, self._series
        last: dict[int, float] = {}  # by answer
        m._prompt.labels(*series).inc(self._counts.num_prompt_tokens)
        try:
            async for part in self._stream:
                now = m.now()
                if part.num_tokens:
                    if part.choice in last:
                        m._gaps.labels(*series).observe((now - last[part.choice]) / part.num_tokens)
                    elif not last:
                        m._first.labels(*series).observe(now - self._since)
                    last[part.choice] = now
                    m._tokens.labels(*series).inc(part.num_tokens)
                self._counts.add(part)
                if part.finish_reason in ("error", "cancelled"):
                    self._end(str(part.finish_reason))
                yield part
        except Exception as error:
            self._end("lost" if self._may_be_lost and isinstance(error, WorkerLostError) else "error")
            raise
        m._cached.labels(*series).inc(self._counts.num_cached_tokens)
        self._end("ok")

    def _end(self, how: str) -> None:
        if self._open:
            self._open = False
            m = self._metrics
            m._running.labels(*self._series).dec()
            m.ended(self._series)
            m._requests.labels(*self._series, how).inc()
            if how == "ok":
                m._whole.labels(*self._series).observe(m.now() - self._since)


class _Replicas:
    """The replicas' reports as gauges."""

    def __init__(self, reports: Sequence[ReplicaReport]) -> None:
        self._reports = reports

    def collect(self) -> list[GaugeMetricFamily]:
        """prometheus_client's interface of a collector."""
        wanted = {
            "running": "Requests let in.",
            "waiting": "Requests that wait for a slot.",
            "slots": "Requests that can run at once.",
            "free_columns": "Rank that is free for adapters.",
            "max_columns": "Rank that adapters can have together.",
            "prefix_bytes": "Memory that holds prompts seen before.",
            "epoch": "The desired state that it has taken over.",
        }
        families = []
        for field, help_text in wanted.items():
            family = GaugeMetricFamily(f"loray_replica_{field}", help_text, labels=("replica",))
            for report in self._reports:
                family.add_metric([report.replica], getattr(report, field))
            families.append(family)
        states = GaugeMetricFamily("loray_replica_adapters", "Adapters by state.", labels=("replica", "state"))
        for report in self._reports:
            found = [adapter.state for adapter in report.adapters.values()]
            for state in sorted(set(found)):
                states.add_metric([report.replica, state], found.count(state))
        return [*families, states]
