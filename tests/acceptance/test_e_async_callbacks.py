# SPDX-License-Identifier: Apache-2.0
"""Section E: callbacks of an event loop, and async generators."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import Span

from tests.support.async_truth import Current, assert_right
from tests.support.ground_truth import GroundTruth, Label

LoopFactory = Callable[[], AbstractEventLoop]


@pytest.fixture(params=["asyncio", "uvloop"])
def loops(request: pytest.FixtureRequest) -> LoopFactory:
    if request.param == "asyncio":
        return asyncio.new_event_loop
    factory: LoopFactory = pytest.importorskip("uvloop").new_event_loop
    return factory


def run(main: Coroutine[Any, Any, None], loops: LoopFactory) -> None:
    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(main)


class Callbacks:
    """Callbacks with a known label each, and the wait for all of them."""

    def __init__(self, truth: GroundTruth) -> None:
        self._truth = truth
        self._loop = asyncio.get_running_loop()
        self._left = 0
        self._all = asyncio.Event()

    def make(self, expectation: Label | None) -> Callable[..., None]:
        unit = self._truth.unit(expectation, 0.02)
        self._left += 1

        def callback(*_arguments: object) -> None:
            unit()
            self._left -= 1
            if not self._left:
                self._all.set()

        return callback

    async def wait(self) -> None:
        await asyncio.wait_for(self._all.wait(), 60)


def test_callbacks_run_in_the_context_of_their_call(tmp_path: Path, loops: LoopFactory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        callbacks = Callbacks(truth)
        empty = contextvars.Context()
        make = callbacks.make
        loop.call_soon(make(None))
        with truth.tracer.start_as_current_span("caller") as caller:
            of_caller = contextvars.copy_context()
            for _ in range(3):
                loop.call_soon(make(Label.of(caller)))
                loop.call_soon(make(None), context=empty)
            loop.call_later(0.01, make(Label.of(caller)))
            loop.call_at(loop.time() + 0.02, make(Label.of(caller)))
            loop.call_later(0.01, make(None), context=empty)
        loop.call_soon(make(None))
        loop.call_soon(make(Label.of(caller)), context=of_caller)
        with truth.tracer.start_as_current_span("other"):
            loop.call_soon(make(Label.of(caller)), context=of_caller)
        await callbacks.wait()
        truth.burn(None)

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


def test_callbacks_of_futures_and_tasks(tmp_path: Path, loops: LoopFactory) -> None:
    async def own() -> None:
        with truth.tracer.start_as_current_span("of the task"):
            await asyncio.sleep(0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        callbacks = Callbacks(truth)
        future: asyncio.Future[None] = loop.create_future()
        with truth.tracer.start_as_current_span("caller") as caller:
            future.add_done_callback(callbacks.make(Label.of(caller)))
            future.add_done_callback(callbacks.make(None), context=contextvars.Context())
            task = asyncio.create_task(own())
            task.add_done_callback(callbacks.make(Label.of(caller)))
        task.add_done_callback(callbacks.make(None))
        with truth.tracer.start_as_current_span("who sets the result"):
            future.set_result(None)
        await callbacks.wait()

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


def test_callbacks_from_another_thread(tmp_path: Path, loops: LoopFactory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        callbacks = Callbacks(truth)

        def elsewhere() -> None:
            with truth.tracer.start_as_current_span("of the other thread") as theirs:
                loop.call_soon_threadsafe(callbacks.make(Label.of(theirs)))
                asyncio.run_coroutine_threadsafe(coroutine(theirs), loop)
            loop.call_soon_threadsafe(callbacks.make(None))

        async def coroutine(theirs: Span) -> None:
            # asyncio makes the task in the loop's thread, by a callback in the caller's context.
            callbacks.make(Label.of(theirs))()

        with truth.tracer.start_as_current_span("main task") as span:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            await asyncio.to_thread(thread.join)
            await callbacks.wait()
            truth.burn(Label.of(span))

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


def test_readers_and_signals(tmp_path: Path, loops: LoopFactory) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        callbacks = Callbacks(truth)
        read, write = os.pipe()

        def readable(callback: Callable[[], None]) -> None:
            loop.remove_reader(read)
            callback()

        with truth.tracer.start_as_current_span("caller") as caller:
            loop.add_reader(read, readable, callbacks.make(Label.of(caller)))
            loop.add_signal_handler(signal.SIGUSR1, callbacks.make(Label.of(caller)))
        with truth.tracer.start_as_current_span("who writes"):
            os.write(write, b"x")
            os.kill(os.getpid(), signal.SIGUSR1)
            await callbacks.wait()
        loop.remove_signal_handler(signal.SIGUSR1)
        os.close(read)
        os.close(write)

    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    assert_right(truth.verdict())


# -- async generators: their code runs in the context of whoever asks for the next item ------------


def test_async_generators(tmp_path: Path, loops: LoopFactory) -> None:
    async def items(count: int) -> AsyncIterator[int]:
        with truth.tracer.start_as_current_span("generator") as span:
            current.knows(span, outer_of[0])
            for number in range(count):
                truth.burn(current.label(), 0.01)
                await asyncio.sleep(0)
                truth.burn(current.label(), 0.01)
                yield number

    async def consumer() -> None:
        with truth.tracer.start_as_current_span("consumer") as span:
            current.knows(span, outer_of[0])
            async for _ in items(4):
                # CPython's semantics: what the generator attached is attached here.
                truth.burn(current.label(), 0.01)
                await asyncio.sleep(0)
            assert current.label() == Label.of(span, outer_of[0])
            truth.burn(current.label())

    async def main() -> None:
        with truth.tracer.start_as_current_span("outer") as outer:
            outer_of.append(current.knows(outer))
            await asyncio.gather(*(consumer() for _ in range(5)))

    current = Current()
    outer_of: list[Span] = []
    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    truth.verdict().assert_right(min_samples=0, min_total=200)


def test_async_generators_without_a_span_of_their_own(tmp_path: Path, loops: LoopFactory) -> None:
    """One generator, asked by two tasks in turn: its samples are those of the one who asks."""

    async def items() -> AsyncIterator[None]:
        while True:
            truth.burn(current.label(), 0.01)
            yield
            await asyncio.sleep(0)

    async def asker(generator: AsyncIterator[None], lock: asyncio.Lock, count: int) -> None:
        with truth.tracer.start_as_current_span("asker") as span:
            current.knows(span)
            for _ in range(count):
                async with lock:
                    await anext(generator)
                truth.burn(Label.of(span), 0.005)

    async def main() -> None:
        generator, lock = items(), asyncio.Lock()
        await asyncio.gather(*(asker(generator, lock, 10) for _ in range(3)))

    current = Current()
    with GroundTruth(tmp_path) as truth:
        run(main(), loops)
    verdict = truth.verdict()
    verdict.assert_right(min_samples=0, min_total=150)
