# SPDX-License-Identifier: Apache-2.0
"""The native sampler by itself: what it sees of a thread, and how it comes and goes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from otel_proflink import Profiler, _sampler
from otel_proflink.config import Config
from tests.support import pprof_schema


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


def sampled(work: Callable[[], object], rate: float = 1000) -> object:
    _sampler.start(rate)
    work()
    _sampler.stop()
    capture = _sampler.swap()
    assert capture is not None
    return pprof_schema.decode(capture.encode_pprof(endpoints={}, thread_names={}))


def stacks(profile: object) -> list[tuple[list[tuple[str, int]], tuple[int, ...]]]:
    table = list(profile.string_table)  # type: ignore[attr-defined]
    functions = {f.id: table[f.name] for f in profile.function}  # type: ignore[attr-defined]
    places = {
        place.id: (functions[place.line[0].function_id], place.line[0].line)
        for place in profile.location  # type: ignore[attr-defined]
    }
    return [
        ([places[i] for i in sample.location_id], tuple(sample.value))
        for sample in profile.sample  # type: ignore[attr-defined]
    ]


def test_self_observation_matches_the_interpreter() -> None:
    frames, serial = _sampler.observe()
    frame = sys._getframe()
    assert frames[0][0] == frame.f_code.co_qualname
    assert len(frames) > 5
    assert serial == 0


def test_cpu_and_wall_add_up() -> None:
    before = time.thread_time()
    began = time.perf_counter()
    profile = sampled(lambda: (burn(0.3), time.sleep(0.2), burn(0.2)), rate=500)
    cpu = time.thread_time() - before
    wall = time.perf_counter() - began
    mine = [v for s, v in stacks(profile) if any(n.endswith("sampled") for n, _ in s)]
    assert sum(v[1] for v in mine) / 1e9 == pytest.approx(cpu, rel=0.1)
    assert sum(v[2] for v in mine) / 1e9 == pytest.approx(wall, rel=0.1)


def test_sleep_is_blocked_and_burns_nothing() -> None:
    profile = sampled(lambda: time.sleep(0.3))
    table = list(profile.string_table)  # type: ignore[attr-defined]
    for sample in profile.sample:  # type: ignore[attr-defined]
        labels = {table[label.key]: table[label.str] for label in sample.label}
        if labels["thread_state"] == "blocked":
            assert sample.value[1] == 0


def test_deep_recursion_keeps_both_ends() -> None:
    def root_of_it(depth: int) -> None:
        def down(left: int) -> None:
            if left:
                down(left - 1)
            else:
                leaf_of_it()

        def leaf_of_it() -> None:
            burn(0.2)

        down(depth)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    try:
        profile = sampled(lambda: root_of_it(2000))
    finally:
        sys.setrecursionlimit(limit)
    deep = [s for s, _ in stacks(profile) if any("leaf_of_it" in n for n, _ in s)]
    assert deep
    for stack in deep:
        names = [name for name, _ in stack]
        omitted = [name for name in names if "frames omitted" in name]
        assert len(omitted) == 1
        assert len(names) == 1025
        count = int(omitted[0].split()[0].strip("["))
        assert 2000 < count + 1024 < 2200
        assert any("root_of_it" in name for name in names), "the root end is kept"


@contextlib.contextmanager
def no_code_watcher_left() -> Iterator[None]:
    """Others have taken all of the interpreter's code watchers."""
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(lambda *_: 0)
    taken = []
    with contextlib.suppress(RuntimeError):
        while True:
            taken.append(ctypes.pythonapi.PyCode_AddWatcher(callback))
    try:
        assert taken
        yield
    finally:
        for number in taken:
            ctypes.pythonapi.PyCode_ClearWatcher(number)


