# SPDX-License-Identifier: Apache-2.0
"""Section B: `ThreadPoolExecutor.submit`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, get_current, set_value
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Tracer

from otel_proflink._linker import Link, current_link
from otel_proflink.instrumentation import thread_pool
from tests.support.ground_truth import GroundTruth, attached, linking, remote_context


class Bench:
    """A provider with our processor and a memory of the spans that ended."""

    def __init__(self, provider: TracerProvider, memory: InMemorySpanExporter) -> None:
        self.tracer: Tracer = provider.get_tracer("test")
        self._memory = memory

    def finished(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._memory.get_finished_spans()}

    def parent_of(self, name: str) -> str | None:
        spans = self.finished()
        parent = spans[name].parent
        if parent is None:
            return None
        names = [s.name for s in spans.values() if s.get_span_context() == parent]
        return names[0] if names else f"{parent.span_id:016x}"


@pytest.fixture
def bench() -> Iterator[Bench]:
    memory = InMemorySpanExporter()
    with linking(processors=[SimpleSpanProcessor(memory)]) as provider:
        yield Bench(provider, memory)


def ids_of(link: Link | None) -> tuple[int, int, int, str] | None:
    if link is None:
        return None
    return link.trace_id, link.span_id, link.local_root_span_id, link.span_type


def test_b1_submitters_context_and_span_stay(bench: Bench) -> None:
    with bench.tracer.start_as_current_span("root") as root, ThreadPoolExecutor(2) as pool:
        before, content = get_current(), dict(get_current())
        future = pool.submit(current_link)
        assert get_current() is before
        assert trace.get_current_span() is root
        future.result()
        assert get_current() is before
        assert dict(get_current()) == content
        assert current_link() is not None


def test_b2_manually_attached_remote_context_stays(bench: Bench) -> None:
    context = set_value("mine", 1, remote_context(0xA, 0xB))
    content = dict(context)
    with attached(context), ThreadPoolExecutor(1) as pool:
        assert ids_of(pool.submit(current_link).result()) == (0xA, 0xB, 0xB, "")
        assert get_current() is context
        assert dict(context) == content


def test_b3_worker_sees_a_copy_with_the_submitters_link(bench: Bench) -> None:
    def look() -> tuple[Context, Any, Link | None]:
        return get_current(), trace.get_current_span(), current_link()

    with (
        ThreadPoolExecutor(1) as pool,
        bench.tracer.start_as_current_span("root", kind=SpanKind.SERVER) as root,
        bench.tracer.start_as_current_span("mid"),
        bench.tracer.start_as_current_span("sub") as sub,
    ):
        context = get_current()
        worker_context, worker_span, link = pool.submit(look).result()
    assert worker_context is not context
    assert worker_span is sub
    own = sub.get_span_context()
    assert ids_of(link) == (own.trace_id, own.span_id, root.get_span_context().span_id, "web")


def test_b3_nothing_of_the_record_reaches_user_code_or_requests(bench: Bench) -> None:
    def request() -> tuple[dict[str, object], dict[str, str]]:
        carrier: dict[str, str] = {}
        W3CBaggagePropagator().inject(carrier)
        return dict(baggage.get_all()), carrier

    with ThreadPoolExecutor(1) as pool, bench.tracer.start_as_current_span("root"):
        assert pool.submit(request).result() == ({}, {})
        with attached(baggage.set_baggage("tenant", "acme")):
            assert pool.submit(request).result() == (
                {"tenant": "acme"},
                {"baggage": "tenant=acme"},
            )


class _Error(Exception):
    pass


def _echo(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "untraced"])
def test_b4_arguments_result_and_exception_are_unchanged(bench: Bench, traced: bool) -> None:
    context = remote_context(1, 2) if traced else Context()
    with attached(context), ThreadPoolExecutor(1) as pool:
        assert pool.submit(_echo).result() == ((), {})
        assert pool.submit(_echo, 1, 2).result() == ((1, 2), {})
        assert pool.submit(_echo, a=1, b=2).result() == ((), {"a": 1, "b": 2})
        assert pool.submit(_echo, 1, a=2).result() == ((1,), {"a": 2})
        # `fn`, `self`, `context` by keyword belong to the task.
        named = {"fn": 1, "self": 2, "context": 3, "function": 4}
        assert pool.submit(_echo, **named).result() == ((), named)
        # ... but where there is no task yet, `fn` is the task.
        assert pool.submit(fn=_echo, a=1).result() == ((), {"a": 1})  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="fn"):
            pool.submit()  # type: ignore[call-arg]

        same = object()
        assert pool.submit(lambda: same).result() is same
        error = _Error("theirs")
        assert pool.submit(_raise, error).exception() is error
        with pytest.raises(_Error) as raised:
            pool.submit(_raise, error).result()
        assert raised.value is error
        assert pool.submit(_raise, KeyboardInterrupt()).exception() is not None


def test_b5_uninstrument_twice_and_again() -> None:
    def linked(pool: ThreadPoolExecutor) -> bool:
        with attached(remote_context(1, 2)):
            return pool.submit(current_link).result() is not None

    with linking(pool=False), ThreadPoolExecutor(1) as pool:
        assert not linked(pool)
        thread_pool.instrument()
        wrapped = ThreadPoolExecutor.submit
        thread_pool.instrument()
        assert ThreadPoolExecutor.submit is wrapped
        assert linked(pool)
        thread_pool.uninstrument()
        assert not linked(pool)
        thread_pool.instrument()
        assert linked(pool)
        thread_pool.uninstrument()
        assert not linked(pool)


def test_b6_no_current_span(bench: Bench) -> None:
    def task() -> Link | None:
        before = current_link()
        with bench.tracer.start_as_current_span("worker span"):
            pass
        return before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(task).result() is None
        # The same thread, after a traced task.
        with bench.tracer.start_as_current_span("root"):
            assert pool.submit(current_link).result() is not None
        assert pool.submit(task).result() is None
    assert bench.parent_of("worker span") is None


def test_b6_no_current_span_means_no_label(tmp_path: Any) -> None:
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        pool.submit(truth.unit(None)).result()
    truth.verdict().assert_right()


def test_b7_many_futures(bench: Bench) -> None:
    def task(name: str) -> str:
        with bench.tracer.start_as_current_span(name):
            return name

    with ThreadPoolExecutor(4) as pool, bench.tracer.start_as_current_span("root"):
        futures = [pool.submit(task, f"task {i}") for i in range(100)]
        assert [f.result() for f in futures] == [f"task {i}" for i in range(100)]
    assert {bench.parent_of(f"task {i}") for i in range(100)} == {"root"}


def test_b7_submit_inside_a_worker(bench: Bench) -> None:
    def inner() -> Link | None:
        with bench.tracer.start_as_current_span("inner"):
            return current_link()

    def outer(pool: ThreadPoolExecutor) -> Link | None:
        with bench.tracer.start_as_current_span("outer"):
            return pool.submit(inner).result()

    with ThreadPoolExecutor(2) as pool, bench.tracer.start_as_current_span("root") as root:
        link = pool.submit(outer, pool).result()
    assert link is not None
    assert link.local_root_span_id == root.get_span_context().span_id
    assert bench.parent_of("inner") == "outer"
    assert bench.parent_of("outer") == "root"


def test_b7_nested_without_parent(bench: Bench) -> None:
    def inner() -> None:
        with bench.tracer.start_as_current_span("inner"):
            pass

    def outer(pool: ThreadPoolExecutor) -> Link | None:
        pool.submit(inner).result()
        return current_link()

    with ThreadPoolExecutor(2) as pool:
        assert pool.submit(outer, pool).result() is None
    assert bench.parent_of("inner") is None


def test_b7_submit_without_waiting(bench: Bench) -> None:
    gate = threading.Event()

    def late() -> Link | None:
        gate.wait(10)
        with bench.tracer.start_as_current_span("late"):
            return current_link()

    with ThreadPoolExecutor(1) as pool:
        with bench.tracer.start_as_current_span("root") as root:
            future = pool.submit(late)
        assert current_link() is None
        gate.set()
        link = future.result(10)
    assert link is not None
    assert link.local_root_span_id == root.get_span_context().span_id
    assert bench.parent_of("late") == "root"


def test_b9_map(bench: Bench) -> None:
    with ThreadPoolExecutor(4) as pool, bench.tracer.start_as_current_span("root") as root:
        links = list(pool.map(lambda _: current_link(), range(20)))
        assert list(pool.map(divmod, [7, 8], [2, 3])) == [(3, 1), (2, 2)]
    assert {link and link.span_id for link in links} == {root.get_span_context().span_id}


def test_b9_initializer_is_unlabelled(bench: Bench) -> None:
    seen: list[Any] = []

    def initializer(argument: int) -> None:
        seen.append((argument, current_link()))

    with (
        bench.tracer.start_as_current_span("root"),
        ThreadPoolExecutor(1, initializer=initializer, initargs=(7,)) as pool,
    ):
        assert pool.submit(current_link).result() is not None
    assert seen == [(7, None)]


def test_b9_done_callback_is_unlabelled(bench: Bench) -> None:
    gate, called = threading.Event(), threading.Event()
    seen: list[Any] = []

    def callback(_future: Future[Any]) -> None:
        seen.append((threading.current_thread().name, current_link(), trace.get_current_span()))
        called.set()

    with (
        bench.tracer.start_as_current_span("root"),
        ThreadPoolExecutor(1, thread_name_prefix="worker") as pool,
    ):
        future = pool.submit(gate.wait, 10)
        future.add_done_callback(callback)
        gate.set()
        assert called.wait(10)
    assert seen == [("worker_0", None, trace.INVALID_SPAN)]


def test_b9_cancelled_futures_never_link(bench: Bench) -> None:
    gate = threading.Event()
    ran: list[Link | None] = []

    with bench.tracer.start_as_current_span("root"):
        pool = ThreadPoolExecutor(1)
        running = pool.submit(gate.wait, 10)
        queued = [pool.submit(lambda: ran.append(current_link())) for _ in range(5)]
        assert queued[0].cancel()
        closer = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
        closer.start()
        for future in queued:
            with pytest.raises(CancelledError):
                future.result(10)
        gate.set()
        closer.join(10)
    assert running.result() is True
    assert ran == []


@pytest.mark.parametrize("switch", ["off", "on"])
def test_b10_queued_items_are_unaffected_by_the_switch(switch: str) -> None:
    gate = threading.Event()
    links: list[Link | None] = []

    def task() -> None:
        links.append(current_link())

    change: Callable[[], None] = thread_pool.instrument
    with linking(pool=False), ThreadPoolExecutor(1) as pool, attached(remote_context(1, 2)):
        if switch == "off":
            thread_pool.instrument()
            change = thread_pool.uninstrument
        futures = [pool.submit(gate.wait, 10), pool.submit(task)]
        change()
        futures.append(pool.submit(task))
        gate.set()
        wait(futures, 10)
        thread_pool.uninstrument()
    queued, after = (link is not None for link in links)
    assert (queued, after) == ((True, False) if switch == "off" else (False, True))
