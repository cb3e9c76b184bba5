# SPDX-License-Identifier: Apache-2.0
"""How the pool's wrappers come and go, and what they must not do to a submit."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as pool_module
from typing import Any

import pytest
import wrapt
from opentelemetry.context import Context, get_current
from opentelemetry.instrumentation.utils import unwrap

from otel_proflink._linker import current_link
from otel_proflink.instrumentation import thread_pool
from tests.support.ground_truth import attached, linking, remote_context

STOCK_SUBMIT = vars(ThreadPoolExecutor)["submit"]
STOCK_WORKER = vars(pool_module)["_worker"]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    thread_pool.uninstrument()
    leftover = vars(ThreadPoolExecutor)["submit"], vars(pool_module)["_worker"]
    ThreadPoolExecutor.submit = STOCK_SUBMIT  # type: ignore[method-assign]
    pool_module._worker = STOCK_WORKER
    assert leftover == (STOCK_SUBMIT, STOCK_WORKER)


class Foreign:
    """Another instrumentation of `submit`, that comes and goes as OpenTelemetry's own do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, wrapped: Callable[..., Any], _pool: Any, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        return wrapped(*args, **kwargs)

    def instrument(self) -> None:
        wrapt.wrap_function_wrapper(ThreadPoolExecutor, "submit", self)

    def uninstrument(self) -> None:
        unwrap(ThreadPoolExecutor, "submit")


def linked_in_worker() -> bool:
    with attached(remote_context(1, 2)), ThreadPoolExecutor(1) as pool:
        return pool.submit(current_link).result() is not None


