# SPDX-License-Identifier: Apache-2.0
"""Workloads of which every burnt CPU-second is known by span.

`python -m benchmarks.accuracy_scenarios SCENARIO PROFILER DIRECTORY RATE SINK EFFORT` runs one
under one profiler and writes `truth.json` beside the profiles. API and standard library only, and
the library that the scenario is named after.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span

from benchmarks.accuracy_profilers import PROFILERS, Profiler
from benchmarks.accuracy_truth import Truth, Unit

BURST_S = 0.002
#: CPU that a scenario burns, about, before it is multiplied by the effort.
TOTAL_S = 6.0
#: One task in so many is under no span.
UNTRACED = 10


class Stage:
    """What a scenario works with.

    Attributes:
        effort: 1, or less to be done sooner.
    """

    def __init__(self, profiler: Profiler, effort: float) -> None:
        self.truth = Truth()
        self.span = profiler.span
        self.effort = effort
        self.random = random.Random(20261)


# -- threads --------------------------------------------------------------------------------------


def main_thread(stage: Stage) -> None:
    """Spans three deep, and none."""
    truth = stage.truth
    for _ in range(int(TOTAL_S * stage.effort / 0.08)):
        with stage.span("root", Context()) as root:
            truth.unit(root)(0.02)
            with stage.span("child") as child:
                truth.unit(child, root)(0.02)
                with stage.span("grandchild") as grandchild:
                    truth.unit(grandchild, root)(0.02)
        truth.unit()(0.02)


def pool(depth: int, stage: Stage) -> None:
    """Tasks that submit tasks, `depth` deep; in each worker, spans two deep."""
    truth = stage.truth

    def task(levels: list[ThreadPoolExecutor], above: Span, root: Span) -> None:
        # Before it has any span of its own, and after.
        truth.unit(above, root)(0.01)
        with stage.span("child") as child:
            truth.unit(child, root)(0.01)
            with stage.span("grandchild") as grandchild:
                truth.unit(grandchild, root)(0.01)
                if levels:
                    levels[0].submit(task, levels[1:], grandchild, root).result()
        truth.unit(above, root)(0.01)

    def untraced() -> None:
        truth.unit()(0.01)

    pools = [ThreadPoolExecutor(4) for _ in range(depth)]
    for _ in range(max(1, int(TOTAL_S * stage.effort / (0.04 * depth * 4 + 0.01)))):
        with stage.span("root", Context()) as root:
            waits = [pools[0].submit(task, pools[1:], root, root) for _ in range(4)]
            for future in waits:
                future.result()
        pools[0].submit(untraced).result()
    for one in pools:
        one.shutdown()


def short_pool_tasks(seconds: float, stage: Stage) -> None:
    """One task after the other, with pauses in which the workers wait."""
    truth = stage.truth

    def task(unit: Unit) -> None:
        unit(seconds)

    with ThreadPoolExecutor(4) as workers:
        for _ in range(int(TOTAL_S * stage.effort / seconds)):
            with stage.span("root", Context()) as root:
                workers.submit(task, truth.unit(root)).result()
            time.sleep(stage.random.uniform(0.5, 1.5) * seconds)


# -- tasks of an event loop -----------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """An async library: how it runs `main`, starts many tasks, and lets others run."""

    run: Callable[[Callable[[], Awaitable[None]]], object]
    start_all: Callable[[list[Callable[[], Awaitable[None]]]], Awaitable[None]]
    sleep: Callable[[float], Awaitable[object]]


def _asyncio_loop(module: str = "asyncio") -> Loop:
    async def start_all(tasks: list[Callable[[], Awaitable[None]]]) -> None:
        await asyncio.gather(*(task() for task in tasks))

    def run(main: Callable[[], Any]) -> None:
        factory = __import__(module).new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    return Loop(run, start_all, asyncio.sleep)


def _anyio_loop(backend: str) -> Loop:
    import anyio

    async def start_all(tasks: list[Callable[[], Any]]) -> None:
        async with anyio.create_task_group() as group:
            for task in tasks:
                group.start_soon(task)

    return Loop(partial(anyio.run, backend=backend), start_all, anyio.sleep)


LOOPS: dict[str, Callable[[], Loop]] = {
    "asyncio": _asyncio_loop,
    "uvloop": partial(_asyncio_loop, "uvloop"),
    "anyio": partial(_anyio_loop, "asyncio"),
    "anyio on trio": partial(_anyio_loop, "trio"),
}


def tasks(library: str, count: int, stage: Stage) -> None:
    """`count` tasks at the same time; each has a root and a child, or no span at all."""
    loop, truth = LOOPS[library](), stage.truth
    # At least one burst under each span.
    turns = max(1, round(TOTAL_S * stage.effort / (count * 2 * BURST_S)))

    async def burn(unit: Unit) -> None:
        for turn in range(turns):
            # First of all: a span that was current a moment ago is easy. Mostly the turn comes
            # right behind the others; now and then the task is asleep.
            await loop.sleep(0.005 if turn % 8 == 7 else 0)
            unit(BURST_S)

    async def traced() -> None:
        with stage.span("root", Context()) as root:
            await burn(truth.unit(root))
            with stage.span("child") as child:
                await burn(truth.unit(child, root))

    async def untraced() -> None:
        await burn(truth.unit())

    async def main() -> None:
        await loop.start_all(
            [untraced if index % UNTRACED == UNTRACED - 1 else traced for index in range(count)]
        )

    # Not in the thread's own context: the untraced shall have nothing to inherit.
    contextvars.Context().run(loop.run, main)


def totals(stage: Stage) -> None:
    """A few tasks that burn much: CPU per span, bursts of any length."""
    loop, truth = LOOPS["asyncio"](), stage.truth
    lengths = [stage.random.uniform(0.0005, 0.01) for _ in range(997)]

    async def task(index: int) -> None:
        with stage.span("root", Context()) as root:
            unit = truth.unit(root)
            turn = index * 100
            # Half a CPU-second in any case: less says little at 1 kHz.
            while unit.cpu_ns < 1e9 * max(0.5, 1.5 * stage.effort):
                unit(lengths[turn % len(lengths)])
                turn += 1
                await loop.sleep(0)

    async def main() -> None:
        await loop.start_all([partial(task, index) for index in range(8)])

    loop.run(main)


# -- greenlets ------------------------------------------------------------------------------------


def greenlets(count: int, stage: Stage) -> None:
    """Greenlets by hand, in turn."""
    import greenlet  # type: ignore[import-untyped]

    def give_way() -> None:
        greenlet.getcurrent().parent.switch()

    waiting = [
        greenlet.greenlet(partial(_greenlet_work, stage, give_way, count, index))
        for index in range(count)
    ]
    while waiting:
        for one in waiting:
            one.switch()
        waiting = [one for one in waiting if not one.dead]


def gevent_greenlets(count: int, stage: Stage) -> None:
    """gevent, monkey-patched: see `main`."""
    import gevent  # type: ignore[import-untyped]

    work = partial(_greenlet_work, stage, partial(gevent.sleep, 0), count)
    gevent.joinall([gevent.spawn(work, index) for index in range(count)], raise_error=True)


def _greenlet_work(stage: Stage, give_way: Callable[[], object], count: int, index: int) -> None:
    turns = max(1, round(TOTAL_S * stage.effort / (count * 2 * BURST_S)))

    def burn(unit: Unit) -> None:
        for _ in range(turns):
            give_way()
            unit(BURST_S)

    if count >= UNTRACED and index % UNTRACED == UNTRACED - 1:
        burn(stage.truth.unit())
        return
    with stage.span("root", Context()) as root:
        burn(stage.truth.unit(root))
        with stage.span("child") as child:
            burn(stage.truth.unit(child, root))


SCENARIOS: dict[str, Callable[[Stage], None]] = {
    "main thread": main_thread,
    **{f"pool, depth {depth}": partial(pool, depth) for depth in (1, 2, 3)},
    "pool, 4 ms tasks": partial(short_pool_tasks, 0.004),
    "pool, 20 ms tasks": partial(short_pool_tasks, 0.02),
    **{
        f"{library}, {count} tasks": partial(tasks, library, count)
        for library in ("asyncio", "uvloop", "anyio")
        for count in (5, 50, 200, 2000)
    },
    "anyio on trio, 200 tasks": partial(tasks, "anyio on trio", 200),
    **{f"greenlet, {count}": partial(greenlets, count) for count in (5, 50)},
    **{f"gevent, {count}": partial(gevent_greenlets, count) for count in (5, 50)},
    "CPU totals, asyncio": totals,
}


def main() -> None:
    """Run one scenario; the arguments are `benchmarks.accuracy`'s business."""
    scenario, profiler_name, directory, rate_hz, sink, effort = sys.argv[1:]
    if scenario.startswith("gevent"):
        _patch()
    profiler = PROFILERS[profiler_name](Path(directory), float(rate_hz), sink)
    stage = Stage(profiler, float(effort))
    profiler.start()
    SCENARIOS[scenario](stage)
    stage.truth.write(Path(directory, "truth.json"))
    profiler.stop()


def _patch() -> None:
    from gevent import monkey

    monkey.patch_all()


if __name__ == "__main__":
    main()
