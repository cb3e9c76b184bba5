# SPDX-License-Identifier: Apache-2.0
"""otel-proflink switched on and off within one process."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Tracer

from otel_proflink import Profiler, ProflinkSpanProcessor, runtime_context
from otel_proflink.config import Config, EngineName, ExporterName


def tracer_with(*processors: SpanProcessor) -> Tracer:
    """A tracer of a provider of its own, with nothing but these processors."""
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider.get_tracer("benchmark")


class Scratch:
    """A capture directory that is gone afterwards."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="proflink-benchmark-"))

    def empty(self) -> None:
        """Remove the files in it."""
        for file in self.path.iterdir():
            file.unlink()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Everything:
    """Context hook, span processor and profiler, as an application has them.

    Attributes:
        tracer: of a provider with our processor, after those that are `beside` it.
    """

    def __init__(
        self,
        output: Scratch,
        *,
        rate_hz: float = 100.0,
        exporter: ExporterName = "file",
        engine: EngineName = "auto",
        beside: tuple[SpanProcessor, ...] = (),
    ) -> None:
        self._output = output
        self.profiler = Profiler(
            Config(
                output_dir=os.fspath(output.path),
                sample_rate_hz=rate_hz,
                exporter=exporter,
                engine=engine,
                start="now",
            )
        )
        self.tracer = tracer_with(*beside, ProflinkSpanProcessor(self.profiler))
        if not self.profiler.running:
            raise SystemExit("the profiler does not run here: see the log")
        self.off()

    def on(self) -> None:
        """Link and profile."""
        runtime_context.install()
        self.profiler.start()

    def off(self) -> None:
        """Neither; the capture is thrown away."""
        self.profiler.stop()
        runtime_context.uninstall()
        if runtime_context.installed() is not None:
            raise RuntimeError("the hook is still in place: a context of ours is alive")
        self._output.empty()
