# SPDX-License-Identifier: Apache-2.0
"""The CPU budget (``OTEL_PROFLINK_MAX_OVERHEAD``): held, and the weights are as right as ever."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from otel_proflink import _sampler
from tests.support import pprof_schema

SHARE = 0.05
SECONDS = 8.0
#: What is promised is `share * (t + 1 s)` and one tick; a quarter is for the tick.
TOLERANCE = 1.25


@pytest.fixture(autouse=True)
def _supported() -> Iterator[None]:
    try:
        _sampler.self_test()
    except _sampler.SamplerError as reason:
        pytest.skip(str(reason))
    yield
    _sampler.stop()
    _sampler.set_budget(0)
    _sampler.swap()


def burns(until: threading.Event, rest: threading.Event) -> None:
    """Most of it without the GIL: all of them can."""
    while not until.is_set():
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 2000)
    rest.wait()


def wakes_up(until: threading.Event, rest: threading.Event) -> None:
    """Does next to nothing, but often: between two ticks its clock moves, so it has to be read."""
    while not until.is_set():
        time.sleep(0.02)
    rest.wait()


@contextmanager
def threads_at_work(busy: int, wakers: int) -> Iterator[list[threading.Thread]]:
    until, rest = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=burns if i < busy else wakes_up, args=(until, rest))
        for i in range(busy + wakers)
    ]
    for thread in threads:
        thread.start()
    try:
        yield threads[:busy]
    finally:
        until.set()
        rest.set()
        for thread in threads:
            thread.join()


def clocks_ns(threads: list[threading.Thread]) -> dict[int, int]:
    """Native thread id to CPU clock; under 0 the time."""
    clocks = {0: time.monotonic_ns()}
    for thread in threads:
        assert thread.ident is not None
        assert thread.native_id is not None
        clocks[thread.native_id] = time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
    return clocks


def test_a_budget_is_held_and_weights_add_up() -> None:
    with threads_at_work(busy=2, wakers=200) as busy:
        _sampler.set_budget(SHARE)
        # The machine may do something else between any two lines.
        before_start = clocks_ns(busy)
        _sampler.start(1000)
        after_start = clocks_ns(busy)
        time.sleep(SECONDS)
        stats = _sampler.stats()
        before_stop = clocks_ns(busy)
        _sampler.stop()
        after_stop = clocks_ns(busy)
        capture = _sampler.swap()

    least = {thread: before_stop[thread] - after_start[thread] for thread in after_start}
    most = {thread: after_stop[thread] - before_start[thread] for thread in after_start}
    elapsed = most[0] / 1e9
    assert stats["threads"] >= 202
    assert stats["sampler_cpu_ns"] / 1e9 <= TOLERANCE * SHARE * (elapsed + 1), stats
    assert stats["period_ns"] > 1_000_000, "there was need to save"
    assert stats["ticks"] >= elapsed - 2, "but not below one look a second"

    assert capture is not None
    message = pprof_schema.decode(capture.encode_pprof(endpoints={}, thread_names={}))
    assert message.period == capture.period_ns
    assert message.period == pytest.approx(message.duration_nanos / stats["ticks"], rel=0.1)
    count, cpu, wall = Counter[int](), Counter[int](), Counter[int]()
    for sample in pprof_schema.samples(message):
        thread = sample.numbers["thread_id"]
        count[thread] += sample.values["samples"]
        cpu[thread] += sample.values["cpu"]
        wall[thread] += sample.values["wall"]
    for thread in least.keys() - {0}:
        assert cpu[thread] > 0, "too few samples"
        assert 0.98 * least[thread] <= cpu[thread] <= 1.02 * most[thread]
        assert 0.99 * least[0] <= wall[thread] <= 1.01 * most[0]
        # A look is a look, at a thread that runs and at one that sleeps.
        assert count[thread] == pytest.approx(stats["ticks"], abs=3)
        assert count[thread] * message.period == pytest.approx(wall[thread], rel=0.15)
    everybody = sorted(count.values())
    assert everybody[len(everybody) // 2] == pytest.approx(stats["ticks"], abs=3)


def test_the_rate_comes_back_when_the_load_goes() -> None:
    _sampler.set_budget(SHARE)
    with threads_at_work(busy=0, wakers=400):
        _sampler.start(1000)
        deadline = time.monotonic() + 30
        while _sampler.stats()["period_ns"] < 10_000_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _sampler.stats()["period_ns"] >= 10_000_000
    while _sampler.stats()["period_ns"] > 5_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _sampler.stats()["period_ns"] <= 5_000_000


def test_without_a_budget_the_period_is_what_was_asked_for() -> None:
    with threads_at_work(busy=0, wakers=50):
        _sampler.start(1000)
        time.sleep(0.3)
        assert _sampler.stats()["period_ns"] == 1_000_000
        _sampler.stop()
    capture = _sampler.swap()
    assert capture is not None
    assert capture.period_ns == 1_000_000
