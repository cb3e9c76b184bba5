# SPDX-License-Identifier: Apache-2.0
"""What every profile must say truly: how much, of whom, on which line.

Held against what the kernel says of a thread's CPU clock, and what the interpreter itself says of
its frames.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator

import pytest

from otel_proflink import _sampler
from tests.support.ground_truth import needs_sampler
from tests.support.pprof_schema import DecodedSample, decode, samples

pytestmark = needs_sampler

ENGINES = ("sweep", "cpu_timer")
MAX_CPU_ERROR = 0.02
MAX_WALL_ERROR = 0.01

Frame = tuple[str, str, int]  # function, file, line


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    _sampler.stop()
    _sampler.swap()


def exported() -> list[DecodedSample]:
    capture = _sampler.swap()
    assert capture is not None
    return list(samples(decode(capture.encode_pprof(endpoints={}, thread_names={}))))


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


# --- How much ------------------------------------------------------------------------------------


def without_gil(seconds: float) -> None:
    block = bytes(1 << 20)
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(block).digest()
        zlib.compress(block[: 1 << 17])


def now_and_then(seconds: float) -> None:
    for _ in range(10):
        burn(seconds / 20)
        time.sleep(seconds / 20)


def deep(seconds: float, depth: int = 300) -> None:
    if depth:
        deep(seconds, depth - 1)
    else:
        burn(seconds)


WORK: tuple[Callable[[float], object], ...] = (
    burn,
    burn,
    without_gil,
    now_and_then,
    deep,
    time.sleep,
)


def cpu_ns(thread: threading.Thread) -> int:
    assert thread.ident is not None
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))


@pytest.mark.parametrize("swaps", [0, 6])
@pytest.mark.parametrize("rate", [100, 1000])
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_what_the_clocks_say(engine: str, rate: float, swaps: int) -> None:
    begin, leave = threading.Event(), threading.Event()
    ended = [threading.Event() for _ in WORK]

    def run(work: Callable[[float], object], done: threading.Event) -> None:
        begin.wait()
        work(0.6)
        done.set()
        leave.wait()

    threads = [threading.Thread(target=run, args=pair) for pair in zip(WORK, ended, strict=True)]
    for thread in threads:
        thread.start()
    # Clocks cannot be read at the very instants at which sampling begins and ends: on a busy
    # machine there is time between. So each is read on either side.
    wall_outside = time.perf_counter_ns()
    cpu_outside = {thread: cpu_ns(thread) for thread in threads}
    _sampler.start(rate, engine=engine)
    cpu_inside = {thread: cpu_ns(thread) for thread in threads}
    wall_inside = time.perf_counter_ns()
    begin.set()
    read = []
    for _ in range(swaps):
        time.sleep(0.1)
        read += exported()
    for event in ended:
        event.wait()
    wall_inside = time.perf_counter_ns() - wall_inside
    cpu_inside = {thread: cpu_ns(thread) - cpu_inside[thread] for thread in threads}
    _sampler.stop()
    cpu_outside = {thread: cpu_ns(thread) - cpu_outside[thread] for thread in threads}
    wall_outside = time.perf_counter_ns() - wall_outside
    leave.set()
    for thread in threads:
        thread.join()
    read += exported()

    ids = {thread.native_id: thread for thread in threads}
    mine = [sample for sample in read if sample.numbers.get("thread_id") in ids]
    wall = sum(sample.values["wall"] for sample in mine) / len(threads)
    assert wall_inside * (1 - MAX_WALL_ERROR) < wall < wall_outside * (1 + MAX_WALL_ERROR)
    cpu = sum(sample.values["cpu"] for sample in mine)
    least, most = sum(cpu_inside.values()), sum(cpu_outside.values())
    assert least * (1 - MAX_CPU_ERROR) < cpu < most * (1 + MAX_CPU_ERROR)
    for tid, thread in ids.items():
        if cpu_inside[thread] < 100_000_000:
            continue  # of the one that sleeps, a sample more or less is all there is
        own = sum(s.values["cpu"] for s in mine if s.numbers["thread_id"] == tid)
        assert own > cpu_inside[thread] * (1 - MAX_CPU_ERROR)
        assert own < cpu_outside[thread] * (1 + MAX_CPU_ERROR)


# --- Of whom, and where --------------------------------------------------------------------------

# Each runs `spin()` in the end, once. `spin` asks the interpreter for the names and lines of all
# that called it; every sample taken in it must say just that.
CASES = {
    "lambda": "work = lambda: spin()\nwork()",
    "lambda over lines": "work = (lambda:\n    (1,\n     spin(),\n     2))\nwork()",
    "expression over lines": (
        "def work():\n    return (\n        1\n        + spin()\n        + 2\n    )\nwork()"
    ),
    "arguments over lines": (
        "def work(*_, **__):\n    return spin()\nwork(\n    1,\n    2,\n    three=\n    3,\n)"
    ),
    "nested calls over lines": (
        "def same(x): return x\n"
        "def work():\n    return same(\n        same(\n            spin()\n        )\n    )\nwork()"
    ),
    "chain over lines": (
        "class A:\n    def a(self): return self\n    def b(self): return spin()\n"
        "(A()\n .a()\n .b())"
    ),
    "after many lines": "def work():\n" + "\n" * 700 + "    spin()\n" + "\n" * 90 + "work()",
    "much code before": "def work(x=0):\n" + "    x += 1; x -= 1\n" * 900 + "    spin()\nwork()",
    "backwards": "def work():\n    for _ in (\n        1,\n    ): spin(\n        )\nwork()",
    "decorated": (
        "def plain(f): return f\n@plain\n@plain\ndef work(\n    a=1,\n):\n    spin()\nwork()"
    ),
    "try and finally": (
        "def work():\n    try:\n        raise ValueError\n    except ValueError:\n        pass\n"
        "    finally:\n        spin()\nwork()"
    ),
    "with": (
        "class A:\n    def __enter__(self): spin()\n    def __exit__(self, *_): pass\n"
        "with A():\n    pass"
    ),
    "match": (
        "def work(x):\n    match x:\n        case [1, y] if spin() or y:\n"
        "            pass\nwork([1, 2])"
    ),
    "class body": "class A:\n    class B:\n        x = spin()",
    "method": "class A:\n    class B:\n        def work(self): spin()\nA.B().work()",
    "constructor": "class A:\n    def __init__(self):\n        spin()\nfor _ in range(1):\n    A()",
    "property": "class A:\n    @property\n    def x(self): return spin()\nA().x",
    "operator": "class A:\n    def __add__(self, other): return spin()\nA() + A()",
    "getattr": "class A:\n    def __getattr__(self, name): return spin()\nA().x",
    "closure": "def outer():\n    def inner():\n        spin()\n    inner()\nouter()",
    "list": "[spin() for _ in range(1)]",
    "nested lists": (
        "def work():\n    [\n     [spin()\n      for _ in [1]]\n     for _ in [1]]\nwork()"
    ),
    "dict": "{1: spin() for _ in range(1)}",
    "generator expression": "sum(spin() or 1\n    for _ in range(1))",
    "generator": "def work():\n    yield 1\n    spin()\nfor _ in work(): pass",
    "yield from": (
        "def inner():\n    yield 1\n    spin()\ndef outer():\n    yield from inner()\nlist(outer())"
    ),
    "send": "def work():\n    x = yield\n    spin()\n    yield\ng = work()\nnext(g)\ng.send(1)",
    "generator closed": (
        "def work():\n    try:\n        yield\n    finally:\n        spin()\n"
        "g = work()\nnext(g)\ng.close()"
    ),
    "coroutines": (
        "import asyncio\nasync def inner():\n    await asyncio.sleep(0)\n    spin()\n"
        "async def outer():\n    await inner()\nasyncio.run(outer())"
    ),
    "async generator": (
        "import asyncio\nasync def made():\n    yield 1\n    spin()\n"
        "async def work():\n    [x async for x in made()]\nasyncio.run(work())"
    ),
    "coroutine by hand": (
        "async def work():\n    spin()\nc = work()\ntry:\n    c.send(None)\n"
        "except StopIteration:\n    pass"
    ),
    "sorted": "def key(x):\n    return spin()\nsorted(\n    [1],\n    key=key,\n)",
    "map": "list(map(lambda _: spin(), [1]))",
    "reduce": "import functools\nfunctools.reduce(lambda a, b: spin(), [1, 2])",
    "partial": "import functools\nfunctools.partial(lambda a: spin(), 1)()",
    "cached": "import functools\n@functools.lru_cache\ndef work(x): return spin()\nwork(1)",
    "regular expression": "import re\nre.sub('a', lambda m: str(spin()), 'a')",
    "from C": "import ctypes\nctypes.CFUNCTYPE(None)(lambda: spin())()",
    "sorted in C": (
        "import ctypes\nmade = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)\n"
        "def compare(a, b):\n    if not done: done.append(spin())\n    return 0\ndone = []\n"
        "ctypes.CDLL(None).qsort(bytes(8), 2, 4, made(compare))"
    ),
    "C and back, twice": (
        "def inner(x):\n    return spin() or 0\n"
        "def outer(x):\n    return max(\n        [1],\n        key=inner)\nsorted([1], key=outer)"
    ),
    "finaliser": (
        "class A:\n    def __del__(self): spin()\ndef work():\n    a = A()\n    del a\nwork()"
    ),
    "weak reference": (
        "import weakref\nclass A: pass\na = A()\nr = weakref.ref(a, lambda _: spin())\ndel a"
    ),
    "collector": (
        "import gc\nclass A:\n    def __init__(self): self.me = self\n"
        "    def __del__(self): spin()\nA()\ngc.collect()"
    ),
    "exec in exec": "exec('\\n\\ndef work():\\n    spin()\\nwork()', {'spin': spin})",
    "deep": "def work(n):\n    if n: work(n - 1)\n    else: spin()\nwork(150)",
    "deep through C": "def work(n):\n    list(map(work, [n - 1])) if n else spin()\nwork(40)",
    "deep generators": (
        "def work(n):\n    if n: yield from work(n - 1)\n    else: yield spin()\nlist(work(60))"
    ),
    "one byte": "def zählt_ÿ(): spin()\nzählt_ÿ()",
    "two bytes": "def ключ_数え_한글(): spin()\nключ_数え_한글()",
    "four bytes": (
        "def \U00020000_\U0001d7ce\U000e0100(): spin()\n\U00020000_\U0001d7ce\U000e0100()"
    ),
    "class of two bytes": "class Ключ:\n    def é(self): spin()\nКлюч().é()",
    "long": f"def {'long_' * 200}(): spin()\n{'long_' * 200}()",
}
FILES = ("plain.py", "naïve_ÿ.py", "файл_文.py", "\U0001f40d.py", "<in brackets>", "/" + "d" * 999)


class Spin:
    """Burns CPU in a frame of its own, and knows who called it."""

    def __init__(self) -> None:
        self.callers: list[Frame] = []

    def spin(self) -> int:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            self.callers.append((code.co_qualname, code.co_filename, frame.f_lineno))
            frame = frame.f_back
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            pass
        return 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_names_and_lines_are_what_the_interpreter_says(case: str, engine: str) -> None:
    source = CASES[case]
    file = FILES[len(source) % len(FILES)]
    truth = Spin()
    code = compile(source, file, "exec")
    _sampler.start(1000, engine=engine)
    exec(code, {"spin": truth.spin, "__name__": "case"})
    _sampler.stop()
    assert any(frame[1] == file or frame[1] == "<string>" for frame in truth.callers)
    name = Spin.spin.__qualname__
    tid = threading.get_native_id()
    seen = [
        sample
        for sample in exported()
        if sample.numbers.get("thread_id") == tid and sample.functions[:1] == (name,)
    ]
    assert sum(sample.values["samples"] for sample in seen) > 4, "too few samples"
    for sample in seen:
        assert list(sample.stack[1:]) == truth.callers
