# SPDX-License-Identifier: Apache-2.0
"""Tokens and generators: contexts attached and detached in orders that nobody planned.

Wherever Python's own semantics leave a span attached, the label is that span: what
`opentelemetry.trace.get_current_span()` returns at that point, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, get_current_span, set_span_in_context

from tests.support.async_truth import Current, assert_right
from tests.support.ground_truth import GroundTruth, Label


class Scene:
    """Spans by name, all of them roots, and work under whatever is current."""

    def __init__(self, truth: GroundTruth) -> None:
        self.truth = truth
        self.current = Current()

    def span(self, name: str) -> Span:
        return self.current.knows(self.truth.tracer.start_span(name, context=Context()))

    def attach(self, span: Span) -> contextvars.Token[Context]:
        return attach(set_span_in_context(span, Context()))

    def burn(self, seconds: float = 0.02) -> Label | None:
        """Burn under the label that OpenTelemetry's API tells; return it."""
        label = self.current.label()
        self.truth.burn(label, seconds)
        return label


def test_detached_in_another_contextvars_context(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        scene = Scene(truth)
        first, second = scene.span("first"), scene.span("second")
        token = scene.attach(first)
        copy = contextvars.copy_context()

        def elsewhere() -> None:
            detach(token)  # refused and logged: it belongs to the other context
            assert scene.burn() == Label.of(first)
            inner = scene.attach(second)
            assert scene.burn() == Label.of(second)
            detach(inner)
            assert scene.burn() == Label.of(first)

        copy.run(elsewhere)
        assert scene.burn() == Label.of(first)
        contextvars.Context().run(scene.burn)
        detach(token)
        assert scene.burn() is None
        copy.run(scene.burn)  # the copy keeps what it was copied with
    assert_right(truth.verdict())


def test_detached_in_another_task(tmp_path: Path) -> None:
    async def opens(scene: Scene, tokens: list[object], name: str) -> None:
        tokens.append(scene.attach(scene.span(name)))
        scene.burn()
        await asyncio.sleep(0)
        scene.burn()

    async def closes(scene: Scene, tokens: list[object]) -> None:
        own = scene.attach(scene.span("closer"))
        for token in tokens:
            detach(token)  # type: ignore[arg-type]
            scene.burn()
            await asyncio.sleep(0)
        detach(own)
        scene.burn()

    async def main(scene: Scene) -> None:
        token = scene.attach(scene.span("main"))
        tokens: list[object] = []
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(opens(scene, tokens, f"opener {number}"))
        async with asyncio.TaskGroup() as group:
            group.create_task(closes(scene, tokens))
        scene.burn()
        detach(token)
        scene.burn()

    with GroundTruth(tmp_path) as truth:
        asyncio.run(main(Scene(truth)))
    assert_right(truth.verdict())


# -- generators -----------------------------------------------------------------------------------


def spanning(scene: Scene, span: Span) -> Iterator[None]:
    token = scene.attach(span)
    try:
        while True:
            scene.burn()
            yield
    finally:
        detach(token)


def test_generators_left_suspended(tmp_path: Path) -> None:
    """CPython has no context for a generator: what it attached stays attached in its caller."""
    with GroundTruth(tmp_path) as truth:
        scene = Scene(truth)
        first, second, caller = scene.span("first"), scene.span("second"), scene.span("caller")
        base = scene.attach(caller)
        one, two = spanning(scene, first), spanning(scene, second)
        next(one)
        assert scene.burn() == Label.of(first)
        next(two)
        assert scene.burn() == Label.of(second)
        next(one)  # resumed, and yet the newest attach is what is current
        assert scene.burn() == Label.of(second)
        one.close()  # type: ignore[attr-defined]
        scene.burn()
        two.close()  # type: ignore[attr-defined]
        scene.burn()
        detach(base)
        scene.burn()
    assert_right(truth.verdict())


def test_generators_dropped_and_collected(tmp_path: Path) -> None:
    class Cycle:
        generator: Iterator[None]

    with GroundTruth(tmp_path) as truth:
        scene = Scene(truth)
        dropped = spanning(scene, scene.span("dropped"))
        next(dropped)
        scene.burn()
        del dropped
        scene.burn()
        for number in range(3):
            cycle = Cycle()
            cycle.generator = spanning(scene, scene.span(f"cycle {number}"))
            cycle.__dict__["self"] = cycle
            next(cycle.generator)
            scene.burn()
            del cycle
            scene.burn()
            gc.collect()
            scene.burn()
    assert_right(truth.verdict())


def test_generators_resumed_and_closed_elsewhere(tmp_path: Path) -> None:
    """In another context, on another thread: detach is refused there, here nothing changes."""
    with GroundTruth(tmp_path) as truth:
        scene = Scene(truth)
        generator = spanning(scene, scene.span("wandering"))
        next(generator)
        left = scene.burn()
        assert left is not None

        def in_thread() -> None:
            token = scene.attach(scene.span("thread"))
            next(generator)
            scene.burn()
            generator.close()  # type: ignore[attr-defined]
            scene.burn()
            detach(token)
            scene.burn()

        thread = threading.Thread(target=contextvars.Context().run, args=(in_thread,))
        thread.start()
        thread.join()
        assert scene.burn() == left
        contextvars.Context().run(scene.burn)
    assert_right(truth.verdict())


def test_async_generators_left_to_the_loop(tmp_path: Path) -> None:
    """Not exhausted: the loop closes them later, in a context that is not theirs."""

    async def items(scene: Scene, span: Span) -> AsyncIterator[None]:
        token = scene.attach(span)
        try:
            while True:
                scene.burn()
                await asyncio.sleep(0)
                yield
        finally:
            detach(token)

    async def leaves_it(scene: Scene, number: int, kept: list[object]) -> None:
        own = scene.attach(scene.span(f"task {number}"))
        generator = items(scene, scene.span(f"generator {number}"))
        async for _ in generator:
            scene.burn()
            break
        scene.burn()
        if number % 2:
            kept.append(generator)  # until the loop shuts down
        del generator
        gc.collect()
        await asyncio.sleep(0)
        scene.burn()
        detach(own)
        scene.burn()

    async def main(scene: Scene) -> None:
        kept: list[object] = []
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(leaves_it(scene, number, kept))
        scene.burn()

    with GroundTruth(tmp_path) as truth:
        scene = Scene(truth)
        asyncio.run(main(scene))
        scene.burn()
    assert_right(truth.verdict())


# -- whatever comes -------------------------------------------------------------------------------


class Walk:
    """A random program of attaches, detaches, contexts, generators and pool tasks."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self._scene = scene
        self._random = random.Random(seed)
        self._tokens: list[contextvars.Token[Context]] = []
        self._generators: list[Iterator[None]] = []
        self._contexts: list[contextvars.Context] = []
        self._pool = ThreadPoolExecutor(1)

    def run(self, steps: int) -> None:
        moves: list[Callable[[], None]] = [
            self._attach,
            self._attach,
            self._attach_nothing,
            self._detach,
            self._detach,
            self._copy,
            self._in_a_copy,
            self._resume,
            self._generate,
            self._close,
            self._submit,
        ]
        with self._pool:
            for _ in range(steps):
                self._random.choice(moves)()
                self._burn()

    def _burn(self) -> None:
        self._scene.burn(0.004)

    def _attach(self) -> None:
        self._tokens.append(self._scene.attach(self._scene.span("attached")))

    def _attach_nothing(self) -> None:
        self._tokens.append(attach(Context()))

    def _detach(self) -> None:
        if self._tokens:  # in any order, and now and then one that was used before
            detach(self._random.choice(self._tokens))

    def _copy(self) -> None:
        self._contexts.append(contextvars.copy_context())

    def _in_a_copy(self) -> None:
        if self._contexts:
            context = self._random.choice(self._contexts)
            move = self._random.choice([self._attach, self._detach, self._resume, self._burn])
            context.run(move)
            context.run(self._burn)

    def _generate(self) -> None:
        self._generators.append(spanning(self._scene, self._scene.span("generator")))

    def _resume(self) -> None:
        if self._generators:
            next(self._random.choice(self._generators))

    def _close(self) -> None:
        if self._generators:
            chosen = self._random.randrange(len(self._generators))
            self._generators.pop(chosen).close()  # type: ignore[attr-defined]

    def _submit(self) -> None:
        span = get_current_span()
        expected = self._scene.current.label() if span.get_span_context().is_valid else None
        self._pool.submit(self._scene.truth.unit(expected, 0.004)).result()


@pytest.mark.parametrize("seed", range(4))
def test_any_program(tmp_path: Path, seed: int) -> None:
    with GroundTruth(tmp_path) as truth:
        Walk(Scene(truth), seed).run(120)
    truth.verdict().assert_right(min_samples=0, min_total=300)
