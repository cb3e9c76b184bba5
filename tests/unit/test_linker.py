# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import opentelemetry.context as context_api
import pytest
from opentelemetry import baggage, trace
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider, sampling
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from otel_proflink import _linker, runtime_context
from otel_proflink._linker import (
    LOCAL_ROOT_KEY,
    SPAN_TYPE_KEY,
    current_link,
    link_for_context,
    link_of,
    new_link,
)

TRACE = 0x0123456789ABCDEF_FEDCBA9876543210


class Processor(_linker.SpanHooks, SpanProcessor):
    pass


@pytest.fixture(autouse=True)
def _hook() -> Iterator[None]:
    runtime_context.install()
    yield
    runtime_context.uninstall()


@pytest.fixture
def tracer() -> trace.Tracer:
    provider = TracerProvider()
    provider.add_span_processor(Processor())
    return provider.get_tracer("test")


def remote(span_id: int = 0xAA, sampled: bool = True) -> NonRecordingSpan:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else 0)
    return NonRecordingSpan(SpanContext(TRACE, span_id, is_remote=True, trace_flags=flags))


def test_a_link_keeps_every_bit() -> None:
    link = new_link(TRACE, 0x8000000000000001, 3, 0xFEDCBA9876543210, "web")
    assert link.trace_id == TRACE
    assert link.span_id == 0x8000000000000001
    assert link.local_root_span_id == 0xFEDCBA9876543210
    assert link.trace_flags == 3
    assert link.span_type == "web"
    assert f"trace_id={TRACE:032x}" in repr(link)


def test_links_compare_by_value_and_pickle() -> None:
    link = new_link(TRACE, 1, 1, 2, "wörker")
    other = new_link(TRACE, 1, 1, 2, "wörker")
    assert link == other
    assert hash(link) == hash(other)
    assert link.serial != other.serial
    assert link != new_link(TRACE, 1, 1, 3, "wörker")
    assert pickle.loads(pickle.dumps(link)) == link
    assert copy.deepcopy(link) == link
    assert link != "link"


