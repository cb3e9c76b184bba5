# SPDX-License-Identifier: Apache-2.0
"""`ThreadPoolExecutor.submit(...).result()` inside a span: stock, ours and the threading peer."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)
from opentelemetry.sdk.trace import TracerProvider

from benchmarks._paired import Rounds, Row, Side, across_processes, arguments, measure, report
from benchmarks._setup import Scratch
from otel_proflink import ProflinkInstrumentor, config

try:
    from opentelemetry.instrumentation.threading import ThreadingInstrumentor
except ImportError:
    ThreadingInstrumentor = None  # type: ignore[assignment, misc]


def task() -> None:
    """Nothing: what remains is the way there and back."""


class Pool:
    """One side: a pool of one worker, used inside a span, under an instrumentor or none."""

    def __init__(self, name: str, instrumentor: BaseInstrumentor | None) -> None:
        self.name = name
        self._instrumentor = instrumentor
        self._stack = ExitStack()
        self._provider = trace.get_tracer_provider()

    def side(self) -> Side:
        """For `measure`."""
        return Side(self.name, self.run, self.enter, self._stack.close)

    def enter(self) -> None:
        """Instrument, then make pool and span."""
        if self._instrumentor is not None:
            self._instrumentor.instrument(tracer_provider=self._provider)
            self._stack.callback(self._instrumentor.uninstrument)
        tracer = trace.get_tracer("benchmark")
        self._pool = self._stack.enter_context(ThreadPoolExecutor(1))
        self._stack.enter_context(tracer.start_as_current_span("submitter"))
        self._pool.submit(task).result()

    def run(self, count: int) -> None:
        """Submit, one task after the other."""
        submit = self._pool.submit
        for _ in range(count):
            submit(task).result()


def measure_all() -> dict[str, Rounds]:
    """All sides."""
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    with Scratch() as output:
        os.environ[config.OUTPUT_DIR] = os.fspath(output.path)
        os.environ[config.START] = "now"
        pools = [Pool("stock", None), Pool("ours", ProflinkInstrumentor())]
        if ThreadingInstrumentor is not None:
            pools.append(Pool("threading", ThreadingInstrumentor()))
        return {"submit": measure([pool.side() for pool in pools], rounds=8, block_s=0.2)}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rounds = across_processes(measure_all, processes=4 if options.quick else 12, options=options)[
        "submit"
    ]
    ours, peer = "`ProflinkInstrumentor`", "`opentelemetry-instrumentation-threading`"
    pairs = [("ours", "stock", f"{ours} at 100 Hz / stock")]
    if ThreadingInstrumentor is not None:
        pairs += [("threading", "stock", f"{peer} / stock"), ("ours", "threading", "ours / theirs")]
    rows = []
    for side, base, title in pairs:
        took = [rounds.typical(name, "process_cpu") * 1e6 for name in (side, base)]
        note = f"{took[0]:.1f} µs, {took[1]:.1f} µs"
        cpu, wall = (rounds.ratio(side, base, figure) for figure in ("process_cpu", "wall"))
        rows.append(Row(f"{title}, CPU of the process", cpu, "×", note=note))
        rows.append(Row(f"{title}, wall", wall, "×"))
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
