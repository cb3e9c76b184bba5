# SPDX-License-Identifier: Apache-2.0
"""Span start + end: everything on at 100 Hz vs off, on a provider with no other processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Tracer

from benchmarks._paired import Bar, Row, Side, arguments, measure, report
from benchmarks._setup import Everything, Scratch, tracer_with

BAR = Bar(1.03)
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


def rows_of(name: str, work: Work, everything: Everything, rounds: int) -> list[Row]:
    """On against off, and how much of the difference is the SDK's own loop over processors."""
    sides = [
        Side("off", work(tracer_with())),
        Side("no-op", work(tracer_with(SpanProcessor()))),
        Side("on", work(everything.tracer), everything.on, everything.off),
    ]
    figures = measure(sides, rounds=rounds, block_s=0.2, settle_s=0.02)
    took = {side.name: figures.typical(side.name, "thread_cpu") * 1e6 for side in sides}
    return [
        Row(
            f"{name}, on / off",
            figures.ratio("on", "off", "thread_cpu"),
            "×",
            BAR,
            f"{took['on']:.2f} µs, off {took['off']:.2f} µs",
        ),
        Row(
            f"{name}, one no-op processor / off",
            figures.ratio("no-op", "off", "thread_cpu"),
            "×",
            note="the SDK's own loop over processors",
        ),
        Row(
            f"{name}, on / one no-op processor", figures.ratio("on", "no-op", "thread_cpu"), "×"
        ),
        Row(
            f"{name}, on / off, wall",
            figures.ratio("on", "off", "wall"),
            "×",
            note="back to back: our exporter thread encodes every span meanwhile",
        ),
    ]


def rows_beside_an_exporter(output: Scratch, rounds: int) -> list[Row]:
    """What an application pays that exports its spans already."""
    batch = BatchSpanProcessor(Discard())
    everything = Everything(output, beside=(batch,))
    sides = [
        Side("off", current(tracer_with(batch))),
        Side("on", current(everything.tracer), everything.on, everything.off),
    ]
    figures = measure(sides, rounds=rounds, block_s=0.2, settle_s=0.02)
    batch.shutdown()
    return [
        Row(
            "`start_as_current_span`, on / off, beside a `BatchSpanProcessor`",
            figures.ratio("on", "off", "thread_cpu"),
            "×",
            note=f"off {figures.typical('off', 'thread_cpu') * 1e6:.2f} µs",
        )
    ]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rounds = 15 if options.quick else 60
    rows = []
    with Scratch() as output:
        everything = Everything(output)
        for name, work in (
            ("`start_span().end()`", started_and_ended),
            ("`start_as_current_span`", current),
            ("the same under a local parent", nested),
        ):
            rows += rows_of(name, work, everything, rounds)
        rows += rows_beside_an_exporter(output, rounds)
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
