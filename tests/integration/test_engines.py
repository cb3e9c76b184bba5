# SPDX-License-Identifier: Apache-2.0
"""The `cpu_timer` engine: what it samples, and that nobody else notices its signals."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from otel_proflink import Profiler, _sampler
from otel_proflink.config import Config
from tests.support import pprof_schema

RATE = 100.0


@pytest.fixture(autouse=True)
def _supported() -> Iterator[None]:
    try:
        _sampler.self_test()
    except _sampler.SamplerError as reason:
        pytest.skip(str(reason))
    yield
    _sampler.stop()
    _sampler.swap()


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@contextlib.contextmanager
def sampling(rate: float = RATE) -> Iterator[dict[str, int]]:
    """Samples with timers; what is yielded holds, after the end, what the counters moved by."""
    moved: dict[str, int] = {}
    _sampler.start(rate, engine="cpu_timer")
    before = _sampler.stats()
    assert _sampler.stats()["cpu_timer"] == 1
    try:
        yield moved
    finally:
        after = _sampler.stats()
        _sampler.stop()
        moved.update({key: after[key] - before.get(key, 0) for key in after})
        moved["cpu_timer"] = after["cpu_timer"]


def profiled() -> list[pprof_schema.DecodedSample]:
    capture = _sampler.swap()
    assert capture is not None
    encoded = capture.encode_pprof(endpoints={}, thread_names={})
    return list(pprof_schema.samples(pprof_schema.decode(encoded)))


def totals(name: str) -> tuple[int, float, float]:
    """Samples, CPU and wall seconds of everything below a function."""
    found = [sample for sample in profiled() if name in sample.functions]
    return (
        sum(sample.values["samples"] for sample in found),
        sum(sample.values["cpu"] for sample in found) / 1e9,
        sum(sample.values["wall"] for sample in found) / 1e9,
    )


def marked_work() -> None:
    burn(0.6)
    time.sleep(0.4)
    burn(0.4)


def test_cpu_and_wall_add_up() -> None:
    with sampling() as moved:
        began = time.perf_counter()
        cpu = time.thread_time()
        marked_work()
        cpu = time.thread_time() - cpu
        wall = time.perf_counter() - began
    count, seen_cpu, seen_wall = totals("marked_work")
    assert moved["signals"] > 50, f"too few samples: {moved}"
    assert seen_cpu == pytest.approx(cpu, rel=0.05)
    assert seen_wall == pytest.approx(wall, rel=0.05)
    assert count > 80


def test_a_busy_thread_among_many_idle_ones() -> None:
    done = threading.Event()
    idle = [threading.Thread(target=done.wait) for _ in range(200)]
    for thread in idle:
        thread.start()
    with sampling() as moved:
        marked_work()
    done.set()
    for thread in idle:
        thread.join()
    # A hundred per CPU second; the sleep in its midst is seen by the sweep.
    assert moved["signals"] + moved["signal_overruns"] >= 90, f"too few samples: {moved}"


def test_short_threads_are_seen_in_proportion() -> None:
    """None of them burns a whole period."""
    with sampling() as moved:
        for _ in range(100):
            thread = threading.Thread(target=burn, args=(0.005,))
            thread.start()
            thread.join()
    _, cpu, _ = totals("burn")
    assert moved["timers_refused"] == 0
    # Half a second, of which the ticks meet every other thread; timers alone see a hundredth.
    assert cpu > 0.1, f"too few samples: {cpu} s"
    assert cpu < 0.8


def test_a_handler_that_was_there_is_still_called() -> None:
    calls = []
    before = signal.signal(signal.SIGPROF, lambda number, frame: calls.append(number))
    try:
        with sampling() as moved:
            os.kill(os.getpid(), signal.SIGPROF)
            signal.setitimer(signal.ITIMER_PROF, 0.02, 0.02)
            burn(0.5)
            signal.setitimer(signal.ITIMER_PROF, 0)
            timers = moved
        assert timers["stood_back"] == 0
        assert len(calls) > 10, "its own timer's signals, and the one that was sent"
        assert timers["signals"] > 20
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert totals("burn")[1] > 0.3


def test_stands_back_where_somebody_takes_the_signal() -> None:
    calls = []
    before = signal.getsignal(signal.SIGPROF)
    with sampling() as moved:
        burn(0.2)
        signal.signal(signal.SIGPROF, lambda number, frame: calls.append(number))
        burn(0.1)
        late = len(calls)
        burn(0.5)
    signal.signal(signal.SIGPROF, before or signal.SIG_IGN)
    assert moved["stood_back"] == 1
    assert moved["cpu_timer"] == 0
    assert len(calls) == late <= 3, "what was on its way until the next tick"
    _, cpu, _ = totals("burn")
    assert cpu == pytest.approx(0.8, rel=0.1), "the sweep goes on"


def test_a_thread_that_blocks_the_signal_is_swept() -> None:
    def hidden_work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        burn(1.0)

    with sampling() as moved:
        thread = threading.Thread(target=hidden_work)
        thread.start()
        thread.join()
    assert moved["silent_threads"] == 1
    name = test_a_thread_that_blocks_the_signal_is_swept.__qualname__
    assert totals(f"{name}.<locals>.hidden_work")[1] == pytest.approx(1.0, rel=0.1)


def test_no_timers_left() -> None:
    """RLIMIT_SIGPENDING: the kernel refuses, the sweep does it all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, hard))
    try:
        with sampling() as moved:
            burn(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (soft, hard))
    assert moved["timers_refused"] > 0
    assert totals("burn")[1] == pytest.approx(0.5, rel=0.1)


