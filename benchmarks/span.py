# SPDX-License-Identifier: Apache-2.0
"""Span start + end: everything on at 100 Hz vs off, on a provider with no other processor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Tracer

from benchmarks._paired import Bar, Rounds, Row, Side, across_processes, arguments, measure, report
from benchmarks._setup import Everything, Scratch, tracer_with

BAR = Bar(1.03, peer="1.27 to 1.45 (ddtrace)")
Work = Callable[[Tracer], Callable[[int], None]]


class Discard(SpanExporter):
    """An exporter that costs nothing."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Forget them."""
        return SpanExportResult.SUCCESS


def started_and_ended(tracer: Tracer) -> Callable[[int], None]:
    """Spans that are never made current."""

    def run(count: int) -> None:
        for _ in range(count):
            tracer.start_span("work").end()

    return run


def current(tracer: Tracer) -> Callable[[int], None]:
    """Spans that are made current, as most are."""

    def run(count: int) -> None:
        for _ in range(count):
            with tracer.start_as_current_span("work"):
                pass

    return run


def nested(tracer: Tracer) -> Callable[[int], None]:
    """A span under a local parent."""

    def run(count: int) -> None:
        with tracer.start_as_current_span("parent"):
            for _ in range(count):
                with tracer.start_as_current_span("work"):
                    pass

    return run


def around_work(tracer: Tracer) -> Callable[[int], None]:
    """A span around some 200 µs of work: thousands a second, not a hundred thousand."""

    def run(count: int) -> None:
        for _ in range(count):
            with tracer.start_as_current_span("work"):
                sum(i * i for i in range(3000))

    return run


PLAIN: dict[str, Work] = {
    "`start_span().end()`": started_and_ended,
    "`start_as_current_span`": current,
    "the same under a local parent": nested,
}
BESIDE = "`start_as_current_span`, on / off, beside a `BatchSpanProcessor`"
AROUND = "a span around work"


def measure_all() -> dict[str, Rounds]:
    """All cases, each side twice."""
    results = {}
    with Scratch() as output:
        everything = Everything(output)
        for name, work in PLAIN.items():
            no_op = Side("no-op", work(tracer_with(SpanProcessor())))
            results[name] = compare(work, everything, no_op)
        results[AROUND] = compare(around_work, everything)
        batch = BatchSpanProcessor(Discard())
        logging.disable()  # it says so when its queue is full: it always is here
        results[BESIDE] = compare(current, Everything(output, beside=(batch,)), off=(batch,))
        batch.shutdown()  # type: ignore[no-untyped-call]
    return results


def compare(
    work: Work, everything: Everything, *more: Side, off: tuple[SpanProcessor, ...] = ()
) -> Rounds:
    """Off, on, and more."""
    sides = [
        Side("off", work(tracer_with(*off))),
        Side("on", work(everything.tracer), everything.on, everything.off),
        *more,
    ]
    # Our exporter thread looks for spans once a second: shorter blocks would leave it out.
    return measure(sides, rounds=2, block_s=1.2, settle_s=0.02)


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    results = across_processes(measure_all, processes=4 if options.quick else 8, options=options)
    rows = []
    for name in PLAIN:
        rounds = results[name]
        took = {side: rounds.typical(side, "thread_cpu") * 1e6 for side in ("off", "on")}
        note = f"{took['on']:.2f} µs, off {took['off']:.2f} µs"
        loop = "the SDK's own loop over processors"
        rows += [
            Row(f"{name}, on / off", rounds.ratio("on", "off", "thread_cpu"), "×", BAR, note),
            Row(
                f"{name}, one no-op processor / off",
                rounds.ratio("no-op", "off", "thread_cpu"),
                "×",
                note=loop,
            ),
            Row(
                f"{name}, on / one no-op processor", rounds.ratio("on", "no-op", "thread_cpu"), "×"
            ),
        ]
    off = results[BESIDE].typical("off", "thread_cpu") * 1e6
    beside = results[BESIDE].ratio("on", "off", "thread_cpu")
    rows.append(Row(BESIDE, beside, "×", note=f"off {off:.2f} µs"))
    off = results[AROUND].typical("off", "thread_cpu") * 1e6
    for figure, title in (
        ("thread_cpu", "CPU of the thread"),
        ("process_cpu", "CPU of the process"),
        ("wall", "wall"),
    ):
        ratio = results[AROUND].ratio("on", "off", figure)
        rows.append(Row(f"{AROUND}, {off:.0f} µs together, on / off, {title}", ratio, "×"))
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
