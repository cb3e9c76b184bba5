# SPDX-License-Identifier: Apache-2.0
"""The profiler's own metrics: the instruments, and what they say when things change under them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions

from otel_proflink.self_metrics import METER_NAME, METRICS, RESULT, SelfMetrics
from otel_proflink.stats import ProfilerStats, RunStats

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Meter:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.instruments: dict[str, tuple[str, str, Any]] = {}

    def _create(self, kind: str) -> Any:
        def create(name: str, callbacks: list[Any], unit: str, description: str) -> None:
            assert name not in self.instruments
            assert description.endswith(".")
            (callback,) = callbacks
            self.instruments[name] = (kind, unit, callback)

        return create

    def __getattr__(self, name: str) -> Any:
        return self._create(name.removeprefix("create_observable_"))

    def values(self, name: str) -> list[tuple[float, dict[str, str]]]:
        callback = self.instruments[name][2]
        return [(seen.value, dict(seen.attributes)) for seen in callback(CallbackOptions())]


class Run:
    def __init__(self, **stats: int) -> None:
        self.counted = RunStats(**stats)  # type: ignore[typeddict-item]

    def stats(self) -> RunStats:
        return self.counted

    def memory_bytes(self) -> int:
        return 4096


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    asked: list[str] = []

    def get_meter(name: str, version: str) -> Meter:
        asked.append(name)
        assert asked == [METER_NAME], "once for the process"
        return meter

    monkeypatch.setattr(metrics, "get_meter", get_meter)
    return meter


def test_the_table_in_the_docs_is_what_is_made(meter: Meter) -> None:
    mine = SelfMetrics(lambda: None)
    mine.offer()
    mine.offer()
    rows = re.findall(r"^\| `(proflink\.\S+)` \| ([a-z ]+) \| `(\S+)` \|", DOCS.read_text(), re.M)
    documented = {name: (kind.replace(" ", "_"), unit) for name, kind, unit in rows}
    made = {name: (kind, unit) for name, (kind, unit, _) in meter.instruments.items()}
    assert made == documented


def test_every_key_is_one_that_stats_have() -> None:
    keys = [key for metric in METRICS for key in metric.keys]
    assert len(keys) == len(set(keys))
    assert set(keys) <= get_type_hints(ProfilerStats).keys()


def test_values_units_and_attributes(meter: Meter) -> None:
    run = Run(ticks=7, sampler_cpu_ns=1_500_000_000, exports_ok=3, exports_failed=2, threads=5)
    SelfMetrics(lambda: run).offer()
    assert meter.values("proflink.sampler.ticks") == [(7, {})]
    assert meter.values("proflink.sampler.cpu.time") == [(pytest.approx(1.5), {})]
    assert meter.values("proflink.sampler.threads") == [(5, {})]
    assert meter.values("proflink.sampler.memory.usage") == [(4096, {})]
    assert meter.values("proflink.export.attempts") == [
        (3, {RESULT: "success"}),
        (2, {RESULT: "failure"}),
    ]
    assert meter.values("proflink.export.files.dropped") == [], "this destination has no such count"


def test_nothing_while_nothing_runs(meter: Meter) -> None:
    SelfMetrics(lambda: None).offer()
    assert all(meter.values(name) == [] for name in meter.instruments)


def test_counters_go_on_from_run_to_run_and_begin_anew_in_a_child(meter: Meter) -> None:
    running: Run | None = Run(ticks=7, threads=5)
    mine = SelfMetrics(lambda: running)
    mine.offer()
    mine.finished(Run(ticks=7, threads=5).stats())
    running = Run(ticks=2, threads=3)
    assert meter.values("proflink.sampler.ticks") == [(9, {})]
    assert meter.values("proflink.sampler.threads") == [(3, {})]
    mine.forget()
    assert meter.values("proflink.sampler.ticks") == [(2, {})]


def test_a_run_that_ends_while_it_is_asked_is_not_counted_twice(meter: Meter) -> None:
    class Ending(Run):
        def stats(self) -> RunStats:
            mine.finished(self.counted)
            return self.counted

    run = Ending(ticks=7)
    mine = SelfMetrics(lambda: run)
    mine.offer()
    assert meter.values("proflink.sampler.ticks") == []


def test_nothing_is_raised(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Run:
        raise OSError("no")

    SelfMetrics(broken).offer()
    assert all(meter.values(name) == [] for name in meter.instruments)

    def refuses(name: str, version: str) -> Meter:
        raise RuntimeError("a provider of somebody's own")

    monkeypatch.setattr(metrics, "get_meter", refuses)
    SelfMetrics(lambda: None).offer()
