# SPDX-License-Identifier: Apache-2.0
"""Section E: greenlets, which bring their own `contextvars` context at every switch."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage
from opentelemetry.context import attach
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    get_current_span,
    set_span_in_context,
)

from otel_proflink._linker import LOCAL_ROOT_KEY, SPAN_TYPE_KEY
from tests.support.async_truth import Current, assert_right, pinned_to_one_cpu
from tests.support.ground_truth import GroundTruth, Label, attached, remote_context

greenlet: Any = pytest.importorskip("greenlet")


def spawn(run: Callable[..., object], context: contextvars.Context | None = None) -> Any:
    """A greenlet in `context`; without one it starts in an empty one, as greenlet does it."""
    made = greenlet.greenlet(run)
    if context is not None:
        made.gr_context = context
    return made


def round_robin(greenlets: list[Any]) -> None:
    """Switch to each in turn until all are dead."""
    while greenlets:
        for one in greenlets:
            one.switch()
        greenlets = [one for one in greenlets if not one.dead]


def give_way() -> None:
    greenlet.getcurrent().parent.switch()


def burn_in_turns(truth: GroundTruth, expectation: Label | None, turns: int = 4) -> None:
    unit = truth.unit(expectation, 0.005)
    for _ in range(turns):
        unit()
        give_way()


def test_e5_child_greenlet_keeps_the_propagated_root(tmp_path: Path) -> None:
    """Span 0x101 under local root 0x202, known from the propagation record alone."""

    def child() -> None:
        burn_in_turns(truth, Label(0xAB, 0x101, 0x202, "web"))
        with truth.tracer.start_as_current_span("own") as own:
            burn_in_turns(truth, Label(0xAB, own.get_span_context().span_id, 0x202, "web"))
            grandchild = spawn(lambda: deeper(own), contextvars.copy_context())
            while not grandchild.dead:
                grandchild.switch()
        burn_in_turns(truth, Label(0xAB, 0x101, 0x202, "web"))

    def deeper(own: Span) -> None:
        parent = own.get_span_context()
        burn_in_turns(truth, Label(0xAB, parent.span_id, 0x202, "web"))
        with truth.tracer.start_as_current_span("deepest") as span:
            burn_in_turns(truth, Label(0xAB, span.get_span_context().span_id, 0x202, "web"))

    record = baggage.set_baggage(LOCAL_ROOT_KEY, f"{0x202:016x}")
    record = baggage.set_baggage(SPAN_TYPE_KEY, "web", record)
    local = SpanContext(0xAB, 0x101, is_remote=False)
    with GroundTruth(tmp_path) as truth:
        with attached(set_span_in_context(NonRecordingSpan(local), record)):
            children = [spawn(child, contextvars.copy_context()) for _ in range(3)]
            truth.burn(Label(0xAB, 0x101, 0x202, "web"))
        truth.burn(None)
        round_robin(children)
        truth.burn(None)
    assert_right(truth.verdict(), min_total=50)


def test_e7_two_hundred_greenlets(tmp_path: Path) -> None:
    def work(index: int) -> None:
        with truth.tracer.start_as_current_span(f"greenlet {index}") as span:
            burn_in_turns(truth, Label.of(span))

    with GroundTruth(tmp_path) as truth:
        with truth.tracer.start_as_current_span("of the thread") as span:
            round_robin([spawn(lambda index=index: work(index)) for index in range(200)])
            truth.burn(Label.of(span))
        truth.burn(None)
    verdict = truth.verdict()
    assert len(verdict.counts) == 202
    assert_right(verdict, min_total=1000)


def test_e2_greenlet_without_a_context_is_unlabelled(tmp_path: Path) -> None:
    """Never the thread's, and never that of the greenlet which switched to it."""

    def bare() -> None:
        assert not get_current_span().get_span_context().is_valid
        burn_in_turns(truth, None)

    def traced() -> None:
        with truth.tracer.start_as_current_span("traced") as span:
            inner = spawn(lambda: burn_in_turns(truth, None))
            while not inner.dead:
                inner.switch()
                truth.burn(Label.of(span), 0.01)
                give_way()

    with GroundTruth(tmp_path) as truth, truth.tracer.start_as_current_span("thread") as thread:
        greenlets = [spawn(run) for run in (bare, traced, bare, traced)]
        while greenlets:
            for one in greenlets:
                one.switch()
                truth.burn(Label.of(thread), 0.01)
            greenlets = [one for one in greenlets if not one.dead]
    assert_right(truth.verdict(), min_total=50)


def test_contexts_given_from_outside(tmp_path: Path) -> None:
    """`gr_context` of a greenlet that has not started, or waits: the label follows it."""

    def work(expectations: list[Label | None]) -> None:
        for expectation in expectations:
            truth.burn(expectation)
            give_way()

    def under(span: Span) -> contextvars.Context:
        context = contextvars.Context()
        context.run(attach, set_span_in_context(span))
        return context

    with GroundTruth(tmp_path) as truth:
        first, second = truth.tracer.start_span("first"), truth.tracer.start_span("second")
        expectations = [Label.of(first), Label.of(second), None, Label.of(first)]
        one = spawn(lambda: work(expectations), under(first))
        one.switch()
        for context in (under(second), contextvars.Context(), under(first)):
            one.gr_context = context
            one.switch()
        # A context that two greenlets share, as SQLAlchemy's bridge to asyncio does it.
        shared = under(second)
        pair = [spawn(lambda: work([Label.of(second)] * 3), shared) for _ in range(2)]
        round_robin(pair)
        truth.burn(None)
    assert_right(truth.verdict())


