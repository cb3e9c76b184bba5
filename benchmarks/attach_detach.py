# SPDX-License-Identifier: Apache-2.0
"""attach + detach, and get_current, through OpenTelemetry's API: stock runtime context vs ours."""

from __future__ import annotations

from collections.abc import Callable

import opentelemetry.context as context_api
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.context.context import _RuntimeContext
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from benchmarks._paired import Bar, Row, Side, across_processes, arguments, measure, report
from benchmarks._setup import tracer_with
from otel_proflink import _sampler
from otel_proflink._linker import RuntimeContext, SpanHooks

STOCK = ContextVarsRuntimeContext()
OURS = RuntimeContext(STOCK)
BAR = Bar(1.0, peer="2.5 (ddtrace), 10 (splunk), 22 (beacon)")
MADE_EACH_TIME = "span object made for each attach (remote parent)"
GET_CURRENT = "`get_current`"


class LinkOnly(SpanHooks, SpanProcessor):
    """What `ProflinkSpanProcessor` does at span start, and nothing else."""


def cycles(context: Context) -> Callable[[int], None]:
    """attach + detach, eight times a turn: the loop itself is not to be seen."""

    def run(turns: int) -> None:
        for _ in range(turns):
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))
            detach(attach(context))

    return run


def fresh_spans(turns: int) -> None:
    """A remote parent, as a propagator extracts it: a new span object for every request."""
    parent = SpanContext(0x1F << 120, 0x2F << 56, is_remote=True, trace_flags=TraceFlags(1))
    for _ in range(8 * turns):
        detach(attach(set_span_in_context(NonRecordingSpan(parent), Context())))


def reads(turns: int) -> None:
    """get_current under an attached context, eight times a turn."""
    for _ in range(turns):
        get_current()
        get_current()
        get_current()
        get_current()
        get_current()
        get_current()
        get_current()
        get_current()


def sides(run: Callable[[int], None], attached: Context | None = None) -> list[Side]:
    """Stock, ours, and ours while this thread is sampled."""

    def side(name: str, hook: _RuntimeContext | RuntimeContext, sampled: bool) -> Side:
        tokens = []

        def enter() -> None:
            context_api._RUNTIME_CONTEXT = hook  # type: ignore[assignment]
            if sampled:
                _sampler.start(100)
            if attached is not None:
                tokens.append(attach(attached))

        def leave() -> None:
            if tokens:
                detach(tokens.pop())
            if sampled:
                _sampler.stop()
            context_api._RUNTIME_CONTEXT = STOCK

        return Side(name, run, enter, leave)

    return [side("stock", STOCK, False), side("ours", OURS, False), side("sampled", OURS, True)]


def cases() -> dict[str, list[Side]]:
    """All of them."""
    recording = set_span_in_context(tracer_with(LinkOnly()).start_span("work"), Context())
    ids = SpanContext(0x1F << 120, 0x2F << 56, is_remote=False)
    unsampled = set_span_in_context(NonRecordingSpan(ids), Context())
    return {
        "recording span": sides(cycles(recording)),
        "non-recording span": sides(cycles(unsampled)),
        "empty context": sides(cycles(Context())),
        MADE_EACH_TIME: sides(fresh_spans),
        GET_CURRENT: sides(reads, attached=recording),
    }


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    results = across_processes(
        lambda: {name: measure(each, rounds=6, block_s=0.01) for name, each in cases().items()},
        processes=12 if options.quick else 40,
        options=options,
    )
    rows = []
    for name, rounds in results.items():
        stock = rounds.typical("stock", "thread_cpu") / 8
        for side, title in (("ours", name), ("sampled", f"{name}, sampled at 100 Hz")):
            took = rounds.typical(side, "thread_cpu") / 8
            rows.append(
                Row(
                    title,
                    rounds.ratio(side, "stock", "thread_cpu"),
                    "×",
                    None if name in (MADE_EACH_TIME, GET_CURRENT) else BAR,
                    f"{took * 1e9:.0f} ns, stock {stock * 1e9:.0f} ns",
                )
            )
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