@contextlib.contextmanager
def busy_threads(count: int) -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            burn(0.01)

    workers = [threading.Thread(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def test_start_and_stop_in_turns() -> None:
    """A signal that is on its way when the engine stops finds a handler."""
    with busy_threads(4):
        for _ in range(60):
            _sampler.start(1000, engine="cpu_timer")
            time.sleep(0.01)
            _sampler.stop()
            _sampler.swap()


def test_fork_with_timers_running() -> None:
    with sampling(1000), busy_threads(1):
        for _ in range(20):
            burn(0.005)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    burn(0.05)  # a timer of the parent's would kill it, or be seen
                    assert _sampler.stats()["signals"] == 0
                    _sampler.start(1000, engine="cpu_timer")
                    burn(0.2)
                    status = 0 if _sampler.stats()["signals"] > 5 else 2
                    _sampler.stop()
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            assert status != 2 << 8, "too few samples"
            assert status == 0


def interrupted(wait: Callable[[], object]) -> int:
    """Times that a wait came back early, called without Python's own retry."""
    early = 0
    for _ in range(50):
        began = time.monotonic()
        wait()
        early += time.monotonic() - began < 0.009
        burn(0.002)
    return early


def test_system_calls_that_wait_are_not_interrupted() -> None:
    """A CPU timer can only expire on a thread that runs."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    poller = select.epoll()
    with sampling(1000) as moved:
        assert interrupted(lambda: libc.usleep(10_000)) == 0
        assert interrupted(lambda: libc.poll(None, 0, 10)) == 0
        assert interrupted(lambda: poller.poll(0.01)) == 0
    assert moved["signals"] > 20


@pytest.mark.parametrize("action", ["faulthandler", "small_stacks", "exit", "exec"])
def test_in_a_process_of_its_own(action: str) -> None:
    """What could take the whole process with it."""
    code = textwrap.dedent(
        """
        import faulthandler, json, os, signal, sys, threading, time
        from otel_proflink import _sampler

        def burn(seconds):
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass

        action = sys.argv[1]
        if action == "small_stacks":
            threading.stack_size((32 if sys.version_info < (3, 14) else 64) * 1024)
        if action == "faulthandler":
            faulthandler.enable()
        _sampler.start(1000, engine="cpu_timer")
        if action == "exec":
            burn(0.2)
            os.execv(sys.executable, [sys.executable, "-c", "for _ in range(10**7): pass"])
        workers = [
            threading.Thread(target=burn, args=(0.3,), daemon=action == "exit") for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        if action == "faulthandler":
            faulthandler.dump_traceback_later(0.1, file=open(os.devnull, "w"))
            faulthandler.disable()
        if action == "exit":
            burn(0.1)
            sys.exit(0)
        for worker in workers:
            worker.join()
        json.dump(_sampler.stats(), sys.stdout)
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, action],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    if action in ("faulthandler", "small_stacks"):
        assert json.loads(ended.stdout)["signals"] > 100


def test_says_that_it_stood_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGPROF)
    config = Config(output_dir=os.fspath(tmp_path), engine="cpu_timer", start="now")
    with Profiler(config):
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        deadline = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
    signal.signal(signal.SIGPROF, before or signal.SIG_IGN)
    assert [record.getMessage() for record in caplog.records] == [
        "otel-proflink samples with the engine sweep, not cpu_timer: somebody else took SIGPROF"
    ]
