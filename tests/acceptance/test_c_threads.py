# SPDX-License-Identifier: Apache-2.0
"""Section C, threads: C15 (work offloaded from tasks), C16 (`threading`), C17 (`_thread`)."""

from __future__ import annotations

import _thread
import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.context import attach, get_current
from opentelemetry.trace import Span, SpanKind

from otel_proflink._linker import current_link
from otel_proflink.instrumentation import modules
from tests.support.ground_truth import WEB, GroundTruth, Label, linking

LONE_SECONDS = 0.15


@contextmanager
def instrumented() -> Iterator[None]:
    modules.instrument()
    try:
        yield
    finally:
        modules.uninstrument()


def web(truth: GroundTruth, name: str = "GET /"):  # type: ignore[no-untyped-def]
    return truth.tracer.start_as_current_span(name, kind=SpanKind.SERVER, attributes=WEB)


def only_the_worker(truth: GroundTruth, worker: str) -> None:
    """All that the worker's thread did from its first instruction on was under a label.

    Not one frame of the work may be without: that would be a label that came too late.
    """
    truth.verdict().assert_right(max_unknown=0)
    seen = {
        sample.labels.get("thread_name", "")
        for sample in truth.samples()
        if any(name.startswith("burn_") for name in sample.functions)
    }
    assert any(worker in name for name in seen), seen


# -- C15 ------------------------------------------------------------------------------------------


async def to_thread(work: Callable[[], object]) -> None:
    await asyncio.to_thread(work)


async def default_executor(work: Callable[[], object]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work)


async def own_executor(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="asyncio_own") as pool:
        await asyncio.get_running_loop().run_in_executor(pool, work)


async def anyio_to_thread(work: Callable[[], object]) -> None:
    to_thread = pytest.importorskip("anyio.to_thread")
    await to_thread.run_sync(work)


