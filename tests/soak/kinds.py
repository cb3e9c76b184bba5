# SPDX-License-Identifier: Apache-2.0
"""What the soak does: one function a kind of work, called again and again by a thread of its own.

A rule that the judge relies on: wherever a function of this package calls another one, or has it
called, the line that is executing names it.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import re
import threading
import traceback
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tests.soak.units import Units, call_unit

Step = Callable[[Units], None]

DEPTH = 800
BLOCK = bytes(range(256)) * 4096  # 1 MiB: enough for zlib and hashlib to release the GIL
WORD = re.compile(r"\w+")
C_COMPARE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)
)
LIBC = ctypes.CDLL(None)


def exec_churn(units: Units) -> None:
    for _ in range(20):
        units.run_unit()


def thread_churn(units: Units) -> None:
    threads = [threading.Thread(target=units.run_unit, args=(0.001,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    done = threading.Event()
    _thread.start_new_thread(bare_thread, (units, done))
    for thread in threads:
        thread.join()
    done.wait(60)


def bare_thread(units: Units, done: threading.Event) -> None:
    units.run_unit()
    done.set()


def deep_recursion(units: Units) -> None:
    recurse(DEPTH, units)


def recurse(left: int, units: Units) -> None:
    if left:
        recurse(left - 1, units)
    else:
        for _ in range(5):
            units.run_unit()


def generators(units: Units) -> None:
    for _ in generate(units, 12):
        units.run_unit(0.0001)
    [units.run_unit(0.0001) for _ in range(2)]
    {number: halve(number) for number in range(100)}
    sum(halve(number) for number in range(200))


def generate(units: Units, depth: int) -> Iterator[int]:
    if depth:
        yield depth
        yield from generate(units, depth - 1)
    else:
        units.run_unit(0.0001)


def halve(number: int) -> int:
    return number >> 1


def callbacks(units: Units) -> None:
    sorted(range(300), key=sort_key)
    WORD.sub(replace_word, "some words of a longer text " * 20)
    numbers = (ctypes.c_int * 100)(*range(100, 0, -1))
    compare_in_c = C_COMPARE(compare)
    LIBC.qsort(numbers, len(numbers), ctypes.sizeof(ctypes.c_int), compare_in_c)
    functools.reduce(lambda a, b: halve(a + b), range(200))


def sort_key(number: int) -> int:
    return -number


def replace_word(match: re.Match[str]) -> str:
    return match[0].upper()


def compare(a: ctypes._Pointer[ctypes.c_int], b: ctypes._Pointer[ctypes.c_int]) -> int:
    return int(a[0]) - int(b[0])


def exceptions(units: Units) -> None:
    for _ in range(10):
        try:
            fall(20, units)
        except ValueError as error:
            traceback.format_exception(error)


def fall(left: int, units: Units) -> None:
    try:
        if left == 0:
            units.run_unit(0.0001)
            raise ValueError("landed")
        fall(left - 1, units)
    except ValueError:
        if left % 5 == 0:
            raise ValueError(f"passed {left}") from None
        raise
    finally:
        halve(left)


class Node:
    """Part of a cycle, with something to do when it is found."""

    def __init__(self) -> None:
        self.other = self

    def __del__(self) -> None:
        halve(len(self.__dict__))


def garbage(units: Units) -> None:
    for _ in range(200):
        Node()
    units.run_unit()
    # From 3.14 on a partial collection may leave more behind than was made.
    gc.collect(2 if units.made % 16 == 0 else 1)


def tasks(units: Units) -> None:
    asyncio.run(many_tasks(units))


async def many_tasks(units: Units) -> None:
    running = [asyncio.create_task(one_task(units)) for _ in range(20)]
    cancelled = asyncio.create_task(asyncio.sleep(3600))
    await asyncio.gather(*running)
    cancelled.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await cancelled


async def one_task(units: Units) -> None:
    number, outer = units.make()
    with units.spans(number):
        async for _ in ticks(3):
            await nested(4, outer)


async def nested(left: int, outer: Callable[[float], None]) -> None:
    if left:
        await nested(left - 1, outer)
    else:
        call_unit(outer)
        await asyncio.sleep(0.001)
        call_unit(outer)


async def ticks(count: int) -> AsyncIterator[int]:
    for tick in range(count):
        yield tick
        await asyncio.sleep(0)


def pool(units: Units) -> None:
    with ThreadPoolExecutor(3) as executor:
        waiting = []
        for _ in range(12):
            number, outer = units.make()
            with units.spans(number):
                waiting.append(executor.submit(call_unit, outer))
        for future in waiting:
            future.result(60)


def without_gil(units: Units) -> None:
    hashlib.sha256(BLOCK).digest()
    zlib.decompress(zlib.compress(BLOCK[: 1 << 18], 1))
    units.run_unit()


def greenlets(units: Units) -> None:
    import greenlet

    hub = greenlet.getcurrent()
    running = [greenlet.greenlet(greenlet_main) for _ in range(8)]
    for one in running:
        one.switch(units, hub)
    while running:
        for one in running:
            one.switch()
        running = [one for one in running if not one.dead]


def greenlet_main(units: Units, hub: object) -> None:
    for _ in range(3):
        number, outer = units.make()
        with units.spans(number):
            call_unit(outer)
            hub.switch()  # type: ignore[attr-defined]
            call_unit(outer)


def arrays(units: Units) -> None:
    import numpy

    square = numpy.arange(40_000, dtype=float).reshape(200, 200)
    for _ in range(5):
        square = square @ square.T
        square /= square.max()
    units.run_unit()


# What needs a package that may not be there.
_OPTIONAL: dict[str, Step] = {"greenlet": greenlets, "numpy": arrays}


def all_kinds() -> tuple[dict[str, Step], list[str]]:
    """The kinds of work by name, and the packages that are missing for more."""
    steps: list[Step] = [
        exec_churn,
        thread_churn,
        deep_recursion,
        generators,
        callbacks,
        exceptions,
        garbage,
        tasks,
        pool,
        without_gil,
    ]
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    steps += [step for name, step in _OPTIONAL.items() if name not in missing]
    return {step.__name__: step for step in steps}, missing
