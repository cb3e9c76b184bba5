# SPDX-License-Identifier: Apache-2.0
"""Section E: AnyIO on both of its backends, and trio by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import Span

from tests.support.async_truth import Tasks, assert_right
from tests.support.ground_truth import GroundTruth, Label

Main = Callable[[], Coroutine[Any, Any, None]]
Start = Callable[[Callable[..., Any], Any], Any]


class Library:
    """What the tests need of an async library."""

    run: Callable[[Main], None]
    checkpoint: Callable[[], Any]
    #: A task group or nursery; yields its `start_soon`.
    group: Callable[[], Any]
    cancelled: Callable[[], Any]


def _anyio(backend: str, **options: Any) -> Library:
    anyio = pytest.importorskip("anyio")
    if options or backend == "trio":
        pytest.importorskip("uvloop" if options else "trio")

    @asynccontextmanager
    async def group() -> AsyncIterator[Start]:
        async with anyio.create_task_group() as tasks:
            yield tasks.start_soon

    library = Library()
    library.run = lambda main: anyio.run(main, backend=backend, backend_options=options)
    library.checkpoint = anyio.lowlevel.checkpoint
    library.group = group
    library.cancelled = lambda: anyio.move_on_after(0.05)
    return library


def _trio() -> Library:
    trio = pytest.importorskip("trio")

    @asynccontextmanager
    async def group() -> AsyncIterator[Start]:
        async with trio.open_nursery() as nursery:
            yield nursery.start_soon

    library = Library()
    library.run = lambda main: trio.run(main)
    library.checkpoint = trio.lowlevel.checkpoint
    library.group = group
    library.cancelled = lambda: trio.move_on_after(0.05)
    return library


LIBRARIES: dict[str, Callable[[], Library]] = {
    "anyio-asyncio": lambda: _anyio("asyncio"),
    "anyio-uvloop": lambda: _anyio("asyncio", use_uvloop=True),
    "anyio-trio": lambda: _anyio("trio"),
    "trio": _trio,
}


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()


def test_e7_two_hundred_tasks(tmp_path: Path, library: Library) -> None:
    async def task(tasks: Tasks, index: int) -> None:
        with truth.tracer.start_as_current_span(f"task {index}") as span:
            await tasks.burn(Label.of(span, tasks.outer))

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = Tasks(truth, outer, library.checkpoint)
            async with library.group() as start:
                for index in range(200):
                    start(task, tasks, index)

    with GroundTruth(tmp_path) as truth:
        library.run(main)
    verdict = truth.verdict()
    assert len(verdict.counts) == 200
    assert_right(verdict, min_total=1000)


def test_all_kinds_of_tasks(tmp_path: Path, library: Library) -> None:
    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = Tasks(truth, outer, library.checkpoint)
            async with library.group() as start:
                for index in range(25):
                    start(tasks.run, index)
                await tasks.burn(Label.of(outer))
        await tasks.burn(None)

    with GroundTruth(tmp_path) as truth, truth.tracer.start_as_current_span("thread") as thread:
        truth.burn(Label.of(thread))

        async def unlabelled() -> None:
            from opentelemetry.context import Context, attach, detach

            token = attach(Context())
            await main()
            detach(token)

        library.run(unlabelled)
        truth.burn(Label.of(thread))
    assert_right(truth.verdict(), min_total=200)


def test_nested_groups_and_cancellation(tmp_path: Path, library: Library) -> None:
    async def forever(tasks: Tasks) -> None:
        with truth.tracer.start_as_current_span("forever") as span:
            while True:
                await tasks.burn(Label.of(span, tasks.outer))

    async def parent(tasks: Tasks, root: Span) -> None:
        with truth.tracer.start_as_current_span("parent") as span:
            async with library.group() as start:
                for _ in range(3):
                    start(child, tasks, root)
                await tasks.burn(Label.of(span, root))
            with library.cancelled():
                await forever(tasks)
            await tasks.burn(Label.of(span, root))

    async def child(tasks: Tasks, root: Span) -> None:
        with truth.tracer.start_as_current_span("child") as span:
            await tasks.burn(Label.of(span, root))

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = Tasks(truth, outer, library.checkpoint)
            async with library.group() as start:
                for _ in range(3):
                    start(parent, tasks, outer)
            truth.burn(Label.of(outer))

    with GroundTruth(tmp_path) as truth:
        library.run(main)
        truth.burn(None)
    truth.verdict().assert_right(min_samples=0, min_total=200)


def test_start_waits_for_the_task(tmp_path: Path, library: Library) -> None:
    """`start` runs the task in the context of its caller; what it attaches stays in the task."""
    anyio = pytest.importorskip("anyio")
    trio = pytest.importorskip("trio")

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            tasks = Tasks(truth, outer, library.checkpoint)
            module: Any = trio if library.checkpoint is trio.lowlevel.checkpoint else anyio
            opened = module.open_nursery() if module is trio else module.create_task_group()
            ignored: Any = module.TASK_STATUS_IGNORED

            async def service(*, task_status: Any = ignored) -> None:
                with truth.tracer.start_as_current_span("service") as span:
                    await tasks.burn(Label.of(span, outer))
                    task_status.started()
                    await tasks.burn(Label.of(span, outer))

            async with opened as group:
                await group.start(service)
                await tasks.burn(Label.of(outer))

    with GroundTruth(tmp_path) as truth:
        library.run(main)
    assert_right(truth.verdict())
