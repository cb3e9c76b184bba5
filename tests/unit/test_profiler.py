# SPDX-License-Identifier: Apache-2.0
"""The profiler's lifecycle, exports and endpoints, with a sampler that does what it is told."""

from __future__ import annotations

import gc
import gzip
import json
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import (
    ConcurrentMultiSpanProcessor,
    ReadableSpan,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from otel_proflink import engine as engine_module
from otel_proflink import lifecycle, profiler, runtime_context
from otel_proflink._linker import link_of
from otel_proflink.config import Config
from otel_proflink.ended_span import content_of
from otel_proflink.endpoints import EndpointTable
from otel_proflink.engine import THREAD_NAME
from otel_proflink.profiler import Profiler
from otel_proflink.sampling import SamplerUnavailableError
from otel_proflink.span_inbox import SpanInbox
from otel_proflink.span_processor import ProflinkSpanProcessor
from otel_proflink.stats import ProfilerStats
from otel_proflink.supervisors import only_supervises
from otel_proflink.thread_names import ThreadNames


class FakeSamplerError(RuntimeError):
    pass


class FakeCapture:
    def __init__(self, roots: dict[int, str], samples: int) -> None:
        self.roots = roots
        self.sample_count = samples
        self.memory_bytes = 4096

    def local_roots(self) -> dict[int, str]:
        return self.roots

    def encode_pprof(
        self,
        *,
        endpoints: Mapping[int, str],
        thread_names: Mapping[int, str],
        span_names: Mapping[int, str] | None = None,
        tasks: Mapping[int, tuple[str, int]] | None = None,
    ) -> bytes:
        return json.dumps(
            {"endpoints": sorted(endpoints.values()), "threads": sorted(thread_names.values())}
        ).encode()


class FakeSampler:
    """Everything that `_sampler` has; each swap brings what `next_roots` and `samples` say."""

    SamplerError = FakeSamplerError

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ignored: list[int] = []
        self.refusal: str | None = None
        self.roots: dict[int, str] = {}
        self.samples = 1
        self.full = 0.0
        self.captures: list[weakref.ref[FakeCapture]] = []
        self._running = False

    def set_max_frames(self, frames: int) -> None:
        pass

    def start(self, rate_hz: float, awaits: bool = False, engine: str = "auto") -> None:
        if self.refusal is not None:
            raise FakeSamplerError(self.refusal)
        self.calls.append(f"start {rate_hz:g}")
        self._running = True

    def stop(self) -> None:
        self.calls.append("stop")
        self._running = False

    def running(self) -> bool:
        return self._running

    def ignore_thread(self, native_id: int) -> None:
        self.ignored.append(native_id)

    def unignore_thread(self, native_id: int) -> None:
        self.ignored.remove(native_id)

    def swap(self) -> FakeCapture | None:
        self.calls.append("swap")
        capture = FakeCapture(dict(self.roots), self.samples)
        self.captures.append(weakref.ref(capture))
        self.full = 0.0
        return capture

    def set_budget(self, share: float) -> None:
        self.budget = share

    def memory_bytes(self) -> int:
        return 8192

    def fill(self) -> float:
        return self.full

    def stats(self) -> dict[str, int]:
        return {"ticks": 7}


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSampler]:
    fake = FakeSampler()
    monkeypatch.setattr(lifecycle, "load_sampler", lambda: fake)
    monkeypatch.setattr(lifecycle._process, "last_refusal", "")
    for variable in list(os.environ):
        if variable.startswith("OTEL_"):
            monkeypatch.delenv(variable)
    # Its own tests are elsewhere; whether its thread runs depends on who has imported asyncio.
    monkeypatch.setenv("OTEL_PROFLINK_AWAIT_RATE", "0")
    yield fake
    profiler.stop(5)
    runtime_context.uninstall()
    assert not exporter_threads()


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OTEL_PROFLINK_OUTPUT_DIR", str(tmp_path / "out"))
    return tmp_path / "out"


def exporter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def profiles(path: Path) -> list[dict[str, Any]]:
    """The content of each profile, in the order of their numbers."""
    paths = sorted(path.glob("profile-*.pb.gz"), key=lambda p: int(p.name.split("-")[-1][:-6]))
    return [json.loads(gzip.decompress(p.read_bytes())) for p in paths]


