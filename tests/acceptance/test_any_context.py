# SPDX-License-Identifier: Apache-2.0
"""Any context: whose span it is, who made it, whether it records, and where it ended."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.context.context import _RuntimeContext
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    set_span_in_context,
    use_span,
)

from otel_proflink._linker import current_link
from tests.support.async_truth import assert_right
from tests.support.ground_truth import (
    WEB,
    Expectation,
    GroundTruth,
    Label,
    attached,
    remote_context,
)

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


def extracted(flags: int) -> Context:
    """What a propagator makes of a request's headers."""
    return extract({"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-{flags:02x}"}, Context())


def local(trace_id: int, span_id: int, flags: int = 1) -> NonRecordingSpan:
    context = SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(flags))
    return NonRecordingSpan(context)


def sampled_now() -> bool:
    """Whether the current link says so. The other bits of the flags say other things."""
    link = current_link()
    assert link is not None
    return bool(link.trace_flags & TraceFlags.SAMPLED)


# -- remote parents -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [1, 0], ids=["sampled", "unsampled"])
def test_remote_parent(tmp_path: Path, flags: int) -> None:
    """Its own work is labelled with it; the first span below it is a local root."""
    remote = Label(TRACE, PARENT, PARENT, "", endpoint=None)
    web = "" if flags == 0 else "web"  # a span that does not record has no attributes
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        with attached(extracted(flags)):
            truth.burn(remote)
            for _ in range(2):  # two requests of one trace: a local root each
                with truth.tracer.start_as_current_span(
                    "GET /", kind=SpanKind.SERVER, attributes=WEB
                ) as root:
                    assert root.is_recording() == bool(flags)
                    truth.burn(Label.of(root, span_type=web))
                    with truth.tracer.start_as_current_span("query") as child:
                        assert sampled_now() == bool(flags)
                        truth.burn(Label.of(child, root, web))
                        pool.submit(truth.unit(Label.of(child, root, web))).result()
            truth.burn(remote)
            pool.submit(truth.unit(remote)).result()
        truth.burn(None)
    assert_right(truth.verdict())


def test_remote_parent_given_to_start_span(tmp_path: Path) -> None:
    """The request's context is an argument, and never attached by itself."""
    with GroundTruth(tmp_path) as truth, truth.tracer.start_as_current_span("other") as other:
        span = truth.tracer.start_span("GET /", context=extracted(1), kind=SpanKind.SERVER)
        truth.burn(Label.of(other))
        with use_span(span, end_on_exit=True):
            truth.burn(Label.of(span, span_type="web"))
        truth.burn(Label.of(other))
    assert_right(truth.verdict())


def test_remote_parents_of_many_tasks(tmp_path: Path) -> None:
    async def request(number: int) -> None:
        with attached(remote_context(TRACE + number, PARENT)):
            unit = truth.unit(Label(TRACE + number, PARENT, PARENT), 0.005)
            for _ in range(4):
                unit()
                await asyncio.sleep(0)
            with truth.tracer.start_as_current_span("handler") as span:
                unit = truth.unit(Label.of(span), 0.005)
                for _ in range(4):
                    unit()
                    await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(request(number) for number in range(50)))

    with GroundTruth(tmp_path) as truth:
        asyncio.run(main())
    assert_right(truth.verdict(), min_total=50)


# -- spans that are no spans of the SDK -----------------------------------------------------------


