# SPDX-License-Identifier: Apache-2.0
"""Application slowdown, the sampler's own CPU and its yield, at 100 Hz and 1 kHz.

The same fixed work runs in turns with the profiler off, with it on, and beside another process that
does nothing but wake up at the sampler's rate: what such a thread costs is the machine's, not ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks._paired import Bar, Row, Side, arguments, estimate, measure, report
from benchmarks._setup import Everything, Scratch
from otel_proflink import _sampler
from otel_proflink.config import EngineName
from otel_proflink.report.pprof_reader import read_profile

DEPTH = 200
# The sampler looks at an idle thread less and less often, for a second and a half; and an
# application that runs for hours is not described by its first second.
SETTLE_S = 2.0
NO_SLOWDOWN = Bar(1.0, "none found", "1.00 to 1.05 (native), 1.05 to 3.2 (py-spy)")
YIELD = Bar(95, "least", "3.8 (ddtrace)")
Work = Callable[[int], dict[str, float]]


def burn(turns: int) -> int:
    """Fixed work: arithmetic and calls."""
    number = 1
    for _ in range(turns):
        for _ in range(50):
            number = (number * 31 + 7) % 1_000_003
        number = step(number)
    return number


def step(number: int) -> int:
    """A frame that comes and goes."""
    return number ^ 1


def deep(turns: int, depth: int = DEPTH) -> int:
    """The same with `depth` callers."""
    return deep(turns, depth - 1) if depth else burn(turns)


def runnable_s() -> float:
    """Seconds in which this thread ran or, on a busy machine, waited for a CPU."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_bytes().split()
    return (int(ran) + int(waited)) / 1e9


def here(work: Callable[[int], int]) -> Callable[[int], dict[str, float]]:
    """The work in the calling thread."""

    def run(turns: int) -> dict[str, float]:
        cpu, runnable = time.thread_time(), runnable_s()
        work(turns)
        return {
            "thread_cpu": (time.thread_time() - cpu) / turns,
            "runnable": runnable_s() - runnable,
        }

    return run


def in_two_threads(turns: int) -> dict[str, float]:
    """Half of the work in each of two threads; figures are sums."""
    halves: list[dict[str, float]] = []

    def half() -> None:
        halves.append(here(burn)(turns // 2 + 1))

    threads = [threading.Thread(target=half) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "thread_cpu": sum(half["thread_cpu"] for half in halves) / 2,
        "runnable": sum(half["runnable"] for half in halves),
    }


class Idle:
    """Threads that wait for the end of the benchmark."""

    def __init__(self, count: int) -> None:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._end.wait) for _ in range(count)]

    def __enter__(self) -> None:
        size = threading.stack_size(256 * 1024)
        for thread in self._threads:
            thread.start()
        threading.stack_size(size)

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


class WakeUps:
    """A process with one thread that only wakes up, `rate_hz` times a second."""

    # Python adds about a microsecond to each wake-up's tens: what is measured net of this is too
    # low by 0.01 % of a core at 100 Hz.
    _CODE = """
import signal, sys, time
period = 1 / float(sys.argv[1])
count = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
began = time.thread_time()
try:
    print(flush=True)
    while True:
        time.sleep(period)
        count += 1
except KeyboardInterrupt:
    print((time.thread_time() - began) / max(1, count))
"""

    def __init__(self, rate_hz: float) -> None:
        self._rate_hz = rate_hz

    def start(self) -> None:
        """Returns once it runs."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self._CODE, str(self._rate_hz)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def stop(self) -> dict[str, float]:
        """Its CPU, as a share of a core."""
        self._process.send_signal(signal.SIGINT)
        text, _ = self._process.communicate(timeout=10)
        return {"sampler": float(text) * self._rate_hz}


class Profiled:
    """The side with the profiler on; also what the sampler burns, and what it finds."""

    def __init__(self, work: Work, rate_hz: float, engine: EngineName) -> None:
        self._work = work
        self._rate_hz = rate_hz
        self._output = Scratch()
        self._everything = Everything(self._output, rate_hz=rate_hz, engine=engine)
        self._runnable_s = 0.0

    def side(self) -> Side:
        """For `measure`."""
        return Side("on", self._run, self._enter, self._leave)

    def _enter(self) -> None:
        self._runnable_s = 0.0
        self._everything.on()
        time.sleep(SETTLE_S)

    def _run(self, turns: int) -> dict[str, float]:
        before = _sampler.stats()
        figures = self._work(turns)
        after = _sampler.stats()
        self._runnable_s += figures["runnable"]
        # Per tick, as wake-ups are counted: a machine too busy to run all of them shows no less.
        ticks = after["ticks"] - before["ticks"]
        spent = (after["sampler_cpu_ns"] - before["sampler_cpu_ns"]) / 1e9
        within = (after["signal_ns"] - before["signal_ns"]) / 1e9
        return {
            **figures,
            "sampler": spent / max(1, ticks) * self._rate_hz,
            "handler": within / figures["runnable"],
        }

    def _leave(self) -> dict[str, float]:
        self._everything.profiler.stop()
        # A thread that waits for a CPU is on it as far as samples go (their CPU weights are scaled
        # to its clock): counted per second of either.
        found = sum(
            sample.values[0]
            for file in self._output.path.glob("profile-*.pb.gz")
            for sample in read_profile(file).samples
            if sample.labels.strings["thread_state"] == "running"
            and any(frame.function == burn.__qualname__ for frame in sample.stack.frames)
        )
        self._everything.off()
        return {"yield": found / self._runnable_s}

    def __enter__(self) -> Profiled:
        return self

    def __exit__(self, *error: object) -> None:
        self._output.__exit__()


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        bar: of the sampler's CPU at 100 Hz, in % of a core.
        rates_hz: rates at which it is measured on all CPUs; pinned to one, it is at the first.
    """

    name: str
    work: Work
    idle: int
    bar: Bar | None
    rates_hz: tuple[int, ...] = (100,)
    pinned: bool = True