def span_names(path: Path) -> list[str]:
    paths = sorted(path.glob("spans-*.json"), key=lambda p: int(p.stem.split("-")[-1]))
    return [
        span["name"]
        for p in paths
        for line in p.read_text().splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def wait_for(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def tracer_with(processor: ProflinkSpanProcessor) -> Any:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider.get_tracer("t")


# -- start and stop -------------------------------------------------------------------------------


def test_start_flush_stop(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    assert running.running
    assert sampler.calls == ["start 100"]
    assert profiler.get() is running
    (thread,) = exporter_threads()
    assert thread.daemon
    assert running.flush(5)
    assert sampler.ignored == [thread.native_id]
    assert len(profiles(out)) == 1
    assert running.stop(5)
    assert not running.running
    assert not sampler.running()
    assert profiler.get() is None
    assert len(profiles(out)) == 2
    assert running.stop(5)  # again is harmless


def test_the_last_flush_comes_after_the_last_sample(sampler: FakeSampler, out: Path) -> None:
    with Profiler():
        pass
    last_swap = len(sampler.calls) - sampler.calls[::-1].index("swap") - 1
    assert sampler.calls.index("stop") < last_swap


def test_restart_and_start_stop_loops(sampler: FakeSampler, out: Path) -> None:
    one = Profiler()
    for _ in range(20):
        assert one.start().running
        assert len(exporter_threads()) == 1
        assert one.stop(5)
        assert not exporter_threads()
    assert len(profiles(out)) == 20


def test_starting_again_is_harmless(sampler: FakeSampler, out: Path) -> None:
    one = Profiler().start().start()
    assert sampler.calls == ["start 100"]
    assert one.stop(5)
    assert not sampler.running()


def test_a_second_profiler_attaches_to_the_running_one(
    sampler: FakeSampler, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = Profiler().start()
    second = Profiler(Config(sample_rate_hz=500)).start()
    assert "settings stay as they are" in caplog.text
    assert second.running
    assert sampler.calls == ["start 100"]
    assert len(exporter_threads()) == 1
    assert first.stop(5)
    assert not first.running
    assert second.running
    assert sampler.running()
    assert profiles(out), "what the first one had seen is written when it goes"
    assert second.stop(5)
    assert not sampler.running()


def test_module_functions(sampler: FakeSampler, out: Path) -> None:
    assert profiler.get() is None
    one = profiler.start()
    assert profiler.start(Config(sample_rate_hz=5)) is one
    assert profiler.get() is one
    other = Profiler().start()
    assert profiler.stop(5)
    assert not one.running
    assert not other.running
    assert not sampler.running()
    assert profiler.stop(5)


def test_racing_starts_make_one(sampler: FakeSampler, out: Path) -> None:
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        Profiler().start()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sampler.calls.count("start 100") == 1
    assert len(exporter_threads()) == 1


def test_stats(sampler: FakeSampler, out: Path) -> None:
    one = Profiler()
    assert one.stats() == {}
    one.start()
    assert one.flush(5)
    stats = one.stats()
    assert stats["ticks"] == 7
    assert stats["exports_ok"] == 1
    assert all(type(value) is int for value in stats.values())
    assert {"exports_failed", "exports_dropped", "files_dropped", "spans_dropped"} <= stats.keys()
    assert stats["memory_bytes"] > 0
    assert stats.keys() <= get_type_hints(ProfilerStats).keys(), "documented there"


def test_the_end_is_one_debug_line(
    sampler: FakeSampler, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    one = Profiler(Config(output_dir=str(out), max_overhead_percent=0.5)).start()
    assert sampler.budget == 0.005
    assert one.flush(5)
    assert one.stop(5)
    (line,) = [r.getMessage() for r in caplog.records if "has stopped" in r.getMessage()]
    assert f"process {os.getpid()}:" in line
    assert "ticks=7, " in line
    assert "exports_ok=2" in line


@pytest.mark.parametrize("variable", ["OTEL_PROFLINK_ENABLED=false", "OTEL_SDK_DISABLED=true"])
def test_switched_off(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(*variable.split("="))
    processor = ProflinkSpanProcessor()
    span = tracer_with(processor).start_span("s")
    span.end()
    assert sampler.calls == []
    assert link_of(span) is None
    hook = runtime_context.installed()
    assert hook is None or not hook.linking
    assert processor.force_flush()
    processor.shutdown()
    assert not out.exists()


# -- refusals -------------------------------------------------------------------------------------


def error_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("otel_proflink")
    ]


def test_a_bad_setting_is_one_line_and_links_are_made(
    sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_PROFLINK_SAMPLE_RATE", "fast")
    processor = ProflinkSpanProcessor()
    assert not profiler.start().running
    (line,) = error_lines(caplog)
    assert "OTEL_PROFLINK_SAMPLE_RATE='fast'" in line
    assert "1 to 10000" in line
    assert sampler.calls == []
    span = tracer_with(processor).start_span("s")
    span.end()
    assert link_of(span) is not None
    assert processor.force_flush()
    processor.shutdown()


def test_a_sampler_that_refuses_is_one_line_and_links_are_made(
    sampler: FakeSampler, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler.refusal = "the layout of this interpreter is not the one that it was built for"
    processor = ProflinkSpanProcessor()
    Profiler().start()
    (line,) = error_lines(caplog)
    assert sampler.refusal in line
    assert not exporter_threads()
    span = tracer_with(processor).start_span("s")
    span.end()
    assert link_of(span) is not None
    assert len(lifecycle.inbox) == 0
    assert not out.exists()


def test_no_native_sampler(
    sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Any:
        raise SamplerUnavailableError("its native part cannot be loaded (no)")

    monkeypatch.setattr(lifecycle, "load_sampler", missing)
    assert not Profiler().start().running
    (line,) = error_lines(caplog)
    assert "cannot be loaded" in line


def test_a_thread_that_cannot_start_leaves_no_sampler_behind(
    sampler: FakeSampler,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    original = threading.Thread.__dict__["_delete"]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert not Profiler().start().running
    assert not sampler.running()
    assert len(lifecycle.inbox) == 0
    assert threading.Thread.__dict__["_delete"] is original
    (line,) = error_lines(caplog)
    assert "can't start new thread" in line


# -- exports --------------------------------------------------------------------------------------


def test_flushes_each_interval(sampler: FakeSampler, out: Path) -> None:
    with Profiler(Config(output_dir=str(out), export_interval_ms=100)):
        wait_for(lambda: len(profiles(out)) >= 3)


def test_nothing_sampled_writes_nothing(sampler: FakeSampler, out: Path) -> None:
    sampler.samples = 0
    with Profiler() as running:
        assert running.flush(5)
    assert profiles(out) == []


def test_flushes_early_when_the_tables_fill(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_WAKE_S", 0.02)
    with Profiler():
        time.sleep(0.1)
        assert profiles(out) == []
        sampler.full = 0.8
        wait_for(lambda: len(profiles(out)) == 1)


def test_many_askers_get_one_flush_each_or_share_one(sampler: FakeSampler, out: Path) -> None:
    with Profiler() as running:
        results: list[bool] = []
        threads = [
            threading.Thread(target=lambda: results.append(running.flush(5))) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 20
        assert sampler.calls.count("swap") <= 20


def test_a_flush_is_bounded_in_time(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    running = Profiler().start()
    monkeypatch.setattr(sampler, "swap", lambda: release.wait(10) and None)
    before = time.monotonic()
    assert not running.flush(0.05)
    assert not running.stop(0.05)
    assert time.monotonic() - before < 2
    assert not sampler.running(), "stopped although the exporter thread hangs"
    release.set()
    wait_for(lambda: not exporter_threads())


def test_an_unwritable_directory_is_one_line_until_it_works_again(
    sampler: FakeSampler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    blocker = tmp_path / "out"
    blocker.write_text("a file")
    with Profiler(Config(output_dir=str(blocker))) as running:
        for _ in range(3):
            assert not running.flush(5)
        (line,) = error_lines(caplog)
        assert str(blocker) in line
        stats = running.stats()
        assert (stats["exports_ok"], stats["exports_failed"]) == (0, 3)
        blocker.unlink()
        assert running.flush(5)
        assert "exports again" in caplog.text
        assert len(profiles(blocker)) == 4, "nothing was lost meanwhile"
        assert len(error_lines(caplog)) == 1


def test_what_waits_for_a_broken_destination_is_bounded(
    sampler: FakeSampler, tmp_path: Path
) -> None:
    blocker = tmp_path / "out"
    blocker.write_text("a file")
    running = Profiler(Config(output_dir=str(blocker))).start()
    for _ in range(12):
        running.flush(5)
    assert running.stats()["exports_dropped"] == 12 - engine_module._PENDING_LIMIT
    assert not running.stop(5)


def test_a_mistake_of_ours_stays_ours(
    sampler: FakeSampler,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with Profiler() as running:
        with monkeypatch.context() as patched:
            patched.setattr(sampler, "swap", broken)
            assert not running.flush(5)
            assert not running.flush(5)
        assert len(error_lines(caplog)) == 1
        assert running.flush(5), "and the thread goes on"


def test_exporter_none(sampler: FakeSampler, out: Path) -> None:
    with Profiler(Config(exporter="none", output_dir=str(out))) as running:
        tracer_with(ProflinkSpanProcessor(running)).start_span("s").end()
        assert running.flush(5)
    assert not out.exists()


def test_the_exporter_thread_holds_no_context(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instrumentation that wraps `Thread.start` must not find the starter's span."""
    seen: list[Any] = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        from opentelemetry.context import get_current

        seen.append(dict(get_current()))
        original(thread)

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    monkeypatch.setattr(threading.Thread, "start", start)
    with tracer.start_as_current_span("s"):
        Profiler().start()
    assert seen == [{}]


# -- thread names ---------------------------------------------------------------------------------


def test_names_of_live_and_of_ended_threads(sampler: FakeSampler, out: Path) -> None:
    release = threading.Event()
    early = threading.Thread(target=release.wait, name="started-before")
    early.start()
    with Profiler() as running:
        short = threading.Thread(target=lambda: None, name="short-lived")
        short.start()
        short.join()
        live = threading.Thread(target=release.wait, name="alive")
        live.start()
        assert running.flush(5)
        release.set()
        early.join()
        live.join()
    first, second = profiles(out)
    assert {"MainThread", "short-lived", "alive", "started-before"} <= set(first["threads"])
    assert {"alive", "started-before"} <= set(second["threads"])
    assert "short-lived" not in second["threads"]


def test_the_wrap_goes_with_the_profiler(sampler: FakeSampler, out: Path) -> None:
    original = threading.Thread.__dict__["_delete"]
    with Profiler():
        assert threading.Thread.__dict__["_delete"] is not original
    assert threading.Thread.__dict__["_delete"] is original


def test_a_foreign_wrap_over_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = threading.Thread.__dict__["_delete"]
    names = ThreadNames()
    names.install()
    ours = threading.Thread.__dict__["_delete"]

    def foreign(thread: threading.Thread) -> None:
        ours(thread)

    monkeypatch.setattr(threading.Thread, "_delete", foreign)
    names.uninstall()
    assert threading.Thread.__dict__["_delete"] is foreign
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread not in threading.enumerate()
    threading.Thread._delete = original  # type: ignore[attr-defined]


def test_a_name_that_cannot_be_read_hurts_nobody() -> None:
    class Rude(threading.Thread):
        @property
        def native_id(self) -> int:
            raise RuntimeError

    names = ThreadNames()
    names.install()
    try:
        thread = Rude(target=lambda: None)
        thread.start()
        thread.join()
    finally:
        names.uninstall()
    assert thread not in threading.enumerate()


# -- spans and endpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("multi", [SynchronousMultiSpanProcessor, ConcurrentMultiSpanProcessor])
def test_ended_spans_are_written(sampler: FakeSampler, out: Path, multi: Callable[[], Any]) -> None:
    provider = TracerProvider(active_span_processor=multi(), shutdown_on_exit=False)
    provider.add_span_processor(ProflinkSpanProcessor())
    tracer = provider.get_tracer("t")
    for number in range(3):
        tracer.start_span(f"span {number}").end()
    assert provider.force_flush()
    assert span_names(out) == ["span 0", "span 1", "span 2"]
    tracer.start_span("last").end()
    provider.shutdown()
    assert span_names(out)[-1] == "last"
    assert not sampler.running()


def test_pprof_keeps_no_spans_but_endpoints(sampler: FakeSampler, out: Path) -> None:
    running = Profiler(Config(exporter="pprof", output_dir=str(out)))
    span = tracer_with(ProflinkSpanProcessor(running)).start_span("GET /", kind=SpanKind.SERVER)
    sampler.roots = {span.get_span_context().span_id: "web"}
    span.end()
    assert running.flush(5)
    assert span_names(out) == []
    assert profiles(out)[0]["endpoints"] == ["GET /"]


def test_spans_end_up_in_time_under_pressure(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_WAKE_S", 0.01)
    tracer = tracer_with(ProflinkSpanProcessor())
    for _ in range(20):
        for _ in range(600):
            tracer.start_span("s").end()
        wait_for(lambda: len(lifecycle.inbox) < 600)
    running = profiler.get()
    assert running is not None
    assert running.stats()["spans_dropped"] == 0
    assert running.flush(5)
    assert len(span_names(out)) == 12_000


def test_a_flood_of_spans_is_bounded_and_counted(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_WAKE_S", 60)
    tracer = tracer_with(ProflinkSpanProcessor())
    limit = lifecycle.inbox.limit
    for number in range(limit + 100):
        tracer.start_span(f"s{number}").end()
    running = profiler.get()
    assert running is not None
    assert running.stats()["spans_dropped"] == 100
    assert running.flush(5)
    names = span_names(out)
    assert len(names) == limit
    assert names[0] == "s100", "the oldest went"
    assert running.stats()["spans_dropped"] == 100


def test_two_processors_write_each_span_once(sampler: FakeSampler, out: Path) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(ProflinkSpanProcessor())
    provider.add_span_processor(ProflinkSpanProcessor())
    provider.get_tracer("t").start_span("s").end()
    provider.force_flush()
    assert span_names(out) == ["s"]


def test_nothing_is_kept_while_nothing_runs(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    processor = ProflinkSpanProcessor(running)
    tracer = tracer_with(processor)
    running.stop(5)
    span = tracer.start_span("s")
    span.end()
    assert len(lifecycle.inbox) == 0
    assert link_of(span) is not None
    running.start()
    tracer.start_span("again").end()
    assert running.flush(5)
    assert span_names(out) == ["again"]


def test_a_dropped_processor_is_not_kept_alive(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    processor = ProflinkSpanProcessor(running)
    reference = weakref.ref(processor)
    del processor
    gc.collect()
    assert reference() is None


def test_a_subclass_may_do_more_at_span_end(sampler: FakeSampler, out: Path) -> None:
    seen: list[str] = []

    class Mine(ProflinkSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            seen.append(span.name)
            super().on_end(span)

    processor = Mine()
    tracer_with(processor).start_span("s").end()
    assert processor.force_flush()
    assert seen == span_names(out) == ["s"]


def test_shutdown_stops_only_what_the_processor_started(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    processor = ProflinkSpanProcessor(running)
    processor.shutdown()
    assert running.running
    other = ProflinkSpanProcessor()
    other.shutdown()
    assert running.running
    running.stop(5)
    third = ProflinkSpanProcessor()
    assert sampler.running()
    third.shutdown()
    assert not sampler.running()


def root_of(tracer: Any, name: str, span_type: str, sampler: FakeSampler, **more: Any) -> Any:
    span = tracer.start_span(name, context=Context(), **more)
    sampler.roots[span.get_span_context().span_id] = span_type
    return span


def test_endpoints_of_local_roots(sampler: FakeSampler, out: Path) -> None:
    tracer = tracer_with(ProflinkSpanProcessor())
    remote = set_span_in_context(NonRecordingSpan(SpanContext(1, 2, True, TraceFlags(1))))
    server = SpanKind.SERVER
    root_of(tracer, "GET", "web", sampler, attributes={"http.route": "/users/{id}"}).end()
    late = root_of(tracer, "GET", "web", sampler)
    late.set_attribute("http.route", "/late")
    late.end()
    renamed = root_of(tracer, "POST", "rpc", sampler)
    renamed.update_name("shop.Cart/Add")
    renamed.end()
    root_of(tracer, "queue process", "messaging", sampler).end()
    root_of(tracer, "SELECT", "db", sampler).end()
    root_of(tracer, "job", "worker", sampler).end()
    root_of(tracer, "nothing", "", sampler).end()
    span = tracer.start_span("below a remote parent", context=remote, kind=server)
    sampler.roots[span.get_span_context().span_id] = "web"
    span.end()
    tracer.start_span("not in this profile", context=Context(), kind=server).end()
    running = profiler.get()
    assert running is not None
    assert running.flush(5)
    (profile,) = profiles(out)
    assert profile["endpoints"] == [
        "/late",
        "/users/{id}",
        "below a remote parent",
        "queue process",
        "shop.Cart/Add",
    ]


def test_endpoint_collection_off(sampler: FakeSampler, out: Path) -> None:
    running = Profiler(Config(output_dir=str(out), endpoint_collection=False))
    tracer = tracer_with(ProflinkSpanProcessor(running))
    root_of(tracer, "GET /", "web", sampler).end()
    assert running.flush(5)
    assert profiles(out)[0]["endpoints"] == []
    assert span_names(out) == ["GET /"]


def test_a_root_unfinished_at_flush_gets_its_endpoint_later(
    sampler: FakeSampler, out: Path
) -> None:
    tracer = tracer_with(ProflinkSpanProcessor())
    running = profiler.get()
    assert running is not None
    root_of(tracer, "GET /done", "web", sampler).end()
    slow = root_of(tracer, "GET /slow", "web", sampler)
    assert running.flush(5)
    assert profiles(out)[0]["endpoints"] == ["GET /done"]
    slow.end()
    sampler.roots = {}
    assert running.flush(5)
    assert profiles(out)[0]["endpoints"] == ["GET /done", "GET /slow"]
    assert profiles(out)[1]["endpoints"] == []
    assert running.stats()["endpoint_fixups"] == 1


def test_late_fix_up_keeps_one_capture_for_one_interval(sampler: FakeSampler, out: Path) -> None:
    tracer = tracer_with(ProflinkSpanProcessor())
    running = profiler.get()
    assert running is not None
    slow = root_of(tracer, "GET /slow", "web", sampler)
    for _ in range(4):
        assert running.flush(5)
    gc.collect()
    assert [ref() is not None for ref in sampler.captures] == [False, False, False, True]
    slow.end()
    sampler.roots = {}
    assert running.flush(5)
    endpoints = [profile["endpoints"] for profile in profiles(out)]
    assert endpoints == [[], [], [], ["GET /slow"], []]
    gc.collect()
    assert all(ref() is None for ref in sampler.captures)


def test_late_fix_up_leaves_a_file_that_was_taken_away_alone(
    sampler: FakeSampler, out: Path
) -> None:
    tracer = tracer_with(ProflinkSpanProcessor())
    running = profiler.get()
    assert running is not None
    slow = root_of(tracer, "GET /slow", "web", sampler)
    assert running.flush(5)
    for path in out.glob("profile-*"):
        path.unlink()
    slow.end()
    sampler.roots = {}
    assert running.flush(5)
    assert [profile["endpoints"] for profile in profiles(out)] == [[]]
    assert running.stats()["endpoint_fixups"] == 0


def test_late_fix_up_of_a_batch_that_still_waits(sampler: FakeSampler, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("a file")
    running = Profiler(Config(output_dir=str(path)))
    tracer = tracer_with(ProflinkSpanProcessor(running))
    slow = root_of(tracer, "GET /slow", "web", sampler)
    assert not running.flush(5)
    slow.end()
    sampler.roots = {}
    path.unlink()
    assert running.flush(5)
    assert [profile["endpoints"] for profile in profiles(path)] == [["GET /slow"], []]


def test_the_endpoint_table_is_bounded() -> None:
    table = EndpointTable(limit=3)
    provider = TracerProvider(shutdown_on_exit=False)
    ids = []
    for number in range(5):
        span = provider.get_tracer("t").start_span(f"s{number}")
        ids.append(span.get_span_context().span_id)
        if number == 4:
            assert table.find(ids[1:2]) == {ids[1]: "s1"}  # used: stays
        table.record(content_of(span))
    assert len(table) == 3
    assert sorted(table.find(ids).values()) == ["s1", "s3", "s4"]


# -- lazy start -----------------------------------------------------------------------------------


def test_sampling_waits_for_the_first_span(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_PROFLINK_START", "first_span")
    processor = ProflinkSpanProcessor()
    tracer = tracer_with(processor)
    assert sampler.calls == []
    assert processor.force_flush()
    first = tracer.start_span("first")
    assert sampler.calls == ["start 100"]
    assert link_of(first) is not None
    first.end()
    tracer.start_span("second").end()
    assert sampler.calls == ["start 100"]
    processor.shutdown()
    assert span_names(out) == ["first", "second"]


def test_shutdown_before_the_first_span(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_PROFLINK_START", "first_span")
    processor = ProflinkSpanProcessor()
    processor.shutdown()
    tracer_with(processor).start_span("s")
    assert sampler.calls == []


def test_auto_waits_in_a_supervisor(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "only_supervises", lambda: True)
    ProflinkSpanProcessor()
    assert sampler.calls == []
    monkeypatch.setenv("OTEL_PROFLINK_START", "now")
    ProflinkSpanProcessor()
    assert sampler.calls == ["start 100"]


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("python app.py", {}, False),
        ("python", {}, False),
        ("python -c import-gunicorn", {}, False),
        ("python -X dev -W ignore -u /usr/bin/gunicorn app:app", {}, True),
        ("python -m gunicorn app:app", {}, True),
        ("python -Im gunicorn.app.wsgiapp app:app", {}, True),
        ("python /venv/lib/gunicorn/__main__.py app:app", {}, True),
        ("python -m uvicorn app:app", {}, False),
        ("python -m uvicorn app:app --workers 1", {}, False),
        ("python -m uvicorn app:app --workers 4", {}, True),
        ("python -m uvicorn app:app --workers=4", {}, True),
        ("python -m uvicorn app:app --reload", {}, True),
        ("python -m uvicorn app:app", {"WEB_CONCURRENCY": "3"}, True),
        ("python /bin/fastapi run app.py", {}, False),
        ("python /bin/fastapi run app.py --workers 2", {}, True),
        ("python /bin/fastapi dev app.py", {}, True),
        ("python /bin/hypercorn app:app", {}, True),
        ("python /bin/hypercorn -w 0 app:app", {}, False),
        ("python /bin/granian app:app", {}, True),
        ("python /bin/celery -A proj worker", {}, True),
        ("python -m celery -A proj worker -P solo", {}, False),
        ("python -m celery -A proj worker --pool=gevent", {}, False),
        ("python -m celery -A proj beat", {}, False),
        ("python manage.py runserver", {}, True),
        ("python manage.py runserver", {"RUN_MAIN": "true"}, False),
        ("python manage.py runserver --noreload", {}, False),
        ("python manage.py migrate", {}, False),
        ("python -m flask --app x run --debug", {}, True),
        ("python -m flask --app x run", {}, False),
        ("python -m flask run --debug", {"WERKZEUG_RUN_MAIN": "true"}, False),
        ("python /bin/rq worker high", {}, True),
        ("python /bin/rq info", {}, False),
        ("python /bin/dramatiq tasks", {}, True),
    ],
)
def test_supervisors_are_known(line: str, environ: dict[str, str], expected: bool) -> None:
    assert only_supervises(line.split(" "), environ, modules=()) is expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("from multiprocessing.resource_tracker import main;main(3)", True),
        ("from multiprocessing.forkserver import main; main(3, 4, ['__main__'])", True),
        ("from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)", False),
    ],
)
def test_helpers_of_multiprocessing_are_known(command: str, expected: bool) -> None:
    line = ["python", "-s", "-c", command, "--multiprocessing-fork"]
    assert only_supervises(line, {}, modules=()) is expected


def test_uwsgi_is_known() -> None:
    assert only_supervises(["uwsgi"], {}, modules={"uwsgi"})
    # While `sitecustomize` runs it has no module yet, and no command line of Python's.
    assert only_supervises([], {}, modules=(), executable="/usr/bin/uwsgi")
    assert not only_supervises([], {}, modules=(), executable="/usr/bin/python3")


# -- the inbox ------------------------------------------------------------------------------------


def test_the_inbox_counts_under_many_threads() -> None:
    inbox = SpanInbox(limit=100)
    inbox.open()
    span = ReadableSpan("made by hand", context=SpanContext(1, 2, is_remote=False))
    threads = [
        threading.Thread(target=lambda: [inbox.put(span) for _ in range(1000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inbox) == 100
    assert 7800 <= inbox.dropped <= 7900, "counted without a lock"
    (taken,) = inbox.take(100)
    assert taken.name == "made by hand"
    inbox.close()
    inbox.put(span)
    assert len(inbox) == 0
    inbox.open()
    assert inbox.dropped == 0


def test_the_inbox_keeps_all_of_a_span() -> None:
    inbox = SpanInbox()
    inbox.open()
    kept: list[ReadableSpan] = []

    class Keep(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            kept.append(span)
            inbox.put(span)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Keep())
    tracer = provider.get_tracer("t", "1")
    tracer.start_span("bare").end()
    full = tracer.start_span(
        "full", attributes={"a": [1, 2]}, links=[Link(SpanContext(1, 2, False))]
    )
    full.add_event("e", {"k": "v"})
    full.set_status(StatusCode.ERROR, "why")
    full.end()
    # Kept by content, not by the slow way round: else the SDK has changed inside.
    assert all(type(item) is tuple for item in inbox._waiting)
    for ours, theirs in zip(inbox.take(10), map(content_of, kept), strict=True):
        for field, mine, other in zip(ours._fields, ours, theirs, strict=True):
            if field in ("events", "links"):
                mine, other = list(mine), list(other)
            assert mine == other, field


# -- fork and signals, as far as one process can tell ---------------------------------------------


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns in a forked child, as text."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, str(work()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_clean(sampler: FakeSampler, out: Path) -> None:
    tracer = tracer_with(ProflinkSpanProcessor())
    running = profiler.get()
    assert running is not None
    unsent = root_of(tracer, "parent's", "web", sampler)
    unsent.end()

    def child() -> object:
        assert running.running
        assert len(lifecycle.inbox) == 0
        assert len(exporter_threads()) == 1
        tracer.start_span("child's").end()
        sampler.roots = {}
        return running.flush(5), sampler.calls.count("start 100"), os.getpid()

    flushed, starts, pid = eval(in_child(child))
    assert flushed
    assert starts == 2
    assert sampler.calls == ["start 100"], "the parent is undisturbed"
    (profile,) = out.glob("profile-*")
    assert f"-{pid}-" in profile.name
    assert span_names(out) == ["child's"]
    assert running.flush(5)
    assert sorted(span_names(out)) == ["child's", "parent's"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_stopped_profiler_does_not_start_one(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    running.stop(5)
    assert in_child(lambda: running.running) == "False"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_locks_held_at_the_fork_do_not_bind_the_child(sampler: FakeSampler, out: Path) -> None:
    running = Profiler().start()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lifecycle._process.lock, lifecycle.inbox._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    try:
        assert in_child(lambda: running.stop(5)) == "True"
    finally:
        release.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_that_python_was_not_told_of(
    sampler: FakeSampler, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Profiler().start()
    one = lifecycle._process.engine
    assert one is not None
    assert running.flush(5)  # its thread, which a real child would not have, has begun
    one.pid -= 1  # as if the engine had been made by the parent
    assert running.flush(5)
    assert lifecycle._process.engine is not one
    assert sampler.calls.count("start 100") == 2
    one.stop(5)  # in a real child its thread would not exist


@pytest.fixture
def sigterm() -> Iterator[list[int]]:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_sigterm_flushes_and_chains(sampler: FakeSampler, out: Path, sigterm: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    running = Profiler(Config(output_dir=str(out), flush_on_sigterm=True)).start()
    assert signal.getsignal(signal.SIGTERM) is not handler
    signal.raise_signal(signal.SIGTERM)
    assert sigterm == [signal.SIGTERM]
    assert len(profiles(out)) == 1
    assert running.running
    running.stop(5)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_is_left_alone_by_default(
    sampler: FakeSampler, out: Path, sigterm: list[int]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with Profiler():
        assert signal.getsignal(signal.SIGTERM) is handler


def test_an_application_that_takes_sigterm_later_keeps_it(
    sampler: FakeSampler, out: Path, sigterm: list[int]
) -> None:
    running = Profiler(Config(output_dir=str(out), flush_on_sigterm=True)).start()

    def later(_number: int, _frame: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, later)
    running.stop(5)
    assert signal.getsignal(signal.SIGTERM) is later


def test_an_ignored_sigterm_stays_ignored(sampler: FakeSampler, out: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Profiler(Config(output_dir=str(out), flush_on_sigterm=True)):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_outside_the_main_thread_is_one_line(
    sampler: FakeSampler, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(output_dir=str(out), flush_on_sigterm=True)
    thread = threading.Thread(target=Profiler(config).start)
    thread.start()
    thread.join()
    (line,) = error_lines(caplog)
    assert "cannot flush on SIGTERM" in line
    assert sampler.running()