ORDERS = [
    order
    for order in itertools.permutations(["+ours", "+theirs", "-ours", "-theirs"])
    if order.index("+ours") < order.index("-ours")
    and order.index("+theirs") < order.index("-theirs")
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_each_takes_off_its_own_in_any_order(order: tuple[str, ...]) -> None:
    theirs = Foreign()
    steps = {
        "+ours": thread_pool.instrument,
        "-ours": thread_pool.uninstrument,
        "+theirs": theirs.instrument,
        "-theirs": theirs.uninstrument,
    }
    on = set()
    with linking(pool=False):
        for step in order:
            steps[step]()
            (on.add if step[0] == "+" else on.discard)(step[1:])
            before = theirs.calls
            assert linked_in_worker() == ("ours" in on), step
            assert theirs.calls - before == ("theirs" in on), step
    assert getattr(STOCK_SUBMIT, "__wrapped__", None) is None


def test_instrument_twice_wraps_once() -> None:
    thread_pool.instrument()
    once = vars(ThreadPoolExecutor)["submit"], vars(pool_module)["_worker"]
    thread_pool.instrument()
    assert (vars(ThreadPoolExecutor)["submit"], vars(pool_module)["_worker"]) == once
    assert once[0].__wrapped__ is STOCK_SUBMIT
    thread_pool.uninstrument()
    thread_pool.uninstrument()


def test_what_another_wrapper_hides_is_switched_off_all_the_same() -> None:
    """A plain function around ours: we cannot get at ours, and must not wrap a second time."""
    with linking():
        hidden = vars(ThreadPoolExecutor)["submit"]

        @functools.wraps(hidden)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            return hidden(*args, **kwargs)

        ThreadPoolExecutor.submit = theirs  # type: ignore[method-assign]
        assert linked_in_worker()
        thread_pool.uninstrument()
        assert not linked_in_worker()
        thread_pool.instrument()
        assert linked_in_worker()
        thread_pool.uninstrument()
        assert not linked_in_worker()
        ThreadPoolExecutor.submit = STOCK_SUBMIT  # type: ignore[method-assign]


def test_submit_looks_like_the_stock_one() -> None:
    thread_pool.instrument()
    assert inspect.signature(ThreadPoolExecutor.submit) == inspect.signature(STOCK_SUBMIT)
    assert ThreadPoolExecutor.submit.__doc__ == STOCK_SUBMIT.__doc__
    assert ThreadPoolExecutor.submit.__qualname__ == STOCK_SUBMIT.__qualname__


def test_our_failure_never_breaks_a_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("ours")

    monkeypatch.setattr(thread_pool, "propagated", broken)
    with linking(), attached(remote_context(1, 2)), ThreadPoolExecutor(1) as pool:
        assert pool.submit(divmod, 7, 2).result() == (3, 1)


def test_submit_after_shutdown_raises_as_stock() -> None:
    def refusal() -> str:
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        with pytest.raises(RuntimeError) as error:
            pool.submit(print)
        return str(error.value)

    stock = refusal()
    with linking():
        assert refusal() == stock


def test_a_submit_that_raises_is_not_tried_twice() -> None:
    calls = []

    class Refusing(ThreadPoolExecutor):
        def _adjust_thread_count(self) -> None:
            calls.append(1)
            raise MemoryError("theirs")

    with linking(), pytest.raises(MemoryError):
        Refusing(1).submit(print)
    assert calls == [1]


def test_what_is_not_callable_fails_as_stock() -> None:
    def failure() -> str:
        with ThreadPoolExecutor(1) as pool:
            return repr(pool.submit(42).exception())  # type: ignore[arg-type]

    stock = failure()
    with linking():
        assert failure() == stock


def test_a_subclass_is_served() -> None:
    class Named(ThreadPoolExecutor):
        def submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().submit(fn, *args, **kwargs)

    with linking(), attached(remote_context(1, 2)), Named(1) as pool:
        link = pool.submit(current_link).result()
        # Such a class takes `fn` by name, as everybody could before Python 3.9.
        assert pool.submit(fn=current_link).result() == link
    assert link is not None


def test_nothing_is_kept_once_a_task_is_done() -> None:
    class Payload:
        pass

    def task(payload: Payload) -> Payload:
        return payload

    gc.disable()  # no cycle may have to be broken
    try:
        with linking() as provider, ThreadPoolExecutor(1) as pool:
            payload = Payload()
            with provider.get_tracer("test").start_as_current_span("root") as span:
                pool.submit(task, payload).result()
                pool.submit(len, "").result()  # the worker has let go of the task before
            gone = weakref.ref(payload), weakref.ref(span)
            del payload, span
            # The next task takes the place of the last one in whatever the worker holds.
            pool.submit(len, "").result()
            assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_a_failed_task_leaves_no_cycle_of_ours() -> None:
    class Payload:
        pass

    def task(payload: Payload) -> None:
        raise ValueError

    gc.disable()
    try:
        with linking(), attached(remote_context(1, 2)), ThreadPoolExecutor(1) as pool:
            payload = Payload()
            assert isinstance(pool.submit(task, payload).exception(), ValueError)
            pool.submit(len, "").result()
            gone = weakref.ref(payload)
            del payload
            assert gone() is None
    finally:
        gc.enable()


def test_a_pools_thread_starts_with_nothing_attached() -> None:
    """Whatever the thread was started under: `Thread.run` may have been instrumented."""
    seen = []

    class Inheriting(threading.Thread):
        def run(self) -> None:
            with attached(remote_context(3, 4)):
                super().run()
                seen.append(current_link())

    def initializer() -> None:
        seen.append(current_link())

    with linking(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module.threading, "Thread", Inheriting)
        with ThreadPoolExecutor(1, initializer=initializer) as pool:
            assert pool.submit(current_link).result() is None
            assert pool.submit(get_current).result() == Context()
    assert seen[0] is None
    assert seen[1] is not None, "what the thread had attached is its own again at its end"


def test_a_python_without_worker_function_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pool_module, "_worker")
    thread_pool.instrument()
    assert vars(ThreadPoolExecutor)["submit"] is not STOCK_SUBMIT
    assert not hasattr(pool_module, "_worker")
    thread_pool.uninstrument()
    assert not hasattr(pool_module, "_worker")


@pytest.mark.skipif(sys.version_info < (3, 14), reason="InterpreterPoolExecutor is new in 3.14")
def test_a_pool_of_interpreters_is_left_alone() -> None:
    executor = concurrent.futures.InterpreterPoolExecutor  # type: ignore[attr-defined]
    with linking(), attached(remote_context(1, 2)), executor(1) as pool:
        assert pool.submit(divmod, 7, 2).result() == (3, 1)