def test_non_recording_spans(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        # Nothing is known about where it came from: it is its own root.
        with use_span(local(TRACE, 0x51)):
            truth.burn(Label(TRACE, 0x51, 0x51))
            # Of the same trace, so below it; of another one, so not.
            with use_span(local(TRACE, 0x52)):
                truth.burn(Label(TRACE, 0x52, 0x51))
            with use_span(local(0xABC, 0x53)):
                truth.burn(Label(0xABC, 0x53, 0x53))
            truth.burn(Label(TRACE, 0x51, 0x51))
        # A local span wrapped to take its recording away, as instrumentations do.
        with truth.tracer.start_as_current_span("root") as root:
            own = root.get_span_context()
            with use_span(NonRecordingSpan(own)):
                truth.burn(Label.of(root))
                with truth.tracer.start_as_current_span("child") as child:
                    truth.burn(Label.of(child, root))
        truth.burn(None)
    assert_right(truth.verdict())


@pytest.mark.parametrize("way", ["sampler", "parent"])
def test_unsampled_traces_are_linked_and_marked(tmp_path: Path, way: str) -> None:
    """The flags say that the backend will not have the trace; the label holds all the same."""
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        truth.provider.sampler = ALWAYS_OFF if way == "sampler" else ParentBased(ALWAYS_OFF)
        tracer = truth.provider.get_tracer("unsampled")
        with tracer.start_as_current_span("root") as root:
            assert not root.is_recording()
            assert not sampled_now()
            truth.burn(Label.of(root, span_type=""))
            with tracer.start_as_current_span("child") as child:
                truth.burn(Label.of(child, root, ""))
                with tracer.start_as_current_span("grandchild") as grandchild:
                    assert not sampled_now()
                    truth.burn(Label.of(grandchild, root, ""))
                    pool.submit(truth.unit(Label.of(grandchild, root, ""))).result()
            truth.burn(Label.of(root, span_type=""))
        truth.burn(None)
        # Sampled again: marked so.
        truth.provider.sampler = ParentBased(ALWAYS_ON)
        with truth.provider.get_tracer("sampled").start_as_current_span("root") as sampled:
            assert sampled_now()
            truth.burn(Label.of(sampled))
    assert_right(truth.verdict())


def test_invalid_span_means_no_label(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        with truth.tracer.start_as_current_span("root") as root:
            with use_span(INVALID_SPAN):
                truth.burn(None)
                pool.submit(truth.unit(None)).result()
                with truth.tracer.start_as_current_span("root again") as fresh:
                    truth.burn(Label.of(fresh))
                truth.burn(None)
            for trace_id, span_id in ((0, 1), (1, 0)):
                with use_span(local(trace_id, span_id)):
                    truth.burn(None)
            with attached(set_span_in_context(INVALID_SPAN, remote_context(1, 2))):
                truth.burn(None)
            truth.burn(Label.of(root))
        with use_span(INVALID_SPAN):
            truth.burn(None)
    assert_right(truth.verdict())


class ForeignSpan(trace.Span):
    """A span of another SDK: the API's interface, no base class of OpenTelemetry's SDK."""

    __slots__ = ("_ids",)  # takes no attributes, so no link can be kept on it

    def __init__(self, trace_id: int, span_id: int) -> None:
        self._ids = (trace_id, span_id)

    def get_span_context(self) -> SpanContext:
        trace_id, span_id = self._ids
        return SpanContext(trace_id, span_id, False, TraceFlags(TraceFlags.SAMPLED))

    def end(self, end_time: int | None = None) -> None: ...
    def set_attributes(self, attributes: Any) -> None: ...
    def set_attribute(self, key: str, value: Any) -> None: ...
    def add_event(self, *arguments: Any, **named: Any) -> None: ...
    def add_link(self, *arguments: Any, **named: Any) -> None: ...
    def update_name(self, name: str) -> None: ...
    def set_status(self, *arguments: Any, **named: Any) -> None: ...
    def record_exception(self, *arguments: Any, **named: Any) -> None: ...

    def is_recording(self) -> bool:
        return True


def test_spans_of_another_sdk(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        with use_span(ForeignSpan(TRACE, 0x71)) as foreign:
            truth.burn(Label(TRACE, 0x71, 0x71))
            pool.submit(truth.unit(Label(TRACE, 0x71, 0x71))).result()
            # Below it a span of the SDK, and below that one of theirs again.
            with truth.tracer.start_as_current_span("child") as child:
                truth.burn(Label.of(child, foreign, ""))
                with use_span(ForeignSpan(TRACE, 0x72)):
                    truth.burn(Label(TRACE, 0x72, 0x71))
            truth.burn(Label(TRACE, 0x71, 0x71))
        truth.burn(None)
    assert_right(truth.verdict())


# -- two providers --------------------------------------------------------------------------------


def test_two_tracer_providers(tmp_path: Path) -> None:
    """One with our processor, one that knows nothing of us; each below the other."""
    with GroundTruth(tmp_path) as truth:
        ours = truth.tracer
        theirs = TracerProvider(shutdown_on_exit=False).get_tracer("not linked")
        with ours.start_as_current_span("ours") as root:
            truth.burn(Label.of(root))
            with theirs.start_as_current_span("theirs below") as child:
                truth.burn(Label.of(child, root))
                with ours.start_as_current_span("ours below") as grandchild:
                    truth.burn(Label.of(grandchild, root))
            truth.burn(Label.of(root))
        with theirs.start_as_current_span("theirs") as root:
            # No processor of ours saw it start: its type is not known, all else is.
            truth.burn(Label.of(root, span_type=""))
            with ours.start_as_current_span("ours below") as child:
                truth.burn(Label.of(child, root, ""))
                with theirs.start_as_current_span("theirs below") as grandchild:
                    truth.burn(Label.of(grandchild, root, ""))
            truth.burn(Label.of(root, span_type=""))
        truth.burn(None)
    assert_right(truth.verdict())


# -- where and when a span ends, or starts --------------------------------------------------------


def test_spans_never_made_current(tmp_path: Path) -> None:
    """They give no label of their own, and their children inherit from them all the same."""
    with GroundTruth(tmp_path) as truth:
        hidden = truth.tracer.start_span("GET /", kind=SpanKind.SERVER, attributes=WEB)
        below = set_span_in_context(hidden)
        truth.burn(None)
        with truth.tracer.start_as_current_span("other") as other:
            truth.burn(Label.of(other))
            with truth.tracer.start_as_current_span("child", context=below) as child:
                truth.burn(Label.of(child, hidden, "web"))
            middle = truth.tracer.start_span("middle", context=below)
            with truth.tracer.start_as_current_span(
                "grandchild", context=set_span_in_context(middle)
            ) as grandchild:
                truth.burn(Label.of(grandchild, hidden, "web"))
            truth.burn(Label.of(other))
        hidden.end()
    assert_right(truth.verdict())


def test_spans_ended_earlier_or_elsewhere(tmp_path: Path) -> None:
    """Policy: attached is what counts. Ended before that, or by another task, or twice."""
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        early = truth.tracer.start_span("ended before it is attached")
        early.end()
        with attached(set_span_in_context(early)):
            truth.burn(Label.of(early))
            with truth.tracer.start_as_current_span("child of an ended span") as child:
                truth.burn(Label.of(child, early))
            early.end()  # the SDK warns, and nothing changes
            truth.burn(Label.of(early))
            pool.submit(truth.unit(Label.of(early))).result()
        truth.burn(None)

        async def main() -> None:
            span = truth.tracer.start_span("ended by another task")
            token = attach(set_span_in_context(span))
            await asyncio.create_task(ends(span))
            truth.burn(Label.of(span))
            detach(token)
            truth.burn(None)

        async def ends(span: Span) -> None:
            span.end()
            truth.burn(Label.of(span))

        asyncio.run(main())
    assert_right(truth.verdict())


def test_one_span_current_in_many_places(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        span = truth.tracer.start_span("shared")

        def work() -> None:
            with use_span(span, end_on_exit=False):
                truth.burn(Label.of(span))
            truth.burn(None)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        span.end()
    assert_right(truth.verdict(), min_total=50)


# -- other runtime contexts -----------------------------------------------------------------------


class TheirContext(_RuntimeContext):
    """Another package's runtime context: a variable of its own, or on top of another one."""

    def __init__(self, below: _RuntimeContext | None = None) -> None:
        self._variable: contextvars.ContextVar[Context] = contextvars.ContextVar("theirs")
        self._below = below
        self.attached = 0

    def attach(self, context: Context) -> Any:
        self.attached += 1
        return self._below.attach(context) if self._below else self._variable.set(context)

    def get_current(self) -> Context:
        return self._below.get_current() if self._below else self._variable.get(Context())

    def detach(self, token: Any) -> None:
        if self._below:
            self._below.detach(token)
        else:
            self._variable.reset(token)


@pytest.fixture
def runtime() -> Iterator[None]:
    """Puts the stock runtime context back, whatever a test does."""
    before = context_api._RUNTIME_CONTEXT
    yield
    context_api._RUNTIME_CONTEXT = before


def work_under_spans(truth: GroundTruth, outside: Expectation = None) -> None:
    with truth.tracer.start_as_current_span("root", context=Context()) as root:
        truth.burn(Label.of(root))
        with truth.tracer.start_as_current_span("child") as child:
            truth.burn(Label.of(child, root))
        truth.burn(Label.of(root))
    truth.burn(outside)


@pytest.mark.usefixtures("runtime")
def test_another_runtime_context_before_ours(tmp_path: Path) -> None:
    theirs = TheirContext()
    context_api._RUNTIME_CONTEXT = theirs
    span = NonRecordingSpan(SpanContext(TRACE, PARENT, False))
    older = attach(set_span_in_context(span))
    with GroundTruth(tmp_path, pool=False) as truth:
        # Attached before we were there: visible to the application, and in no label.
        assert trace.get_current_span() is span
        work_under_spans(truth)
        assert trace.get_current_span() is span
        detach(older)
        assert theirs.get_current() == {}
        work_under_spans(truth)
    assert_right(truth.verdict())


@pytest.mark.usefixtures("runtime")
def test_another_runtime_context_on_top_of_ours(tmp_path: Path) -> None:
    with GroundTruth(tmp_path, pool=False) as truth:
        ours = context_api._RUNTIME_CONTEXT
        with truth.tracer.start_as_current_span("outer") as outer:
            theirs = TheirContext(ours)
            context_api._RUNTIME_CONTEXT = theirs
            truth.burn(Label.of(outer))
            work_under_spans(truth, Label.of(outer))
        assert theirs.attached
        work_under_spans(truth)
    assert_right(truth.verdict())


@pytest.mark.usefixtures("runtime")
def test_another_runtime_context_in_place_of_ours(tmp_path: Path) -> None:
    """One that does not call ours: nothing reaches us, so nothing is labelled."""
    with GroundTruth(tmp_path, pool=False) as truth:
        work_under_spans(truth)
        ours = context_api._RUNTIME_CONTEXT
        context_api._RUNTIME_CONTEXT = TheirContext()
        with truth.tracer.start_as_current_span("out of sight"):
            truth.burn(None)
        context_api._RUNTIME_CONTEXT = ours
        work_under_spans(truth)
    assert_right(truth.verdict())
