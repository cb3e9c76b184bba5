# SPDX-License-Identifier: Apache-2.0
"""The profiler's own metrics, for the application's `MeterProvider`; see docs/metrics.md.

Observable instruments only: they cost nothing until a reader collects. The API cannot take an
instrument back, so they are made once for the process, and report nothing while nothing runs.
Without a `MeterProvider` the API keeps them and never calls back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation

    from .stats import RunStats

logger = logging.getLogger(__name__)

METER_NAME: Final = "otel_proflink"
#: of `proflink.export.attempts`: ``success`` or ``failure``
RESULT: Final = "proflink.export.result"

_NS: Final = 1e-9
_Kind = Literal["counter", "up_down_counter", "gauge"]
#: What counts on from one run of the profiler to the next; the rest is as it is now.
_NOT_COUNTED: Final = frozenset({"threads", "period_ns", "state_guesses", "cpu_timer"})
#: Takes longer than the rest, so it is asked for only where it is wanted.
_MEMORY: Final = "memory_bytes"


@dataclass(frozen=True, slots=True)
class _Metric:
    name: str
    unit: str
    description: str
    #: keys of `ProfilerStats`, with the attributes under which each is reported
    keys: Mapping[str, Mapping[str, str]]
    kind: _Kind = "counter"


def _one(name: str, unit: str, description: str, key: str, kind: _Kind = "counter") -> _Metric:
    return _Metric(name, unit, description, {key: {}}, kind)


METRICS: Final = (
    _one("proflink.sampler.ticks", "{tick}", "Looks at all threads.", "ticks"),
    _one(
        "proflink.sampler.late_ticks",
        "{tick}",
        "Ticks that began more than half a period late.",
        "late_ticks",
    ),
    _one("proflink.sampler.snapshots", "{snapshot}", "Threads read.", "snapshots"),
    _one(
        "proflink.sampler.retries",
        "{retry}",
        "Readings thrown away because the thread ran on meanwhile.",
        "retries",
    ),
    _one(
        "proflink.sampler.give_ups",
        "{sample}",
        "Samples without a stack, because every reading was thrown away.",
        "give_ups",
    ),
    _one(
        "proflink.sampler.unknown_labels",
        "{sample}",
        "Samples whose span could not be told.",
        "unknown_labels",
    ),
    _one(
        "proflink.sampler.read_errors",
        "{error}",
        "Reads of memory that was not there.",
        "read_errors",
    ),
    _one(
        "proflink.sampler.table_overflows",
        "{entry}",
        "Things that a profile had no room for.",
        "table_overflows",
    ),
    _one(
        "proflink.sampler.threads",
        "{thread}",
        "Threads that are sampled.",
        "threads",
        "up_down_counter",
    ),
    _one(
        "proflink.sampler.memory.usage",
        "By",
        "Memory of the sampler's tables and the links.",
        _MEMORY,
        "up_down_counter",
    ),
    _one(
        "proflink.sampler.cpu.time",
        "s",
        "CPU time of the sampler's thread.",
        "sampler_cpu_ns",
    ),
    _one(
        "proflink.sampler.cpu.unattributed",
        "s",
        "CPU time of threads that ended before any sample caught them running.",
        "cpu_not_sampled_ns",
    ),
    _one(
        "proflink.sampler.period",
        "s",
        "Time between two ticks.",
        "period_ns",
        "gauge",
    ),
    _Metric(
        "proflink.export.attempts",
        "{attempt}",
        "Attempts to bring a batch to its destination.",
        {"exports_ok": {RESULT: "success"}, "exports_failed": {RESULT: "failure"}},
    ),
    _one("proflink.export.dropped", "{batch}", "Batches given up.", "exports_dropped"),
    _one(
        "proflink.export.spans.dropped",
        "{span}",
        "Ended spans that found no room in the queue to the capture.",
        "spans_dropped",
    ),
    _one(
        "proflink.export.files.dropped",
        "{file}",
        "Files removed by the capture directory's caps.",
        "files_dropped",
    ),
    _one(
        "proflink.export.errors",
        "{error}",
        "Mistakes of the exporter itself.",
        "exporter_errors",
    ),
    _one(
        "proflink.export.cpu.time",
        "s",
        "CPU time of the exporter's thread.",
        "exporter_cpu_ns",
    ),
)


class Observed(Protocol):
    """What the metrics are of. Neither waits for anybody."""

    def stats(self) -> RunStats:
        """The counters of this run."""

    def memory_bytes(self) -> int:
        """Bytes that it takes up now."""


class SelfMetrics:
    """Makes the instruments, and says what they observe.

    Args:
        running: gives what runs in this process, None while nothing does. Called from any thread,
            with whatever locks the `MeterProvider` holds: takes none.
    """

    def __init__(self, running: Callable[[], Observed | None]) -> None:
        self._running = running
        #: what runs of the profiler that are over have counted, in this process
        self._before: Mapping[str, int] = {}
        self._made = False
        self._lock = threading.Lock()

    def offer(self) -> None:
        """Make the instruments, once for the process. On the caller's thread, not on one of ours.

        A fork in the middle, on another thread, would leave the child with the API's locks held.
        """
        with self._lock:
            if self._made:
                return
            self._made = True
        try:
            self._make()
        except Exception:
            logger.debug("no metrics of the profiler itself", exc_info=True)

    def finished(self, stats: RunStats) -> None:
        """A run is over: the next one counts on from there, for counters must not go back."""
        before = dict(self._before)
        for key, value in stats.items():
            if key not in _NOT_COUNTED and isinstance(value, int):
                before[key] = before.get(key, 0) + value
        self._before = before

    def forget(self) -> None:
        """In a forked child: the parent's figures are the parent's."""
        self._before = {}
        self._lock = threading.Lock()

    def _make(self) -> None:
        from opentelemetry import metrics

        from . import __version__

        meter = metrics.get_meter(METER_NAME, __version__)
        make = {
            "counter": meter.create_observable_counter,
            "up_down_counter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for metric in METRICS:
            make[metric.kind](
                metric.name,
                callbacks=[self._callback(metric, metrics.Observation)],
                unit=metric.unit,
                description=metric.description,
            )

    def _callback(
        self, metric: _Metric, observation: type[Observation]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            try:
                return [
                    observation(value, attributes) for value, attributes in self._values(metric)
                ]
            except Exception:
                logger.debug("the profiler's own figures cannot be told", exc_info=True)
                return ()

        return observe

    def _values(self, metric: _Metric) -> list[tuple[float, Mapping[str, str]]]:
        before = self._before
        running = self._running()
        if running is None:
            return []
        figures: Mapping[str, object]
        figures = {_MEMORY: running.memory_bytes()} if _MEMORY in metric.keys else running.stats()
        if before is not self._before:
            return []  # another run, or another process, has begun meanwhile
        values: list[tuple[float, Mapping[str, str]]] = []
        for key, attributes in metric.keys.items():
            value = figures.get(key)
            if isinstance(value, int):
                total = value + before.get(key, 0)
                values.append((total * _NS if metric.unit == "s" else total, attributes))
        return values
