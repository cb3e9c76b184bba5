# SPDX-License-Identifier: Apache-2.0
"""Profilers behind one small interface; each is fed OpenTelemetry spans in a way that it supports.

Runs in the processes that are measured. What only one profiler has is imported by that one alone:
peers live in an environment of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import Span, Tracer, get_current_span, get_tracer

if TYPE_CHECKING:
    from otel_proflink.config import EngineName


class Profiler:
    """One profiler, in the process that it profiles.

    Attributes:
        tracer: makes the spans.
    """

    tracer: Tracer

    def __init__(self, directory: Path, rate_hz: float, sink: str) -> None:
        """Import it, and set up tracing.

        Args:
            directory: where profiles go.
            rate_hz: samples per second and thread to ask for.
            sink: URL of a server that takes and keeps whatever is sent to it.
        """
        self.directory = directory
        self.rate_hz = rate_hz
        self.sink = sink

    def start(self) -> None:
        """Return once it samples."""
        raise NotImplementedError

    def stop(self) -> None:
        """Return once everything is in `directory` (pprof files), or was sent to the sink."""
        raise NotImplementedError

    def span(self, name: str, context: Context | None = None) -> AbstractContextManager[Span]:
        """A current span."""
        return self.tracer.start_as_current_span(name, context=context)


class Proflink(Profiler):
    """Ours, with the pool's propagation."""

    engine: EngineName = "sweep"

    def __init__(self, directory: Path, rate_hz: float, sink: str) -> None:
        super().__init__(directory, rate_hz, sink)
        from opentelemetry.sdk.trace import TracerProvider

        from otel_proflink import Profiler as OurProfiler
        from otel_proflink import ProflinkSpanProcessor, runtime_context
        from otel_proflink.config import Config
        from otel_proflink.instrumentation import thread_pool

        self._profiler = OurProfiler(
            Config(
                exporter="pprof",
                output_dir=os.fspath(directory),
                sample_rate_hz=rate_hz,
                engine=self.engine,
                start="now",
            )
        )
        runtime_context.install()
        thread_pool.instrument()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(ProflinkSpanProcessor(self._profiler))
        self.tracer = provider.get_tracer("accuracy")

    def start(self) -> None:
        if not self._profiler.start().running:
            raise SystemExit("the profiler does not run here: see the log")
        begin = self._profiler.stats()["ticks"]
        deadline = time.monotonic() + 10
        while self._profiler.stats()["ticks"] < begin + 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    def stop(self) -> None:
        self._profiler.stop()


class ProflinkTimers(Proflink):
    """Ours, CPU sampled by timers."""

    engine = "cpu_timer"


class Ddtrace(Profiler):
    """ddtrace's stack profiler, with its own provider behind OpenTelemetry's API.

    Set up by `benchmarks.accuracy_ddtrace`.
    """

    def __init__(self, directory: Path, rate_hz: float, sink: str) -> None:
        super().__init__(directory, rate_hz, sink)
        if "ddtrace" not in sys.modules:
            raise SystemExit("ddtrace has to be imported first")
        self.tracer = get_tracer("accuracy")

    def start(self) -> None:
        from ddtrace.internal.datadog.profiling import stack  # type: ignore[import-not-found]
        from ddtrace.profiling import Profiler as TheirProfiler  # type: ignore[import-not-found]

        self._profiler = TheirProfiler()
        self._profiler.start()
        stack.set_interval(1 / self.rate_hz)
        time.sleep(0.5)

    def stop(self) -> None:
        self._profiler.stop(flush=True)
        for file in self.directory.glob("ddtrace*.pprof"):
            file.with_suffix(".pb").write_bytes(_decompressed(file.read_bytes()))


class Pyroscope(Profiler):
    """pyroscope-io; spans are tags of the thread, as its documentation has them."""

    def __init__(self, directory: Path, rate_hz: float, sink: str) -> None:
        super().__init__(directory, rate_hz, sink)
        import pyroscope  # type: ignore[import-not-found]
        from opentelemetry.sdk.trace import TracerProvider

        self._pyroscope = pyroscope
        self.tracer = TracerProvider(shutdown_on_exit=False).get_tracer("accuracy")

    def start(self) -> None:
        self._pyroscope.configure(
            application_name="accuracy",
            server_address=self.sink,
            sample_rate=int(self.rate_hz),
            oncpu=True,
            gil_only=False,
            upload_interval=2,
        )
        time.sleep(0.5)

    def stop(self) -> None:
        self._pyroscope.shutdown()
        time.sleep(1)

    @contextlib.contextmanager
    def span(self, name: str, context: Context | None = None) -> Iterator[Span]:
        # Two tags with one key would leave the choice to the profiler.
        outer = _tags(get_current_span())
        self._untag(outer)
        try:
            with super().span(name, context) as span, self._pyroscope.tag_wrapper(_tags(span)):
                yield span
        finally:
            for key, value in outer.items():
                self._pyroscope.add_thread_tag(key, value)

    def _untag(self, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self._pyroscope.remove_thread_tag(key, value)


def _tags(span: Span) -> dict[str, str]:
    ids = span.get_span_context()
    return {"span_id": f"{ids.span_id:016x}"} if ids.is_valid else {}


PROFILERS: dict[str, type[Profiler]] = {
    "proflink": Proflink,
    "cpu_timer": ProflinkTimers,
    "ddtrace": Ddtrace,
    "pyroscope": Pyroscope,
}


def _decompressed(data: bytes) -> bytes:
    """Plain pprof: a reader that needs the standard library alone knows no zstd."""
    if data[:4] != b"\x28\xb5\x2f\xfd":
        return data
    if sys.version_info >= (3, 14):
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        plain: bytes = zstd.decompress(data)
        return plain
    import zstandard  # type: ignore[import-not-found, unused-ignore]

    decompressed: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return decompressed
