# SPDX-License-Identifier: Apache-2.0
"""Section C: labels of pool workers, read back from the exported profile."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Span, SpanKind, get_current_span, set_span_in_context

from tests.support.ground_truth import (
    WEB,
    GroundTruth,
    Label,
    attached,
    read_profiles,
    remote_context,
    verify,
)


def web_root(truth: GroundTruth, name: str = "GET /"):  # type: ignore[no-untyped-def]
    return truth.tracer.start_as_current_span(name, kind=SpanKind.SERVER, attributes=WEB)


def test_c1_task_without_own_span(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(4) as pool, web_root(truth) as root:
        wait([pool.submit(truth.unit(Label.of(root, span_type="web"))) for _ in range(8)])
    truth.verdict().assert_right(min_total=100)


def test_c1_sampled_out_and_remote_spans(tmp_path: Path) -> None:
    """No span object of ours, no processor that saw one: the record says it all."""
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(2) as pool:
        truth.provider.sampler = ALWAYS_OFF
        dark = truth.provider.get_tracer("sampled out")
        with dark.start_as_current_span("dark root", kind=SpanKind.SERVER) as root:
            assert not root.is_recording()
            pool.submit(truth.unit(Label.of(root, span_type=""))).result()
            with dark.start_as_current_span("dark child") as child:
                pool.submit(truth.unit(Label.of(child, root, span_type=""))).result()
        with attached(remote_context(0xFF00FF, 0x0A)):
            pool.submit(truth.unit(Label(0xFF00FF, 0x0A, 0x0A))).result()
    truth.verdict().assert_right()


def test_c2_explicit_child_span_in_the_worker(tmp_path: Path) -> None:
    def task(root: Span) -> None:
        with truth.tracer.start_as_current_span("child", kind=SpanKind.CLIENT) as child:
            truth.burn(Label.of(child, root, "web"))

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(2) as pool, web_root(truth) as root:
        wait([pool.submit(task, root) for _ in range(4)])
    truth.verdict().assert_right()


def test_c3_submitter_nested_three_deep(tmp_path: Path) -> None:
    with (
        GroundTruth(tmp_path) as truth,
        ThreadPoolExecutor(2) as pool,
        web_root(truth) as root,
        truth.tracer.start_as_current_span("mid"),
        truth.tracer.start_as_current_span("sub") as sub,
    ):
        wait([pool.submit(truth.unit(Label.of(sub, root, "web"))) for _ in range(4)])
    truth.verdict().assert_right()


def test_c4_spans_two_and_more_deep_inside_the_worker(tmp_path: Path) -> None:
    def task(root: Span) -> None:
        with truth.tracer.start_as_current_span("one") as one:
            truth.burn(Label.of(one, root, "web"))
            with truth.tracer.start_as_current_span("two") as two:
                truth.burn(Label.of(two, root, "web"))
                with truth.tracer.start_as_current_span("three") as three:
                    truth.burn(Label.of(three, root, "web"))

    with (
        GroundTruth(tmp_path) as truth,
        ThreadPoolExecutor(2) as pool,
        web_root(truth) as root,
        truth.tracer.start_as_current_span("mid"),
    ):
        wait([pool.submit(task, root) for _ in range(3)])
    truth.verdict().assert_right()


def test_c5_back_to_the_submitters_span_and_to_none(tmp_path: Path) -> None:
    def task(root: Span) -> None:
        truth.burn(Label.of(root, span_type="web"))
        with truth.tracer.start_as_current_span("child") as child:
            truth.burn(Label.of(child, root, "web"))
        truth.burn(Label.of(root, span_type="web"))

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool, web_root(truth) as root:
        future = pool.submit(task, root)
        # After the task, on the worker: a callback runs under no span.
        after = truth.unit(None)
        future.add_done_callback(lambda _future: after())
        future.result()
    truth.verdict().assert_right()


@pytest.mark.parametrize("traced_again", [False, True], ids=["c6", "c7 and back"])
def test_c6_c7_untraced_after_traced_on_the_same_thread(tmp_path: Path, traced_again: bool) -> None:
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with web_root(truth) as root:
                pool.submit(truth.unit(Label.of(root, span_type="web"))).result()
            pool.submit(truth.unit(None)).result()
            if traced_again:
                with web_root(truth) as root:
                    pool.submit(truth.unit(Label.of(root, span_type="web"))).result()
    truth.verdict().assert_right()


def test_c8_span_ended_on_another_thread(tmp_path: Path) -> None:
    """Policy: the label stays for as long as the context is attached here."""
    with GroundTruth(tmp_path) as truth:
        span = truth.tracer.start_span("handed over")
        with attached(set_span_in_context(span)):
            truth.burn(Label.of(span))
            ender = threading.Thread(target=span.end)
            ender.start()
            ender.join()
            truth.burn(Label.of(span))
        truth.burn(None)
    truth.verdict().assert_right()


@pytest.mark.parametrize("started", ["before", "after"])
def test_c9_fire_and_forget(tmp_path: Path, started: str) -> None:
    gate = threading.Event()
    begun = threading.Event()

    def task(unit: Callable[[], int]) -> None:
        begun.set()
        gate.wait(10)
        unit()

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        if started == "after":
            pool.submit(gate.wait, 10)
        with web_root(truth) as root:
            future = pool.submit(task, truth.unit(Label.of(root, span_type="web")))
            if started == "before":
                assert begun.wait(10)
        gc.collect()
        gate.set()
        future.result(10)
    truth.verdict().assert_right()


def test_c10_root_ends_before_its_active_child(tmp_path: Path) -> None:
    def task(root: Span) -> None:
        with truth.tracer.start_as_current_span("child") as child:
            truth.burn(Label.of(child, root, "web"))
            root.end()
            gc.collect()
            truth.burn(Label.of(child, root, "web"))
            with truth.tracer.start_as_current_span("grandchild") as grandchild:
                truth.burn(Label.of(grandchild, root, "web"))

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        root = truth.tracer.start_span("GET /", kind=SpanKind.SERVER, attributes=WEB)
        with attached(set_span_in_context(root)):
            future = pool.submit(task, root)
        future.result()
    truth.verdict().assert_right()


def _current_label() -> Label | None:
    span = get_current_span()
    return Label.of(span) if span.get_span_context().is_valid else None


def test_c11_detach_out_of_order(tmp_path: Path) -> None:
    """Whatever the tokens are used for, the label is that of `get_current()`."""
    with GroundTruth(tmp_path) as truth:
        first, second = truth.tracer.start_span("first"), truth.tracer.start_span("second")
        older = attach(set_span_in_context(first, Context()))
        newer = attach(set_span_in_context(second, Context()))
        truth.burn(Label.of(second))

        detach(older)
        truth.burn(_current_label())
        detach(newer)
        truth.burn(_current_label())
        # A token can be used once: nothing changes.
        current = get_current()
        detach(older)
        assert get_current() is current
        truth.burn(_current_label())
        attach(Context())  # empty, so falsy; still a context, and one without a span
        truth.burn(None)
    truth.verdict().assert_right()


def test_c11_detach_on_another_thread_never_erases_the_newer(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        first, second = truth.tracer.start_span("first"), truth.tracer.start_span("second")
        older = attach(set_span_in_context(first, Context()))
        newer = attach(set_span_in_context(second, Context()))
        stop = threading.Event()

        def race() -> None:
            while not stop.is_set():
                detach(older)  # refused and logged: it belongs to another thread
                time.sleep(0.001)

        racer = threading.Thread(target=race)
        racer.start()
        for _ in range(20):
            token = attach(set_span_in_context(second, Context()))
            truth.burn(Label.of(second), 0.01)
            detach(token)
        stop.set()
        racer.join()
        truth.burn(Label.of(second))
        detach(newer)
        truth.burn(Label.of(first))
        detach(older)
        truth.burn(None)
    truth.verdict().assert_right(min_samples=0, min_total=50)


def test_c12_thread_exit_and_ident_reuse(tmp_path: Path) -> None:
    idents: set[int] = set()
    reused = 0

    def traced(root: Span, unit: Callable[[], int]) -> None:
        attach(set_span_in_context(root))  # and never detached: the thread dies with it
        unit()
        idents.add(threading.get_ident())

    def untraced(unit: Callable[[], int]) -> None:
        nonlocal reused
        reused += threading.get_ident() in idents
        unit()

    with GroundTruth(tmp_path) as truth:
        for _ in range(5):
            root = truth.tracer.start_span("root")
            work = truth.unit(Label.of(root))
            for target, args in ((traced, (root, work)), (untraced, (truth.unit(None),))):
                thread = threading.Thread(target=target, args=args)
                thread.start()
                thread.join()
                time.sleep(0.005)  # join returns shortly before the thread, and its ident, are free
    assert reused, "no thread ident was used again: the test shows nothing"
    truth.verdict().assert_right()


def test_c12_stop_and_restart(tmp_path: Path) -> None:
    """What was attached before a restart is labelled after it; what was detached is not."""
    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        with web_root(truth) as root:
            for _ in range(4):
                label = Label.of(root, span_type="web")
                truth.burn(label)
                pool.submit(truth.unit(label)).result()
                assert truth.profiler.stop()
                truth.start()
        for _ in range(10):
            truth.profiler.stop()
            truth.profiler.start()
        truth.start()
        truth.burn(None)
        pool.submit(truth.unit(None)).result()
    truth.verdict().assert_right()


def test_c13_exception_in_the_task(tmp_path: Path) -> None:
    def failing(unit: Callable[[], int]) -> None:
        unit()
        raise ValueError("theirs")

    def failing_within_spans(root: Span) -> None:
        with truth.tracer.start_as_current_span("child") as child:
            attach(set_span_in_context(child))  # left attached by the way out
            failing(truth.unit(Label.of(child, root, "web")))

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(1) as pool:
        with web_root(truth) as root:
            label = Label.of(root, span_type="web")
            assert isinstance(pool.submit(failing, truth.unit(label)).exception(), ValueError)
            assert isinstance(pool.submit(failing_within_spans, root).exception(), ValueError)
            # The next task of the same thread, and its callback, which runs after it.
            future: Future[int] = pool.submit(truth.unit(label))
            after = truth.unit(None)
            future.add_done_callback(lambda _future: after())
            future.result()
        pool.submit(truth.unit(None)).result()
    truth.verdict().assert_right()


def test_c14_nested_executors(tmp_path: Path) -> None:
    def middle(root: Span) -> None:
        with truth.tracer.start_as_current_span("middle") as own:
            truth.burn(Label.of(own, root, "web"))
            inner_pool.submit(inner, root).result()
        # ... and submitted without a span of its own, before and after
        inner_pool.submit(truth.unit(Label.of(root, span_type="web"))).result()

    def inner(root: Span) -> None:
        with truth.tracer.start_as_current_span("inner") as own:
            truth.burn(Label.of(own, root, "web"))

    with (
        GroundTruth(tmp_path) as truth,
        ThreadPoolExecutor(2) as outer_pool,
        ThreadPoolExecutor(2) as inner_pool,
        web_root(truth) as root,
    ):
        wait([outer_pool.submit(middle, root) for _ in range(3)])
    truth.verdict().assert_right()


def test_c_random_mix(tmp_path: Path) -> None:
    """A pool of 4; context only, own span, nested, untraced; waiting and not; 4, 20, 200 ms."""
    rng = random.Random(20260)

    def own_span(root: Span, seconds: float) -> None:
        with truth.tracer.start_as_current_span("own") as own:
            truth.burn(Label.of(own, root, "web"), seconds)

    def nested(root: Span, seconds: float) -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            truth.burn(Label.of(outer, root, "web"), seconds / 2)
            with truth.tracer.start_as_current_span("inner") as inner:
                truth.burn(Label.of(inner, root, "web"), seconds / 2)

    with GroundTruth(tmp_path) as truth, ThreadPoolExecutor(4) as pool:
        futures: list[Future[object]] = []
        for _ in range(30):
            with web_root(truth) as root:
                waits_for: list[Future[object]] = []
                for _ in range(rng.randint(1, 6)):
                    seconds = rng.choices([0.004, 0.02, 0.2], [8, 4, 1])[0]
                    kind = rng.choice(["context", "own", "nested"])
                    if kind == "context":
                        unit = truth.unit(Label.of(root, span_type="web"), seconds)
                        future: Future[object] = pool.submit(unit)
                    else:
                        task = own_span if kind == "own" else nested
                        future = pool.submit(task, root, seconds)
                    futures.append(future)
                    if rng.random() < 0.5:
                        waits_for.append(future)
                wait(waits_for)
            if rng.random() < 0.5:
                futures.append(pool.submit(truth.unit(None, rng.choice([0.004, 0.02]))))
        for future in futures:
            future.result()
    verdict = truth.verdict()
    verdict.assert_right(min_samples=0, min_total=1000)
    untraced = [name for name, expected in truth.expected.items() if expected is None]
    assert verdict.total(untraced).right > 20, "too few samples"


def test_the_harness_finds_what_is_wrong(tmp_path: Path) -> None:
    """Or else nothing above shows anything."""
    with GroundTruth(tmp_path) as truth:
        with truth.tracer.start_as_current_span("root") as root:
            truth.burn(Label.of(root))
            truth.burn(None)  # a lie
            other = truth.tracer.start_span("other")
            truth.burn(Label.of(other, root))  # a lie
        truth.burn(Label.of(root))  # a lie: no label at all
    verdict = verify(read_profiles(tmp_path), truth.expected)
    right, lie, wrong, none = verdict.counts.values()
    assert right.right > 0, "too few samples"
    assert (right.wrong, right.unknown) == (0, 0)
    assert lie.wrong > 0
    assert lie.right == 0
    assert wrong.wrong > 0
    assert none.unknown > 0
    with pytest.raises(AssertionError, match="wrong labels"):
        verdict.assert_right()
