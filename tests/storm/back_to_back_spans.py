# SPDX-License-Identifier: Apache-2.0
"""Back-to-back short spans, each running a function of its own, under the sampler.

Run as a program; prints one JSON object: what the exported profile says about each function.
Kinds: `plain` (one thread), `nested` (a child span inside each), `threads` (four threads),
`asyncio` (tasks that switch in mid-span, with no attach at all).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from otel_proflink import _linker, _sampler, runtime_context
from tests.support import pprof_schema

FUNCTIONS = 400
_COUNTERS = ("snapshots", "retries", "give_ups", "read_errors", "signals", "signals_dropped")
SOURCE = """
def storm_{i}(burn_ns, clock=clock):
    end = clock() + burn_ns
    x = 0
    while clock() < end:
        x += helper(x)
    return x
async def wait_{i}(burn_ns, sleep=sleep):
    storm_{i}(burn_ns)
    await sleep(0)
    storm_{i}(burn_ns)
"""


def helper(x: int) -> int:
    return x & 1


class Processor(_linker.SpanHooks, SpanProcessor):
    pass


def make_functions() -> list[dict[str, Callable[..., object]]]:
    made = []
    for i in range(FUNCTIONS):
        names: dict[str, Callable[..., object]] = {
            "clock": time.perf_counter_ns,
            "helper": helper,
            "sleep": asyncio.sleep,
        }
        exec(compile(SOURCE.format(i=i), f"storm_{i}.py", "exec"), names)
        made.append(names)
    return made


class Storm:
    def __init__(self, burn_us: float, seconds: float, seed: int) -> None:
        provider = TracerProvider()
        provider.add_span_processor(Processor())
        self.tracer = provider.get_tracer("storm")
        self.functions = make_functions()
        self.owner: dict[str, int] = {}  # span id -> number of the function that it runs
        self.burn_ns = int(burn_us * 1000)
        self.deadline = time.perf_counter() + seconds
        self.seed = seed

    def span(self, number: int) -> contextlib.AbstractContextManager[trace.Span]:
        span = self.tracer.start_span("s")
        self.owner[f"{span.get_span_context().span_id:016x}"] = number
        return trace.use_span(span, end_on_exit=True)

    def plain(self, nested: bool = False) -> None:
        choice = random.Random(self.seed ^ threading.get_ident())
        while time.perf_counter() < self.deadline:
            number = choice.randrange(FUNCTIONS)
            with self.span(number):
                self.functions[number][f"storm_{number}"](self.burn_ns)
                if nested:
                    inner = choice.randrange(FUNCTIONS)
                    with self.span(inner):
                        self.functions[inner][f"storm_{inner}"](self.burn_ns)
                    self.functions[number][f"storm_{number}"](self.burn_ns)

    def threads(self) -> None:
        workers = [threading.Thread(target=self.plain, args=(True,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def tasks(self) -> None:
        async def one(choice: random.Random) -> None:
            while time.perf_counter() < self.deadline:
                number = choice.randrange(FUNCTIONS)
                with self.span(number):
                    await self.functions[number][f"wait_{number}"](self.burn_ns)  # type: ignore[misc]

        async def many() -> None:
            await asyncio.gather(*[one(random.Random(i)) for i in range(50)])

        asyncio.run(many())


def judge(profile: object, owner: dict[str, int]) -> dict[str, int]:
    """Compares every sample that shows a storm function with the span that it is labelled with."""
    table = list(profile.string_table)  # type: ignore[attr-defined]
    functions = {f.id: table[f.name] for f in profile.function}  # type: ignore[attr-defined]
    locations = {
        place.id: [functions[line.function_id] for line in place.line]
        for place in profile.location  # type: ignore[attr-defined]
    }
    seen = {"right": 0, "wrong": 0, "unlabelled": 0, "unreadable": 0, "bad_pair": 0, "other": 0}
    for sample in profile.sample:  # type: ignore[attr-defined]
        count = sample.value[0]
        names = [name for place in sample.location_id for name in locations[place]]
        labels = {table[label.key]: table[label.str] for label in sample.label if label.str}
        storm = [name for name in names if name.startswith(("storm_", "wait_"))]
        if names == ["[unreadable]"]:
            seen["unreadable"] += count
        elif not storm:
            seen["other"] += count
        elif "span_id" not in labels:
            seen["unlabelled"] += count
        elif owner.get(labels["span_id"]) == int(storm[0].split("_")[1]):
            seen["right"] += count
        else:
            seen["wrong"] += count
        # helper() is only ever called by a storm function.
        if names and names[0] == "helper" and not (len(names) > 1 and names[1] in storm):
            seen["bad_pair"] += count
    return seen


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--kind", default="plain")
    options.add_argument("--rate", type=float, default=1000)
    options.add_argument("--seconds", type=float, default=3)
    options.add_argument("--burn-us", type=float, default=50)
    options.add_argument("--one-cpu", action="store_true")
    options.add_argument("--engine", default="sweep")
    arguments = options.parse_args()
    if arguments.one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    runtime_context.install()
    _sampler.start(arguments.rate, engine=arguments.engine)
    storm = Storm(arguments.burn_us, arguments.seconds, 7)
    kinds: dict[str, Callable[[], None]] = {
        "plain": storm.plain,
        "nested": lambda: storm.plain(True),
        "threads": storm.threads,
        "asyncio": storm.tasks,
    }
    total = {"spans": 0}
    finished = threading.Event()
    captures = []

    def collect() -> None:
        # Swaps in mid-storm, as the exporter does.
        while not finished.wait(0.5):
            captures.append(_sampler.swap())

    collector = threading.Thread(target=collect)
    collector.start()
    kinds[arguments.kind]()
    finished.set()
    collector.join()
    _sampler.stop()
    captures.append(_sampler.swap())
    for capture in captures:
        assert capture is not None
        encoded = capture.encode_pprof(endpoints={}, thread_names={})
        for key, value in judge(pprof_schema.decode(encoded), storm.owner).items():
            total[key] = total.get(key, 0) + value
    total["spans"] = len(storm.owner)
    stats = _sampler.stats()
    total |= {key: stats[key] for key in _COUNTERS}
    json.dump(total, sys.stdout)


if __name__ == "__main__":
    main()
