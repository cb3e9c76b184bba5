# SPDX-License-Identifier: Apache-2.0
"""`threading`'s threads: how the wrappers come and go, whom they leave alone, what shows."""

from __future__ import annotations

import contextvars
import functools
import itertools
import logging.handlers
import multiprocessing.pool
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry.context import Context, get_current
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from otel_proflink._linker import current_link
from otel_proflink.instrumentation import modules, threads
from tests.support.ground_truth import attached, linking, needs_sampler, remote_context
from tests.support.processes import run_app

STOCK = {name: vars(threading.Thread)[name] for name in ("start", "run", "_set_native_id")}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    modules.uninstrument()
    leftover = {name: vars(threading.Thread)[name] for name in STOCK}
    assert leftover == STOCK


def in_thread(
    function: Callable[[], Any], make: Callable[..., threading.Thread] = threading.Thread
) -> Any:
    answers: list[Any] = []
    thread = make(target=lambda: answers.append(function()))
    thread.start()
    thread.join()
    return answers[0]


def linked() -> bool:
    with attached(remote_context(1, 2)):
        return in_thread(current_link) is not None


def test_on_off_twice_and_again() -> None:
    with linking(pool=False):
        assert not linked()
        threads.instrument()
        wrapped = threading.Thread.start
        threads.instrument()
        assert threading.Thread.start is wrapped
        assert linked()
        threads.uninstrument()
        assert not linked()
        threads.instrument()
        assert linked()


@pytest.mark.parametrize(
    "order",
    [
        order
        for order in itertools.permutations(["+ours", "+theirs", "-ours", "-theirs"])
        if order.index("+ours") < order.index("-ours")
        and order.index("+theirs") < order.index("-theirs")
    ],
    ids=" ".join,
)
def test_each_leaves_without_the_other(order: tuple[str, ...]) -> None:
    package = pytest.importorskip("opentelemetry.instrumentation.threading")
    theirs = package.ThreadingInstrumentor()
    steps = {
        "+ours": threads.instrument,
        "-ours": threads.uninstrument,
        "+theirs": theirs.instrument,
        "-theirs": theirs.uninstrument,
    }
    on = set()
    with linking(pool=False):
        for step in order:
            steps[step]()
            (on.add if step[0] == "+" else on.discard)(step[1:])
            assert linked() == bool(on), step
            with attached(remote_context(1, 2)):
                timer = in_thread(current_link, lambda target: threading.Timer(0, target))
            assert (timer is not None) == bool(on), step


def test_switched_off_while_a_thread_runs() -> None:
    gate = threading.Event()
    links: list[Any] = []

    def work() -> None:
        links.append(current_link())
        gate.wait(60)
        links.append(current_link())

    with linking(pool=False):
        threads.instrument()
        with attached(remote_context(1, 2)):
            thread = threading.Thread(target=work)
            thread.start()
        threads.uninstrument()
        gate.set()
        thread.join()
    assert [link is not None for link in links] == [True, True]


def test_the_starters_context_is_not_touched() -> None:
    context = remote_context(1, 2)
    with linking(pool=False), attached(context):
        threads.instrument()
        assert in_thread(get_current) is context
        assert get_current() is context
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        left = [value for value in vars(thread).values() if value is context]
        assert left == [], "a thread that is kept must not keep the span"


def test_no_context_is_carried_where_there_is_none() -> None:
    with linking(pool=False):
        threads.instrument()
        assert in_thread(get_current) == Context()


def test_starting_twice_fails_as_ever() -> None:
    with linking(pool=False), attached(remote_context(1, 2)):
        threads.instrument()
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="once"):
            thread.start()
        assert get_current() not in vars(thread).values()
        with pytest.raises(RuntimeError, match="__init__"):
            threading.Thread.start(threading.Thread.__new__(threading.Thread))


def test_no_frame_of_ours_below_the_applications() -> None:
    with linking(pool=False), attached(remote_context(1, 2)):
        threads.instrument()
        frames = in_thread(lambda: [frame.filename for frame in traceback.extract_stack()])
    assert not [name for name in frames if "otel_proflink" in name]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Thread(context=...) is new in 3.14")
def test_a_context_that_was_given_is_kept() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("theirs")
    given = contextvars.Context()
    given.run(variable.set, 7)
    make: Callable[..., threading.Thread] = functools.partial(threading.Thread, context=given)
    with linking(pool=False), attached(remote_context(1, 2)):
        threads.instrument()
        assert in_thread(lambda: (variable.get(), current_link()), make) == (7, None)


# -- threads that serve everybody -----------------------------------------------------------------


class Watched:
    """Notes what threads that end had attached, without a look into any of them."""

    def __init__(self) -> None:
        self.links: dict[str, bool] = {}
        self._stock = threading.Thread._delete  # type: ignore[attr-defined]

    def __enter__(self) -> Watched:
        watched, stock = self, self._stock

        def _delete(thread: threading.Thread) -> None:
            watched.links[thread.name] = current_link() is not None
            stock(thread)

        threading.Thread._delete = _delete  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_exc: object) -> None:
        threading.Thread._delete = self._stock  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="run() has a context of its own there")
def test_service_threads_carry_no_label() -> None:
    with linking(pool=False) as provider, Watched() as watched:
        modules.instrument()
        with attached(remote_context(1, 2)):
            user = threading.Thread(target=int, name="user")
            user.start()
            user.join()
            with ThreadPoolExecutor(1, thread_name_prefix="executor") as pool:
                pool.submit(int).result()
            with multiprocessing.pool.ThreadPool(1) as thread_pool:
                assert thread_pool.apply(current_link) is not None
                thread_pool.close()
                thread_pool.join()
            channel: queue.Queue[Any] = queue.Queue()
            listener = logging.handlers.QueueListener(channel, logging.NullHandler())
            listener.start()
            listener.stop()
            provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
        provider.shutdown()
    users, others = watched.links.pop("user"), watched.links
    assert users
    assert len(others) >= 6  # one pool's worker, three handlers and one worker, a listener, a batch
    assert not any(others.values()), others


def test_a_function_of_the_users_in_a_dummy_process_is_no_service() -> None:
    from multiprocessing import dummy

    with linking(pool=False), attached(remote_context(1, 2)):
        threads.instrument()
        assert in_thread(current_link, dummy.Process) is not None


# -- zero code ------------------------------------------------------------------------------------


APP = """
def chain(root, name, depth):
    if depth:
        thread = threading.Thread(target=chain, args=(root, name, depth - 1))
        thread.start()
        thread.join()
    else:
        unit(name, trace.get_current_span(), root, "web")(0.15)


with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
    chain(root, "chained", 3)
    with tracer.start_as_current_span("mid") as mid:
        timer = threading.Timer(0.05, unit("timer", mid, root, "web"))
        timer.start()
timer.join()
thread = threading.Thread(target=unit("untraced", None))
thread.start()
thread.join()
report(theirs=[m for m in sys.modules if m == "opentelemetry.instrumentation.threading"])
"""


@needs_sampler
@pytest.mark.parametrize("contrib", [True, False], ids=["with contrib", "ours alone"])
def test_zero_code(tmp_path: Any, contrib: bool) -> None:
    off = {} if contrib else {"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "threading"}
    run = run_app(tmp_path, APP, zero_code=True, **off)
    run.assert_clean()
    run.verdict().assert_right()
    if not contrib:
        assert run.told["theirs"] == []
