# SPDX-License-Identifier: Apache-2.0
"""Tasks that wait: where, under which span, for how long; and work that tasks handed over."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from otel_proflink import _linker, awaits
from tests.support.ground_truth import GroundTruth, Label, needs_sampler
from tests.support.pprof_schema import DecodedSample

pytestmark = needs_sampler
needs_gil = pytest.mark.skipif(
    _linker.FREE_THREADED, reason="without the GIL, another thread's coroutines cannot be read"
)


def waits(truth: GroundTruth) -> list[DecodedSample]:
    return [sample for sample in truth.samples() if sample.values.get("await")]


async def innermost() -> None:
    await asyncio.sleep(0.6)


async def outermost() -> None:
    await innermost()


@needs_gil
def test_a_waiting_task_shows_its_coroutines_its_span_and_its_name(tmp_path: Path) -> None:
    labels: dict[str, Label] = {}

    async def request(truth: GroundTruth, name: str) -> None:
        with truth.tracer.start_as_current_span(name) as span:
            labels[name] = Label.of(span)
            await outermost()

    async def main(truth: GroundTruth) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(3):
                group.create_task(request(truth, f"request-{i}"), name=f"request-{i}")
            group.create_task(asyncio.sleep(0.6), name="without a span")

    with GroundTruth(tmp_path, await_rate_hz=50) as truth:
        asyncio.run(main(truth))
    weights: Counter[str] = Counter()
    for sample in waits(truth):
        name = sample.labels["task_name"]
        assert sample.functions[1:3] == ("innermost", "outermost"), sample.stack
        assert sample.functions[-1].endswith("request")
        assert sample.functions[0] == "sleep"
        lines = {function: line for function, _, line in sample.stack}
        assert lines["innermost"] == innermost.__code__.co_firstlineno + 1
        assert labels[name].allows(sample.labels)
        assert sample.labels["span_name"] == name
        assert sample.numbers["task_id"]
        # Apart from the threads' totals.
        assert "thread_id" not in sample.numbers
        assert (sample.values["samples"], sample.values["cpu"], sample.values["wall"]) == (0, 0, 0)
        weights[name] += sample.values["await"]
    assert set(weights) == set(labels), "too few samples"
    for name, waited in weights.items():
        assert 0.3e9 < waited < 0.9e9, f"too few samples? {name}: {weights}"


@needs_gil
def test_more_tasks_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaits, "MOST_TASKS", 10)

    async def request(truth: GroundTruth) -> None:
        with truth.tracer.start_as_current_span("one of many"):
            await asyncio.sleep(1)

    async def main(truth: GroundTruth) -> None:
        await asyncio.gather(*[request(truth) for _ in range(100)])

    with GroundTruth(tmp_path, rate_hz=10, await_rate_hz=50) as truth:
        asyncio.run(main(truth))
    found = waits(truth)
    assert all(sample.labels["span_name"] == "one of many" for sample in found)
    total = sum(sample.values["await"] for sample in found)
    assert 60e9 < total < 140e9, f"too few samples? 100 waits of 1 s are {total / 1e9:.1f} s"


@needs_gil
def test_generators_and_several_loops(tmp_path: Path) -> None:
    async def numbers() -> Any:
        yield 1
        await asyncio.sleep(0.5)
        yield 2

    async def consume() -> None:
        async for _ in numbers():
            pass

    async def main(truth: GroundTruth, name: str) -> None:
        with truth.tracer.start_as_current_span(name):
            await consume()

    with (
        GroundTruth(tmp_path, await_rate_hz=50, pool=False) as truth,
        ThreadPoolExecutor(2) as pool,
    ):
        for done in [pool.submit(asyncio.run, main(truth, f"loop-{i}")) for i in range(2)]:
            done.result()
    seen = {
        (sample.labels["span_name"], function.rsplit(".", 1)[-1])
        for sample in waits(truth)
        for function in sample.functions
    }
    assert {(f"loop-{i}", "consume") for i in range(2)} <= seen


@pytest.mark.skipif(not _linker.FREE_THREADED, reason="this Python has the GIL")
def test_without_the_gil_no_task_is_looked_at(tmp_path: Path) -> None:
    async def many() -> None:
        await asyncio.gather(*[outermost() for _ in range(3)])

    with (
        GroundTruth(tmp_path, await_rate_hz=50) as truth,
        truth.tracer.start_as_current_span("request"),
    ):
        asyncio.run(many())
    assert truth.samples()
    assert all("await" not in sample.values for sample in truth.samples())


def test_off_means_no_such_sample_type(tmp_path: Path) -> None:
    async def main(truth: GroundTruth) -> None:
        with truth.tracer.start_as_current_span("request"):
            await asyncio.sleep(0.2)
            truth.burn(None)

    with GroundTruth(tmp_path, await_rate_hz=0) as truth:
        asyncio.run(main(truth))
    assert all(set(s.values) == {"samples", "cpu", "wall"} for s in truth.samples())


async def to_thread(work: Callable[[], int]) -> None:
    await asyncio.to_thread(work)


async def in_executor(work: Callable[[], int]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work)


async def in_a_pool(work: Callable[[], int]) -> None:
    with ThreadPoolExecutor(1) as pool:
        await asyncio.wrap_future(pool.submit(work))


@pytest.mark.parametrize("hand_over", [to_thread, in_executor, in_a_pool])
def test_e6_offloaded_work_carries_the_awaiting_task_s_name(
    tmp_path: Path, hand_over: Callable[[Callable[[], int]], Awaitable[None]]
) -> None:
    ids: dict[str, int] = {}
    names: dict[str, str | None] = {}

    async def request(truth: GroundTruth, name: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        ids[name] = id(task)
        with truth.tracer.start_as_current_span(name) as span:
            work = truth.unit(Label.of(span))
            names[work.__name__] = name
            await hand_over(work)
            failing = truth.unit(Label.of(span))
            names[failing.__name__] = name

            def fail() -> int:
                failing()
                raise KeyError

            with pytest.raises(KeyError):
                await hand_over(fail)
        here = truth.unit(None)  # the loop's own thread: no work of a task was handed to it
        names[here.__name__] = None
        here()

    async def main(truth: GroundTruth) -> None:
        for i in range(2):
            await asyncio.create_task(request(truth, f"job-{i}"), name=f"job-{i}")
        after = truth.unit(None)
        names[after.__name__] = None
        loop = asyncio.get_running_loop()
        # Handed over by no task, to threads that have run tasks' work before.
        done = loop.create_future()
        contextvars.Context().run(
            loop.call_soon,
            lambda: loop.run_in_executor(None, after).add_done_callback(
                lambda _: done.set_result(None)
            ),
        )
        await done

    with GroundTruth(tmp_path) as truth:
        asyncio.run(main(truth))
    truth.verdict().assert_right()
    seen: dict[str, set[tuple[str | None, int | None]]] = {}
    for sample in truth.samples():
        for function in set(sample.functions) & set(names):
            if sample.values["samples"]:
                label = (sample.labels.get("task_name"), sample.numbers.get("task_id"))
                seen.setdefault(function, set()).add(label)
    assert set(seen) == set(names), "too few samples"
    for function, name in names.items():
        assert seen[function] == {(name, ids[name] if name else None)}, function