def test_switches_inside_of_spans_in_any_order(tmp_path: Path) -> None:
    """Greenlets that switch to each other directly, spans opened on one and left open meanwhile."""

    def ping() -> None:
        with truth.tracer.start_as_current_span("ping") as span:
            current.knows(span)
            for _ in range(10):
                truth.burn(current.label(), 0.01)
                second.switch()
                truth.burn(current.label(), 0.01)

    def pong() -> None:
        with truth.tracer.start_as_current_span("pong") as span:
            current.knows(span)
            while True:
                truth.burn(current.label(), 0.01)
                first.switch()
                with truth.tracer.start_as_current_span("inner") as inner:
                    current.knows(inner, span)
                    truth.burn(current.label(), 0.01)
                    first.switch()

    current = Current()
    with GroundTruth(tmp_path) as truth:
        first, second = spawn(ping), spawn(pong)
        first.switch()
        assert first.dead
        truth.burn(None)
        assert not second.dead
        second.throw(greenlet.GreenletExit)
        assert second.dead
        truth.burn(None)
    truth.verdict().assert_right(min_samples=0, min_total=200)


def test_greenlets_that_end_or_are_dropped_with_a_span_attached(tmp_path: Path) -> None:
    def leaves_it() -> None:
        span = truth.tracer.start_span("left")
        attach(set_span_in_context(span))
        truth.burn(Label.of(span))

    def never_ends() -> None:
        with truth.tracer.start_as_current_span("suspended") as span:
            truth.burn(Label.of(span))
            give_way()

    def raises() -> None:
        with truth.tracer.start_as_current_span("raises") as span:
            truth.burn(Label.of(span))
            raise KeyError("theirs")

    with GroundTruth(tmp_path) as truth, truth.tracer.start_as_current_span("thread") as thread:
        for _ in range(3):
            spawn(leaves_it).switch()
            truth.burn(Label.of(thread), 0.01)
            dropped = spawn(never_ends)
            dropped.switch()
            truth.burn(Label.of(thread), 0.01)
            del dropped
            gc.collect()
            truth.burn(Label.of(thread), 0.01)
            with pytest.raises(KeyError):
                spawn(raises).switch()
            truth.burn(Label.of(thread), 0.01)
    assert_right(truth.verdict(), min_total=50)


def test_greenlets_in_several_threads(tmp_path: Path) -> None:
    def work(name: str) -> None:
        with truth.tracer.start_as_current_span(name) as span:
            burn_in_turns(truth, Label.of(span))

    def in_thread(number: int) -> None:
        with attached(remote_context(0xFEED, number + 1)):
            round_robin([spawn(lambda: work(f"thread {number}")) for _ in range(10)])
            truth.burn(Label(0xFEED, number + 1, number + 1))

    with GroundTruth(tmp_path) as truth:
        threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    truth.verdict().assert_right(min_samples=0, min_total=300)


def test_greenlets_below_asyncio(tmp_path: Path) -> None:
    """Synchronous code that awaits from within a greenlet, as SQLAlchemy's asyncio part runs it."""

    async def bridge(work: Callable[[], object]) -> object:
        one = spawn(work, None)
        one.gr_context = contextvars.copy_context()
        result = one.switch()
        while not one.dead:
            await result
            result = one.switch()
        return result

    def synchronous(outer: Span) -> None:
        with truth.tracer.start_as_current_span("query") as span:
            unit = truth.unit(Label.of(span, outer), 0.01)
            for _ in range(4):
                unit()
                greenlet.getcurrent().parent.switch(asyncio.sleep(0))

    async def task() -> None:
        with truth.tracer.start_as_current_span("task") as span:
            truth.burn(Label.of(span), 0.01)
            await bridge(lambda: synchronous(span))
            truth.burn(Label.of(span), 0.01)

    async def main() -> None:
        await asyncio.gather(*(task() for _ in range(20)))

    with GroundTruth(tmp_path) as truth:
        asyncio.run(main(), debug=False)
    assert_right(truth.verdict(), min_total=300)


@pytest.mark.parametrize("cpus", ["all", "one"])
def test_a_storm_of_switches(tmp_path: Path, cpus: str) -> None:
    """Tens of thousands of switches a second, from inside of the functions that are scored.

    A switch replaces context, frames and C stack one after the other: whatever the sampler sees in
    between must not be taken for a label.
    """
    storm = (
        "def {name}(seconds):\n"
        "    end = clock() + seconds\n"
        "    while clock() < end:\n"
        "        give_way()\n"
        "    return None\n"
    )

    def make(name: str) -> Callable[[float], None]:
        scope: dict[str, Any] = {"clock": time.thread_time, "give_way": give_way}
        exec(compile(storm.format(name=name), f"<{name}>", "exec"), scope)
        function: Callable[[float], None] = scope[name]
        return function

    def work(index: int) -> None:
        function = make(f"storm_{index}")
        if index % 3 == 0:
            truth.expect(function, None)
            function(1.0)
            return
        with truth.tracer.start_as_current_span(f"storm {index}") as span:
            truth.expect(function, Label.of(span))
            function(1.0)

    pin = pinned_to_one_cpu() if cpus == "one" else contextlib.nullcontext()
    with GroundTruth(tmp_path, rate_hz=2000) as truth, pin:
        round_robin([spawn(lambda index=index: work(index)) for index in range(6)])
    verdict = truth.verdict()
    # On another CPU it switches more often than it can be read once: hardly a sample is proven.
    verdict.assert_right(min_samples=0, min_total=100 if cpus == "one" else 0, max_unknown=0.05)