@pytest.mark.parametrize("ids", [(0, 1), (1, 0)])
def test_zero_ids_make_no_link(ids: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not 0"):
        new_link(ids[0], ids[1], 1, 1, "")


@pytest.mark.parametrize("ids", [(1 << 128, 1, 1), (-1, 1, 1), (1, 1 << 64, 1), (1, 1, 1 << 64)])
def test_ids_out_of_range(ids: tuple[int, int, int]) -> None:
    with pytest.raises((OverflowError, ValueError)):
        new_link(ids[0], ids[1], 1, ids[2], "")


def test_serials_are_never_used_twice() -> None:
    seen = set()
    for _ in range(10_000):
        seen.add(new_link(1, 1, 0, 1, "").serial)
    assert len(seen) == 10_000


def test_records_are_given_back(tracer: trace.Tracer) -> None:
    gc.collect()
    before = _linker.live_links()
    for _ in range(1000):
        with tracer.start_as_current_span("s"):
            pass
    gc.collect()
    assert _linker.live_links() <= before + 2


def test_more_span_types_than_the_table_holds() -> None:
    # In a process of its own: the table is full afterwards.
    program = """
from otel_proflink._linker import new_link
links = [new_link(1, 1, 0, 1, f"type-{i}") for i in range(400)]
assert all(link.span_type in (f"type-{i}", "") for i, link in enumerate(links))
assert links[0].span_type == "type-0"
assert links[399].span_type == ""
for known in ("web", "worker", "rpc", "db", "messaging", "client", "internal"):
    assert new_link(1, 1, 0, 1, known).span_type == known
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("depth", [1, 2, 3, 50])
def test_local_root_and_type_at_any_depth(tracer: trace.Tracer, depth: int) -> None:
    spans = []
    tokens = []
    for i in range(depth):
        kind = SpanKind.SERVER if i == 0 else SpanKind.CLIENT
        span = tracer.start_span(f"s{i}", kind=kind)
        tokens.append(context_api.attach(trace.set_span_in_context(span)))
        spans.append(span)
    root = spans[0].get_span_context().span_id
    link = current_link()
    assert link is not None
    assert link.span_id == spans[-1].get_span_context().span_id
    assert link.local_root_span_id == root
    assert link.span_type == "web"
    for token in reversed(tokens):
        context_api.detach(token)
    assert current_link() is None


def test_root_is_inherited_from_an_explicit_parent_context(tracer: trace.Tracer) -> None:
    root = tracer.start_span("root", kind=SpanKind.CONSUMER)
    middle = tracer.start_span("middle", context=trace.set_span_in_context(root))
    leaf = tracer.start_span("leaf", context=trace.set_span_in_context(middle))
    link = link_of(leaf)
    assert link is not None
    assert link.local_root_span_id == root.get_span_context().span_id
    assert link.span_type == "messaging"


def test_a_remote_parent_is_not_a_local_root(tracer: trace.Tracer) -> None:
    parent = trace.set_span_in_context(remote())
    token = context_api.attach(parent)
    link = current_link()
    assert link is not None
    assert (link.span_id, link.local_root_span_id, link.span_type) == (0xAA, 0xAA, "")
    span = tracer.start_span("server", kind=SpanKind.SERVER)
    child_link = link_of(span)
    assert child_link is not None
    assert child_link.local_root_span_id == span.get_span_context().span_id
    assert child_link.trace_id == TRACE
    context_api.detach(token)


def test_baggage_gives_a_remote_span_its_root(tracer: trace.Tracer) -> None:
    context = trace.set_span_in_context(remote())
    context = baggage.set_baggage(LOCAL_ROOT_KEY, f"{0x99:016x}", context)
    context = baggage.set_baggage(SPAN_TYPE_KEY, "web", context)
    link = link_for_context(context)
    assert link is not None
    assert (link.span_id, link.local_root_span_id, link.span_type) == (0xAA, 0x99, "web")
    child = link_of(tracer.start_span("child", context=context))
    assert child is not None
    assert (child.local_root_span_id, child.span_type) == (0x99, "web")


@pytest.mark.parametrize("root", ["", "xyz", "0" * 16, "1" * 15, "g" * 16, 5, None])
def test_bad_baggage_is_ignored(root: object) -> None:
    context = trace.set_span_in_context(remote(span_id=0xBB))
    context = baggage.set_baggage(LOCAL_ROOT_KEY, root, context)
    link = link_for_context(context)
    assert link is not None
    assert link.local_root_span_id == 0xBB


def test_sampled_out_spans_are_linked_and_inherit() -> None:
    provider = TracerProvider(sampler=sampling.ALWAYS_OFF)
    provider.add_span_processor(Processor())
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("root") as root:
        assert not root.is_recording()
        link = current_link()
        assert link is not None
        assert link.trace_flags & 1 == 0
        with tracer.start_as_current_span("child") as child:
            inner = current_link()
            assert inner is not None
            assert inner.span_id == child.get_span_context().span_id
            assert inner.local_root_span_id == root.get_span_context().span_id


def test_invalid_span_and_empty_context_clear_the_link(tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("s"):
        for context in (
            context_api.Context(),
            trace.set_span_in_context(trace.INVALID_SPAN, context_api.Context()),
        ):
            token = context_api.attach(context)
            assert current_link() is None
            context_api.detach(token)
            assert current_link() is not None


def test_a_span_started_but_not_attached_gives_no_label(tracer: trace.Tracer) -> None:
    span = tracer.start_span("idle")
    assert current_link() is None
    assert link_of(span) is not None


def test_explicit_type_overrides(tracer: trace.Tracer) -> None:
    span = tracer.start_span("s", kind=SpanKind.SERVER, attributes={"proflink.span_type": "batch"})
    link = link_of(span)
    assert link is not None
    assert link.span_type == "batch"


def test_spans_that_take_no_attributes() -> None:
    class Slotted(NonRecordingSpan):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            if name.startswith("_proflink"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    span = Slotted(SpanContext(TRACE, 7, is_remote=False))
    token = context_api.attach(trace.set_span_in_context(span))
    link = current_link()
    assert link is not None
    assert link.span_id == 7
    context_api.detach(token)


@pytest.mark.parametrize("context", [None, 5, {}, {"current-span": 3}])
def test_odd_contexts_never_raise(context: object) -> None:
    token = context_api.attach(context)  # type: ignore[arg-type]
    assert current_link() is None
    context_api.detach(token)


def test_a_span_whose_methods_raise_never_reaches_the_application() -> None:
    class Broken(NonRecordingSpan):
        def get_span_context(self) -> SpanContext:
            raise RuntimeError("broken")

    span = Broken(SpanContext(1, 1, is_remote=False))
    token = context_api.attach(trace.set_span_in_context(span))
    assert current_link() is None
    context_api.detach(token)
    Processor().on_start(object())  # type: ignore[arg-type]


def test_label_is_always_the_current_span_whatever_the_order_of_detach(
    tracer: trace.Tracer,
) -> None:
    def agree() -> None:
        span = trace.get_current_span()
        link = current_link()
        if not span.get_span_context().is_valid:
            assert link is None
        else:
            assert link is not None
            assert link.span_id == span.get_span_context().span_id

    a = tracer.start_span("a")
    b = tracer.start_span("b")
    older = context_api.attach(trace.set_span_in_context(a))
    newer = context_api.attach(trace.set_span_in_context(b))
    agree()
    context_api.detach(older)
    agree()
    context_api.detach(newer)
    agree()
    context_api.detach(newer)  # used twice: logged by the API, nothing changes
    agree()
    fresh = context_api.attach(context_api.Context())
    agree()
    context_api.detach(fresh)


def test_threads_do_not_see_each_other(tracer: trace.Tracer) -> None:
    wrong: list[object] = []

    def work() -> None:
        for _ in range(300):
            with tracer.start_as_current_span("s") as span:
                link = current_link()
                if link is None or link.span_id != span.get_span_context().span_id:
                    wrong.append(link)
            if current_link() is not None:
                wrong.append("left over")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_values_do_not_leak(tracer: trace.Tracer) -> None:
    hook = runtime_context.installed()
    assert hook is not None
    gc.collect()
    before = hook.alive
    for _ in range(1000):
        with tracer.start_as_current_span("s"):
            pass
    gc.collect()
    assert hook.alive == before


def test_a_cycle_through_a_context_is_collected() -> None:
    hook = runtime_context.installed()
    assert hook is not None
    gc.collect()
    before = hook.alive

    def make() -> None:
        import contextvars

        holder: dict[str, object] = {}
        context = context_api.Context({"holder": holder})
        inner = contextvars.Context()
        inner.run(context_api.attach, context)
        holder["inner"] = inner  # inner -> value -> context -> holder -> inner

    for _ in range(10):
        make()
    gc.collect()
    assert hook.alive == before


def test_processor_links_spans_of_the_sdk(tracer: trace.Tracer) -> None:
    span = tracer.start_span("s")
    assert isinstance(span, Span)
    link = link_of(span)
    assert link is not None
    assert link.trace_id == span.get_span_context().trace_id