OFFLOADS = {
    "to_thread": (to_thread, "asyncio_"),
    "run_in_executor": (default_executor, "asyncio_"),
    "own executor": (own_executor, "asyncio_own"),
    "anyio": (anyio_to_thread, "AnyIO worker"),
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_c15_offloaded_from_tasks(how: str, tmp_path: Path) -> None:
    """Twenty tasks at once, each under a root of its own: the worker's label is its task's."""
    offload, worker = OFFLOADS[how]

    async def request(number: int) -> None:
        with web(truth) as root:
            await offload(truth.unit(Label.of(root, span_type="web")))
            with truth.tracer.start_as_current_span("mid") as mid:
                await offload(truth.unit(Label.of(mid, root, "web")))

                def nested() -> None:
                    with (
                        truth.tracer.start_as_current_span("one"),
                        truth.tracer.start_as_current_span("two") as two,
                    ):
                        truth.burn(Label.of(two, root, "web"))

                await offload(nested)

    async def main() -> None:
        await asyncio.gather(*(request(number) for number in range(10)))
        await offload(truth.unit(None))

    with GroundTruth(tmp_path, pool=False) as truth, instrumented():
        asyncio.run(main())
    only_the_worker(truth, worker)


@pytest.mark.parametrize("how", OFFLOADS)
def test_c15_the_first_instruction_is_linked(how: str) -> None:
    """Not from the first sample on, but from the first line: what a profiler would see there."""
    offload, _ = OFFLOADS[how]
    links: list[Any] = []

    async def main() -> None:
        with linking(pool=False) as provider:
            tracer = provider.get_tracer("test")
            with (
                tracer.start_as_current_span("root") as root,
                tracer.start_as_current_span("mid") as mid,
            ):
                await offload(lambda: links.append(current_link()))
            await offload(lambda: links.append(current_link()))
        link, after = links
        assert link.span_id == mid.get_span_context().span_id
        assert link.local_root_span_id == root.get_span_context().span_id
        assert after is None

    with instrumented():
        asyncio.run(main())


def test_c15_anyio_leaves_functions_alone() -> None:
    """Arguments, results, exceptions, limiters and abandoned calls are AnyIO's own business."""
    anyio = pytest.importorskip("anyio")
    to_thread = pytest.importorskip("anyio.to_thread")

    def fail(error: Exception) -> None:
        raise error

    async def main() -> None:
        error = LookupError("theirs")
        same = object()
        assert await to_thread.run_sync(lambda *args: args, 1, same) == (1, same)
        with pytest.raises(LookupError) as raised:
            await to_thread.run_sync(fail, error)
        assert raised.value is error
        limiter = anyio.CapacityLimiter(1)
        assert await to_thread.run_sync(get_current, limiter=limiter) == get_current()
        gate = threading.Event()
        with anyio.move_on_after(0.05) as scope:
            await to_thread.run_sync(gate.wait, abandon_on_cancel=True)
        gate.set()
        assert scope.cancelled_caught

    with linking(pool=False), instrumented():
        asyncio.run(main())


def test_c15_starlette_sync_handlers(tmp_path: Path) -> None:
    """A sync endpoint, a background task and a dependency-like nested call, on worker threads."""
    applications = pytest.importorskip("starlette.applications")
    httpx = pytest.importorskip("httpx")
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def sync(request: Request) -> PlainTextResponse:
        # The request's own span, made current by the middleware: no span was started here.
        root: Span = request.scope["root"]
        truth.burn(Label.of(root, span_type="web"))
        with truth.tracer.start_as_current_span("child") as child:
            truth.burn(Label.of(child, root, "web"))
        after = BackgroundTask(truth.unit(Label.of(root, span_type="web")))
        return PlainTextResponse(threading.current_thread().name, background=after)

    async def mixed(request: Request) -> PlainTextResponse:
        root: Span = request.scope["root"]
        await run_in_threadpool(truth.unit(Label.of(root, span_type="web")))
        truth.burn(Label.of(root, span_type="web"))
        return PlainTextResponse("MainThread")

    application = applications.Starlette(routes=[Route("/sync", sync), Route("/mixed", mixed)])

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        with web(truth, scope["path"]) as root:
            await application({**scope, "root": root}, receive, send)

    async def main() -> list[str]:
        transport = httpx.ASGITransport(app=traced)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ["/sync", "/mixed"] * 6
            answers = await asyncio.gather(*(client.get(path) for path in paths))
        assert {answer.status_code for answer in answers} == {200}
        return [answer.text for answer in answers[::2]]

    with GroundTruth(tmp_path, pool=False) as truth, instrumented():
        workers = asyncio.run(main())
    assert set(workers) == {"AnyIO worker thread"}
    truth.verdict().assert_right(max_unknown=0)


# -- C16 ------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours alone", "ours first", "theirs first"])
def threading_too(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Ours, and whoever else carries contexts into threads; yields what is to be done last."""
    last: Callable[[], None] = lambda: None  # noqa: E731
    theirs = None
    if request.param != "ours alone":
        package = pytest.importorskip("opentelemetry.instrumentation.threading")
        theirs = package.ThreadingInstrumentor()
        if request.param == "theirs first":
            theirs.instrument()
        else:
            last = theirs.instrument
    with instrumented():
        yield last
        if theirs is not None:
            theirs.uninstrument()


class Subclass(threading.Thread):
    """With a `run` of its own, which wrappers of `Thread.run` never see."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.work = work

    def run(self) -> None:
        self.work()


def test_c16_threads_and_timers(threading_too: Callable[[], None], tmp_path: Path) -> None:
    with GroundTruth(tmp_path, pool=False) as truth:
        threading_too()
        with web(truth) as root:
            threads = [
                threading.Thread(target=truth.unit(Label.of(root, span_type="web"))),
                threading.Timer(0.01, truth.unit(Label.of(root, span_type="web"))),
                Subclass(truth.unit(Label.of(root, span_type="web"))),
            ]
            with truth.tracer.start_as_current_span("mid") as mid:
                label = Label.of(mid, root, "web")
                threads.append(threading.Thread(target=truth.unit(label), daemon=True))
                threads.append(threading.Timer(0.01, truth.unit(label)))
                threads.append(Subclass(truth.unit(label)))
                # `start` counts, not the making.
                for thread in threads[3:]:
                    thread.start()
            for thread in threads[:3]:
                thread.start()
        # Fire and forget: the label stays when the span has ended.
        for thread in threads:
            thread.join()
        # By itself for all of its life: on a busy machine the first ticks of it may be missing.
        untraced = threading.Thread(target=truth.unit(None, LONE_SECONDS))
        untraced.start()
        untraced.join()
        truth.burn(None)
    truth.verdict().assert_right()


def test_c16_spans_in_threads(threading_too: Callable[[], None], tmp_path: Path) -> None:
    """Two deep, in a thread of a thread: the root is the first one's; and back again."""

    def inner(root: Span) -> None:
        with (
            truth.tracer.start_as_current_span("one"),
            truth.tracer.start_as_current_span("two") as two,
        ):
            truth.burn(Label.of(two, root, "web"))

    def outer(root: Span, mid: Span) -> None:
        thread = threading.Thread(target=inner, args=(root,))
        with truth.tracer.start_as_current_span("outer") as own:
            thread.start()
            truth.burn(Label.of(own, root, "web"))
        truth.burn(Label.of(mid, root, "web"))
        thread.join()

    with GroundTruth(tmp_path, pool=False) as truth:
        threading_too()
        with web(truth) as root, truth.tracer.start_as_current_span("mid") as mid:
            thread = threading.Thread(target=outer, args=(root, mid))
            thread.start()
            thread.join()
    truth.verdict().assert_right()


# -- C17 ------------------------------------------------------------------------------------------


def test_c17_thread_module(tmp_path: Path) -> None:
    """Sampled; labelled by what it attaches itself, and by nothing else."""
    done = [threading.Event() for _ in range(2)]

    def plain(unit: Callable[[], object]) -> None:
        unit()
        done[0].set()

    def attaching(context: Any, inside: Callable[[], object]) -> None:
        attach(context)
        inside()
        done[1].set()

    with GroundTruth(tmp_path, pool=False) as truth, instrumented(), web(truth) as root:
        _thread.start_new_thread(plain, (truth.unit(None, LONE_SECONDS),))
        label = Label.of(root, span_type="web")
        _thread.start_new_thread(attaching, (get_current(), truth.unit(label, LONE_SECONDS)))
        for event in done:
            assert event.wait(60)
    truth.verdict().assert_right()
