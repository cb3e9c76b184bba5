# SPDX-License-Identifier: Apache-2.0
"""The process that is sampled: a thread for each kind of work, and a main thread that forks.

Prints a line of JSON every second, and a last one with the truth that the profiles are held
against: what each thread's CPU clock said, and how long all of them ran.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field

from otel_proflink import Profiler, runtime_context
from otel_proflink.config import Config
from otel_proflink.instrumentation import thread_pool
from tests.soak.kinds import Step, all_kinds
from tests.soak.units import Units

FORK_EVERY_S = 0.25
CHILD_LIMIT_S = 60.0


def cpu_ns(thread: threading.Thread) -> int:
    assert thread.ident is not None
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))


def resident_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


@dataclass
class Stage:
    """When the workers may begin, and when they have ended but still exist."""

    begin: threading.Event = field(default_factory=threading.Event)
    end: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)


class Worker:
    """A thread that does one kind of work until the stage ends."""

    def __init__(self, step: Step, units: Units, stage: Stage) -> None:
        self.step = step
        self.units = units
        self.stage = stage
        self.steps = 0
        self.idle = threading.Event()
        self.thread = threading.Thread(target=self.worker_main, name=step.__name__, daemon=True)

    def worker_main(self) -> None:
        self.stage.begin.wait()
        try:
            while not self.stage.end.is_set():
                self.step(self.units)
                self.steps += 1
        finally:
            self.idle.set()
        self.stage.leave.wait()


def fork_once(units: Units, profiler: Profiler, flush: bool) -> bool:
    """A child that works, and either exports what it saw or just goes. False: it hung."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for _ in range(10):
                units.run_unit(0.001)
            status = 0 if not flush or profiler.stop(CHILD_LIMIT_S / 2) else 3
        finally:
            os._exit(status)
    limit = time.monotonic() + CHILD_LIMIT_S
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status != 0:
                say(child_status=status)
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)  # faulthandler says where it hangs
    os.waitpid(pid, 0)
    return False


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def run(seconds: float, profiler: Profiler) -> None:
    units, stage = Units(), Stage()
    kinds, missing = all_kinds()
    workers = [Worker(step, units, stage) for step in kinds.values()]
    for worker in workers:
        worker.thread.start()
    assert profiler.start().running, "the profiler does not run"
    threads = [worker.thread for worker in workers] + [threading.main_thread()]
    before = {thread: cpu_ns(thread) for thread in threads}
    process_before = time.process_time_ns()
    began = beat = time.perf_counter()
    stage.begin.set()
    forks = hung = 0
    say(pid=os.getpid(), kinds=list(kinds), missing=missing, settled_kib=0)
    settled = 0
    while time.perf_counter() < began + seconds:
        next_fork = time.perf_counter() + FORK_EVERY_S
        if hung == 0:
            hung += not fork_once(units, profiler, flush=forks % 2 == 0)
            forks += 1
        time.sleep(max(0.0, next_fork - time.perf_counter()))
        if time.perf_counter() > beat + 1:
            beat = time.perf_counter()
            if settled == 0 and beat > began + seconds / 5:
                settled = resident_kib()
            say(steps=[worker.steps for worker in workers], kib=resident_kib())
    stage.end.set()
    for worker in workers:
        assert worker.idle.wait(120), f"{worker.thread.name} does not end"
    wall = time.perf_counter() - began
    clocks = {thread.native_id: cpu_ns(thread) - before[thread] for thread in threads}
    process_ns = time.process_time_ns() - process_before
    stats = profiler.stats()
    flushed = profiler.stop(60)
    say(
        final=True,
        flushed=flushed,
        wall_ns=int(wall * 1e9),
        threads={str(tid): ns for tid, ns in clocks.items()},
        process_cpu_ns=process_ns,
        names={str(thread.native_id): thread.name for thread in threads},
        steps={worker.thread.name: worker.steps for worker in workers},
        units=units.made,
        forks=forks,
        hung_children=hung,
        settled_kib=settled,
        kib=resident_kib(),
        stats=stats,
    )
    stage.leave.set()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--rate", type=float, required=True)
    options.add_argument("--engine", required=True)
    options.add_argument("--directory", required=True)
    arguments = options.parse_args()
    faulthandler.enable()
    # CPython warns of forks in processes with threads.
    warnings.simplefilter("ignore", DeprecationWarning)
    sys.setswitchinterval(0.0005)
    config = Config(
        exporter="pprof",
        output_dir=arguments.directory,
        sample_rate_hz=arguments.rate,
        engine=arguments.engine,
        export_interval_ms=1000,
        start="now",
    )
    runtime_context.install()
    thread_pool.instrument()
    run(arguments.seconds, Profiler(config))


if __name__ == "__main__":
    main()