@pytest.mark.parametrize("watcher", [True, False], ids=["watcher", "destructor"])
def test_names_of_code_made_and_freed_at_once(watcher: bool) -> None:
    if watcher and sys.version_info < (3, 12):
        pytest.skip("code watchers are new in 3.12")
    ran = set()

    def work() -> None:
        end = time.perf_counter() + 1.5
        i = 0
        while time.perf_counter() < end:
            i += 1
            padding = "\n" * (i % 7)
            source = f"def outer_{i}(stop):\n{padding}    made_{i}(stop)\n"
            source += f"def made_{i}(stop):\n{padding}    while clock() < stop: pass\n"
            names: dict[str, object] = {"clock": time.perf_counter}
            exec(compile(source, f"file_{i}.py", "exec"), names)
            ran.add(str(i))
            names[f"outer_{i}"](time.perf_counter() + 0.0005)  # type: ignore[operator]

    taken = contextlib.nullcontext() if watcher else no_code_watcher_left()
    if sys.version_info < (3, 12):
        taken = contextlib.nullcontext()
    with taken:
        profile = sampled(work, rate=4000)
    table = list(profile.string_table)  # type: ignore[attr-defined]
    files = {table[f.name]: table[f.filename] for f in profile.function}  # type: ignore[attr-defined]
    seen = set()
    for frames, _ in stacks(profile):
        made = [(name, line) for name, line in frames if name.startswith(("made_", "outer_"))]
        numbers = {name.split("_")[1] for name, _ in made}
        assert len(numbers) <= 1, made
        for number in numbers:
            assert number in ran
            seen.add(number)
            padding = int(number) % 7
            last = {f"outer_{number}": 2 + padding, f"made_{number}": 4 + 2 * padding}
            for name, line in made:
                assert files[name] == f"file_{number}.py"
                assert line in (last[name], last[name] - 1 - padding), made
    assert len(seen) > 200, f"too few samples: of {len(seen)} functions"


def test_non_ascii_names_and_executing_lines() -> None:
    source = "def zählt_数え_𝛼𝛽(burn):\n    x = 1\n    burn(0.2)\n    return x\n"
    names: dict[str, Callable[..., object]] = {}
    exec(compile(source, "naïve_文.py", "exec"), names)
    function = next(value for key, value in names.items() if key.startswith("z"))
    profile = sampled(lambda: function(burn))
    found = [
        place for stack, _ in stacks(profile) for place in stack if place[0] == function.__name__
    ]
    assert found
    assert {line for _, line in found} == {3}


def test_threads_made_by_hand_are_sampled() -> None:
    import _thread

    done = threading.Event()

    def by_hand() -> None:
        burn(0.2)
        done.set()

    def work() -> None:
        _thread.start_new_thread(by_hand, ())
        done.wait()

    names = {n for s, _ in stacks(sampled(work)) for n, _ in s}
    assert any("by_hand" in name for name in names)


def test_short_threads_in_a_storm() -> None:
    def work() -> None:
        for _ in range(60):
            threads = [threading.Thread(target=burn, args=(0.001,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    profile = sampled(work, rate=4000)
    total = sum(v[1] for _, v in stacks(profile)) / 1e9
    assert 0.3 < total < 3


def test_start_stop_loops() -> None:
    for _ in range(60):
        _sampler.start(5000)
        burn(0.001)
        _sampler.stop()
        _sampler.stop()
        assert _sampler.swap() is not None
    assert not _sampler.running()


def test_starting_often_keeps_our_own_thread_out(tmp_path: object) -> None:
    config = Config(output_dir=str(tmp_path), exporter="none", export_interval_ms=100)
    for _ in range(40):
        with Profiler(config):
            pass
    profile = sampled(lambda: burn(0.05))
    ran = {n for s, _ in stacks(profile) for n, _ in s}
    assert not any("Engine" in name for name in ran)


def test_swaps_while_sampling_lose_nothing() -> None:
    _sampler.start(2000)
    total = 0
    began = time.thread_time()
    for _ in range(20):
        burn(0.02)
        capture = _sampler.swap()
        assert capture is not None
        profile = pprof_schema.decode(capture.encode_pprof(endpoints={}, thread_names={}))
        total += sum(v[1] for s, v in stacks(profile) if any(n == "burn" for n, _ in s))
    _sampler.stop()
    spent = time.thread_time() - began
    assert total / 1e9 == pytest.approx(spent, rel=0.2)


def test_ignored_threads_are_left_out() -> None:
    def unseen(ready: threading.Event) -> None:
        _sampler.ignore_thread(threading.get_native_id())
        ready.set()
        burn(0.2)
        _sampler.unignore_thread(threading.get_native_id())

    ready = threading.Event()
    thread = threading.Thread(target=unseen, args=(ready,))

    thread.start()
    ready.wait()
    names = {n for s, _ in stacks(sampled(thread.join)) for n, _ in s}
    assert not any("unseen" in name for name in names)
