# SPDX-License-Identifier: Apache-2.0
"""Section E: asyncio tasks, on its own loop and on uvloop, read back from the exported profile."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import sys
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import Span

from tests.support.async_truth import Tasks, assert_right
from tests.support.ground_truth import GroundTruth, Label

LoopFactory = Callable[[], AbstractEventLoop]
Coroutines = list[Coroutine[Any, Any, None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def loops(request: pytest.FixtureRequest) -> LoopFactory:
    if request.param == "asyncio":
        return asyncio.new_event_loop
    uvloop = pytest.importorskip("uvloop")
    factory: LoopFactory = uvloop.new_event_loop
    return factory


def run(main: Coroutine[Any, Any, None], loops: LoopFactory = asyncio.new_event_loop) -> None:
    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(main)


def tasks_of(truth: GroundTruth, outer: Span) -> Tasks:
    return Tasks(truth, outer, lambda: asyncio.sleep(0))


# -- ways to make a task --------------------------------------------------------------------------


async def by_create_task(coroutines: Coroutines) -> None:
    for task in [asyncio.create_task(coroutine) for coroutine in coroutines]:
        await task


async def by_gather(coroutines: Coroutines) -> None:
    await asyncio.gather(*coroutines)


async def by_task_group(coroutines: Coroutines) -> None:
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)


async def by_ensure_future(coroutines: Coroutines) -> None:
    await asyncio.wait([asyncio.ensure_future(coroutine) for coroutine in coroutines])


async def by_task_class(coroutines: Coroutines) -> None:
    loop = asyncio.get_running_loop()
    for task in [asyncio.Task(coroutine, loop=loop) for coroutine in coroutines]:
        await task


async def by_task_in_python(coroutines: Coroutines) -> None:
    """The pure-Python Task, which enters its context by `Context.run`."""
    task_class = importlib.import_module("asyncio.tasks")._PyTask
    loop = asyncio.get_running_loop()
    for task in [task_class(coroutine, loop=loop) for coroutine in coroutines]:
        await task


async def by_custom_factory(coroutines: Coroutines) -> None:
    class Named(asyncio.Task[Any]):
        pass

    def factory(loop: AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        return Named(coroutine, loop=loop, **options)

    await _by_factory(factory, coroutines)


async def by_eager_factory(coroutines: Coroutines) -> None:
    eager: Any = asyncio.eager_task_factory  # type: ignore[attr-defined, unused-ignore]

    def factory(loop: AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        # uvloop passes what the factories of the first releases of 3.13 do not take.
        options.pop("eager_start", None)
        return eager(loop, coroutine, **options)

    await _by_factory(factory, coroutines)


async def _by_factory(factory: Any, coroutines: Coroutines) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        await by_create_task(coroutines)
    finally:
        loop.set_task_factory(None)


async def by_as_completed(coroutines: Coroutines) -> None:
    for completed in asyncio.as_completed(coroutines):
        await completed


async def by_tasks_of_tasks(coroutines: Coroutines) -> None:
    """Each task makes the next one."""

    async def link(rest: Coroutines) -> None:
        following = [asyncio.create_task(link(rest[1:]))] if rest[1:] else []
        await rest[0]
        for task in following:
            await task

    await asyncio.create_task(link(coroutines))


WAYS = [
    by_create_task,
    by_gather,
    by_task_group,
    by_ensure_future,
    by_task_class,
    by_task_in_python,
    by_custom_factory,
    pytest.param(
        by_eager_factory,
        marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12"),
    ),
    by_as_completed,
    by_tasks_of_tasks,
]


@pytest.mark.parametrize("way", WAYS)
def test_e3_every_way_to_make_a_task(
    tmp_path: Path, way: Callable[[Coroutines], Coroutine[Any, Any, None]], loops: LoopFactory
) -> None:
    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = tasks_of(truth, outer)
            await way([tasks.run(index) for index in range(20)])
            truth.burn(Label.of(outer))

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
        truth.burn(None)
    assert_right(truth.verdict(), min_total=100)


def test_e7_two_hundred_tasks(tmp_path: Path, loops: LoopFactory) -> None:
    """A span each, all of them open at the same time."""

    async def task(tasks: Tasks, index: int) -> None:
        with truth.tracer.start_as_current_span(f"task {index}") as span:
            await tasks.burn(Label.of(span, tasks.outer))

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = tasks_of(truth, outer)
            await asyncio.gather(*(task(tasks, index) for index in range(200)))

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    verdict = truth.verdict()
    assert len(verdict.counts) == 200
    assert_right(verdict, min_total=1000)


def test_e1_all_samples_of_a_task_that_blocks_its_loop(tmp_path: Path, loops: LoopFactory) -> None:
    """Off the CPU, too: a task that sleeps on its thread. A loop that waits has no label."""
    expected: dict[str, Label | None] = {}

    async def blocking(span: Span, root: Span, number: int) -> None:
        name = f"sleeping_{number}"
        scope: dict[str, Any] = {"wait": threading.Event().wait}
        exec(f"def {name}():\n    wait(0.05)\n", scope)
        expected[name] = Label.of(span, root)
        await asyncio.sleep(0)
        scope[name]()

    async def one(root: Span, number: int) -> None:
        with truth.tracer.start_as_current_span("sleeper") as span:
            await blocking(span, root, number)

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            await asyncio.gather(*(one(outer, number) for number in range(10)))
            # Nothing to do for a while: the loop waits.
            await asyncio.sleep(0.2)

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    seen: dict[str, int] = {}
    idle = 0
    for sample in truth.samples():
        name = next((f for f in sample.functions if f in expected), None)
        if name is not None:
            label = expected[name]
            assert label is not None
            assert label.allows(sample.labels), (name, sample.labels)
            seen[name] = seen.get(name, 0) + sample.values["wall"]
        elif "run_forever" in sample.functions[0] or sample.functions[0] == "EpollSelector.select":
            idle += sample.values["wall"]
            assert "span_id" not in sample.labels, sample
    assert len(seen) == 10
    assert min(seen.values()) > 0.02e9
    if loops is asyncio.new_event_loop:
        assert idle > 0.1e9


# -- one loop is not the world --------------------------------------------------------------------


def test_several_loops_in_several_threads(tmp_path: Path, loops: LoopFactory) -> None:
    def in_thread(number: int) -> None:
        async def main() -> None:
            with truth.tracer.start_as_current_span(f"loop {number}") as outer:
                tasks = tasks_of(truth, outer)
                await asyncio.gather(*(tasks.run(index) for index in range(25)))

        run(main(), loops)

    with GroundTruth(tmp_path) as truth:
        threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Four threads share one GIL: a task's few turns may fall between two samples.
    truth.verdict().assert_right(min_samples=0, min_total=300)


def test_a_thread_s_span_is_not_its_loop_s(tmp_path: Path, loops: LoopFactory) -> None:
    """E2: an explicitly empty context stays empty, whatever the thread has attached below it."""

    async def main() -> None:
        with truth.tracer.start_as_current_span("main task") as span:
            tasks = tasks_of(truth, span)
            empty = contextvars.Context
            by_class = []
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(tasks.burn(None), context=empty())
                    group.create_task(tasks.burn(Label.of(span)))
                    by_class.append(asyncio.Task(tasks.burn(None), context=empty()))
                    group.create_task(tasks.burn(Label.of(span)))
            await asyncio.gather(*by_class)
            await asyncio.create_task(tasks.burn(None), context=empty())

    with (
        GroundTruth(tmp_path) as truth,
        truth.tracer.start_as_current_span("of the thread") as below,
        asyncio.Runner(loop_factory=loops) as runner,
    ):
        runner.run(main(), context=contextvars.Context())
        truth.burn(Label.of(below))
        runner.run(tasks_of(truth, below).burn(None), context=contextvars.Context())
        runner.run(tasks_of(truth, below).burn(Label.of(below)), context=contextvars.copy_context())
    assert_right(truth.verdict())


# -- contexts given by hand -----------------------------------------------------------------------


def test_e3_explicit_contexts(tmp_path: Path, loops: LoopFactory) -> None:
    async def main() -> None:
        with truth.tracer.start_as_current_span("then") as then:
            of_then = contextvars.copy_context()
        with truth.tracer.start_as_current_span("now") as now:
            tasks = tasks_of(truth, now)
            async with asyncio.TaskGroup() as group:
                group.create_task(tasks.burn(Label.of(then)), context=of_then.copy())
                group.create_task(tasks.burn(Label.of(now)))
            await shared(tasks)

    async def shared(tasks: Tasks) -> None:
        """Two tasks in one context: what one attaches the other is under, too."""
        context = contextvars.Context()
        entered, done = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with truth.tracer.start_as_current_span("theirs") as span:
                spans.append(span)
                entered.set()
                await tasks.burn(Label.of(span))
                await done.wait()

        async def second() -> None:
            await entered.wait()
            await tasks.burn(Label.of(spans[0]))
            done.set()

        spans: list[Span] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(first(), context=context)
            group.create_task(second(), context=context)
        await asyncio.create_task(tasks.burn(None), context=context)

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


def test_e4_inherited_span_that_has_ended(tmp_path: Path, loops: LoopFactory) -> None:
    """Policy: what a task inherited labels it until it is detached, ended or not."""

    async def later(tasks: Tasks, gate: asyncio.Event, expectation: Label | None) -> None:
        await gate.wait()
        await tasks.burn(expectation)

    async def main() -> None:
        gate = asyncio.Event()
        with truth.tracer.start_as_current_span("request") as request:
            tasks = tasks_of(truth, request)
            left = asyncio.create_task(later(tasks, gate, Label.of(request)))
            bare = asyncio.create_task(later(tasks, gate, None), context=contextvars.Context())
        truth.burn(None)
        gate.set()
        await asyncio.gather(left, bare)

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


# -- ends that are not the end of the coroutine ---------------------------------------------------


def test_cancelled_timed_out_and_failed_tasks(tmp_path: Path, loops: LoopFactory) -> None:
    async def forever(tasks: Tasks, span_name: str) -> None:
        with truth.tracer.start_as_current_span(span_name) as span:
            try:
                await tasks.burn(Label.of(span, tasks.outer))
                await asyncio.Event().wait()
            finally:
                truth.burn(Label.of(span, tasks.outer))

    async def failing(tasks: Tasks) -> None:
        with truth.tracer.start_as_current_span("failing") as span:
            await tasks.burn(Label.of(span, tasks.outer))
            raise ValueError("theirs")

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = tasks_of(truth, outer)
            cancelled = asyncio.create_task(forever(tasks, "cancelled"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await forever(tasks, "timed out")
            truth.burn(Label.of(outer))
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            with pytest.raises(ValueError, match="theirs"):
                await asyncio.create_task(failing(tasks))
            truth.burn(Label.of(outer))

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
        truth.burn(None)
    assert_right(truth.verdict())


class Awaited:
    """An awaitable of one's own: a generator, as libraries in C and Cython have them."""

    def __init__(self, unit: Callable[[], int]) -> None:
        self._unit = unit

    def __await__(self) -> Generator[None, None, None]:
        for _ in range(4):
            self._unit()
            yield


def test_custom_awaitables_and_context_managers(tmp_path: Path, loops: LoopFactory) -> None:
    class Traced:
        """A span as an async context manager, entered in one coroutine and left in it."""

        async def __aenter__(self) -> Span:
            await asyncio.sleep(0)
            self._manager = truth.tracer.start_as_current_span("managed")
            return self._manager.__enter__()

        async def __aexit__(self, *error: Any) -> None:
            await asyncio.sleep(0)
            self._manager.__exit__(*error)

    async def task(outer: Span) -> None:
        async with Traced() as span:
            await Awaited(truth.unit(Label.of(span, outer), 0.01))
        await Awaited(truth.unit(Label.of(outer), 0.01))

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            await asyncio.gather(*(task(outer) for _ in range(5)))

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())
