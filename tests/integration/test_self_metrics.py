# SPDX-License-Identifier: Apache-2.0
"""The profiler's own metrics as an application's `MeterProvider` collects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ground_truth import SAMPLED
from tests.support.processes import Run, run_app

pytestmark = pytest.mark.skipif(not SAMPLED, reason="this Python is linked, not sampled")

PRELUDE = """
import os
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from otel_proflink import Profiler
from otel_proflink.config import Config

reader = InMemoryMetricReader()


def provide():
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))


def collect():
    '''Name to {attribute: value} of our meter; an empty text where there is no attribute.'''
    seen = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            if scope.scope.name != "otel_proflink":
                continue
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    key = next(iter(point.attributes.values()), "")
                    seen.setdefault(metric.name, {})[key] = point.value
    return seen


def wait_for_ticks(profiler, count):
    deadline = time.monotonic() + 30
    while profiler.stats()["ticks"] < count and time.monotonic() < deadline:
        make("work")(0.01)

"""


def run(tmp_path: Path, body: str, **env: str) -> tuple[Run, dict[str, Any]]:
    done = run_app(tmp_path, PRELUDE + body, PYTHONWARNINGS="ignore", **env)
    done.assert_clean()
    return done, done.told


@pytest.mark.parametrize("early", [True, False], ids=["provider first", "provider late"])
def test_through_a_run_a_stop_and_another_run(tmp_path: Path, early: bool) -> None:
    before, after = ("provide()", "") if early else ("", "provide()")
    _, told = run(
        tmp_path,
        f"""
{before}
profiler = Profiler().start()
{after}
wait_for_ticks(profiler, 50)
profiler.flush()
stats = profiler.stats()
first = collect()
profiler.stop()
stopped = collect()
profiler.start()
wait_for_ticks(profiler, 10)
again = collect()
second = Profiler().start()
both = len(collect()["proflink.sampler.ticks"])
profiler.stop(), second.stop()
report(stats=stats, first=first, stopped=stopped, again=again, both=both, end=collect())
""",
    )
    stats, first, again = told["stats"], told["first"], told["again"]
    assert first["proflink.sampler.ticks"][""] >= stats["ticks"] >= 50
    assert first["proflink.sampler.snapshots"][""] > 0
    assert first["proflink.sampler.threads"][""] >= 1
    assert first["proflink.sampler.cpu.time"][""] >= stats["sampler_cpu_ns"] / 1e9 > 0
    assert first["proflink.sampler.period"][""] == pytest.approx(0.001)
    assert 10_000 < first["proflink.sampler.memory.usage"][""] < 50_000_000
    assert first["proflink.export.attempts"] == {"success": 1, "failure": 0}
    assert first["proflink.export.files.dropped"] == {"": 0}
    assert told["stopped"] == {}
    assert told["end"] == {}
    assert told["both"] == 1
    for name, values in first.items():
        if name.startswith(("proflink.sampler.threads", "proflink.sampler.memory")):
            continue
        for key, value in values.items():
            assert again[name][key] >= value, f"{name} went back"
    assert again["proflink.export.attempts"]["success"] >= 1


def test_a_child_reports_its_own(tmp_path: Path) -> None:
    _, told = run(
        tmp_path,
        """
at_once = []
# Before ours, which sets the child's profiler going.
os.register_at_fork(after_in_child=lambda: at_once.append(collect()))
provide()
profiler = Profiler().start()
wait_for_ticks(profiler, 1500)
for _ in range(3):
    make("between")(0.01)
    profiler.flush()
mine = collect()
out, into = os.pipe()
pid = os.fork()
if pid == 0:
    own = collect()
    wait_for_ticks(profiler, 5)
    later = collect()
    os.write(into, json.dumps([at_once, own, later]).encode())
    profiler.stop()
    os._exit(0)
os.waitpid(pid, 0)
at_once, own, later = json.loads(os.read(out, 1 << 16))
report(mine=mine, at_once=at_once, own=own, later=later)
profiler.stop()
""",
    )
    mine, own, later = told["mine"], told["own"], told["later"]
    assert mine["proflink.sampler.ticks"][""] >= 1500
    assert mine["proflink.export.attempts"]["success"] == 3
    assert told["at_once"] == [{}]
    assert own["proflink.sampler.ticks"][""] < mine["proflink.sampler.ticks"][""]
    assert own["proflink.sampler.cpu.time"][""] < mine["proflink.sampler.cpu.time"][""]
    assert own["proflink.export.attempts"] == {"success": 0, "failure": 0}
    assert later["proflink.sampler.ticks"][""] >= 5


def test_failing_exports_are_seen(tmp_path: Path) -> None:
    (tmp_path / "capture").write_text("a file")
    done = run_app(
        tmp_path,
        PRELUDE
        + """
provide()
profiler = Profiler().start()
for _ in range(11):
    make("work")(0.01)
    profiler.flush()
seen = collect()
os.unlink("capture")
profiler.flush()
report(seen=seen, later=collect())
profiler.stop()
""",
    )
    assert done.returncode == 0, done.stderr
    seen, later = done.told["seen"], done.told["later"]
    assert seen["proflink.export.attempts"] == {"success": 0, "failure": 11}
    assert seen["proflink.export.dropped"][""] >= 1
    assert later["proflink.export.attempts"]["success"] >= 8
    assert later["proflink.export.attempts"]["failure"] == 11


def test_switched_off(tmp_path: Path) -> None:
    _, told = run(
        tmp_path,
        """
asked = []
get_meter = metrics.get_meter
metrics.get_meter = lambda *a, **k: asked.append(a) or get_meter(*a, **k)
provide()
with Profiler() as profiler:
    wait_for_ticks(profiler, 5)
    report(seen=collect(), asked=asked)
""",
        OTEL_PROFLINK_METRICS="false",
    )
    assert told["seen"] == {}
    assert told["asked"] == []


def test_the_budget_is_a_setting(tmp_path: Path) -> None:
    _, told = run(
        tmp_path,
        """
provide()
with Profiler() as profiler:
    wait_for_ticks(profiler, 20)
    seen = collect()
report(seen=seen)
""",
        OTEL_PROFLINK_SAMPLE_RATE="10000",
        OTEL_PROFLINK_MAX_OVERHEAD="0.05",
    )
    assert told["seen"]["proflink.sampler.period"][""] > 0.001