CASES = (
    Case("1 busy thread", here(burn), 0, Bar(0.2, peer="0.65 (ddtrace)"), (100, 1000)),
    Case("200 frames deep", here(deep), 0, Bar(0.3, peer="1.4 (ddtrace)")),
    Case(
        "50 idle + 2 busy",
        in_two_threads,
        50,
        Bar(0.5, peer="2.9 (ddtrace, 25 of 52 threads)"),
        (100, 1000),
    ),
    Case("200 idle + 1 busy", here(burn), 200, None, pinned=False),
    Case("1000 idle + 1 busy", here(burn), 1000, Bar(0.8, peer="not possible (ddtrace)")),
)


def rows_of(
    case: Case, rate_hz: int, where: str, rounds: int, engine: EngineName = "auto"
) -> list[Row]:
    """All figures of one case at one rate."""
    wake_ups = WakeUps(rate_hz)
    with Idle(case.idle), Profiled(case.work, rate_hz, engine) as profiled:
        sides = [
            Side("off", case.work),
            profiled.side(),
            Side("wake-ups", case.work, wake_ups.start, wake_ups.stop),
        ]
        figures = measure(sides, rounds=rounds, block_s=0.5, settle_s=0.05)
    title = f"{case.name}, {rate_hz} Hz, {where}"
    at_100 = rate_hz == 100
    floor = figures.typical("wake-ups", "sampler") * 100
    net = figures.difference("on", "wake-ups", "sampler", 100)
    gross = figures.typical("on", "sampler") * 100
    handler = figures.typical("on", "handler") * 100
    in_handler = f", and {handler:.2f} within the application's threads" if handler else ""
    only = figures.ratio("wake-ups", "off", "thread_cpu")
    return [
        Row(
            f"slowdown, CPU: {title}",
            figures.ratio("on", "off", "thread_cpu"),
            "×",
            NO_SLOWDOWN if at_100 else None,
            f"beside a process that only wakes up {only.value:.3f}",
        ),
        Row(
            f"slowdown, wall: {title}",
            figures.ratio("on", "off", "wall"),
            "×",
            NO_SLOWDOWN if at_100 else None,
        ),
        Row(
            f"sampler CPU, net: {title}",
            net,
            "% of a core",
            case.bar if at_100 else None,
            f"{gross:.2f} less {floor:.2f} of a thread that only wakes up{in_handler}",
        ),
        Row(
            f"samples per CPU second: {title}",
            estimate(figures.values("on", "yield")),
            "",
            YIELD if at_100 and case.idle >= 200 else None,
        ),
    ]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rounds = 5 if options.quick else 12
    all_cpus = os.sched_getaffinity(0)
    rows = []
    for case in CASES:
        for rate_hz in case.rates_hz:
            rows += rows_of(case, rate_hz, f"{len(all_cpus)} CPUs", rounds, options.engine)
        if case.pinned:
            # As `taskset -c 0` does; threads and processes that come after inherit it.
            os.sched_setaffinity(0, {min(all_cpus)})
            rows += rows_of(case, case.rates_hz[0], "pinned to one", rounds, options.engine)
            os.sched_setaffinity(0, all_cpus)
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
