# SPDX-License-Identifier: Apache-2.0
"""`ThreadPoolExecutor.submit(...).result()` inside a span: stock, ours and the threading peer."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from benchmarks._paired import Row, Side, arguments, measure, report
from benchmarks._setup import Scratch
from otel_proflink import ProflinkInstrumentor, config

try:
    from opentelemetry.instrumentation.threading import ThreadingInstrumentor
except ImportError:
    ThreadingInstrumentor = None


def task() -> None:
    """Nothing: what remains is the way there and back."""


class Pool:
    """One side: a pool of one worker, used inside a span, under an instrumentor or none."""

    def __init__(self, name: str, instrumentor: object | None) -> None:
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


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    rows = []
    with Scratch() as output:
        os.environ[config.OUTPUT_DIR] = os.fspath(output.path)
        os.environ[config.START] = "now"
        pools = [Pool("stock", None), Pool("ours", ProflinkInstrumentor())]
        if ThreadingInstrumentor is not None:
            pools.append(Pool("threading", ThreadingInstrumentor()))
        rounds = measure(
            [pool.side() for pool in pools], rounds=20 if options.quick else 100, block_s=0.1
        )
        stock = rounds.typical("stock", "process_cpu") * 1e6
        for pool in pools[1:]:
            what = {
                "ours": "`ProflinkInstrumentor`, sampled at 100 Hz",
                "threading": "`opentelemetry-instrumentation-threading`",
            }[pool.name]
            took = rounds.typical(pool.name, "process_cpu") * 1e6
            note = f"{took:.1f} µs, stock {stock:.1f} µs"
            rows.append(
                Row(
                    f"{what} / stock, CPU of the process",
                    rounds.ratio(pool.name, "stock", "process_cpu"),
                    "×",
                    note=note,
                )
            )
            rows.append(
                Row(f"{what} / stock, wall", rounds.ratio(pool.name, "stock", "wall"), "×")
            )
        if ThreadingInstrumentor is not None:
            rows.append(
                Row(
                    "ours / `opentelemetry-instrumentation-threading`, CPU of the process",
                    rounds.ratio("ours", "threading", "process_cpu"),
                    "×",
                )
            )
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
