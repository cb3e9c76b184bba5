# SPDX-License-Identifier: Apache-2.0
"""What a workload knows of itself: a function of its own, a span and a CPU time for each unit.

Runs in the processes that are measured, also beside other profilers: API and standard library only.
"""

from __future__ import annotations

import itertools
import json
import linecache
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry.trace import Span

#: How generated functions are called; no other function is called so.
PREFIX = "unit_"


class Unit:
    """Work under one span, or under none: a generated function, and the CPU that it has burnt.

    Attributes:
        name: of the function, unique in its process.
        span_id: 0 for work that belongs to no span.
        root_id: the local root's.
        cpu_ns: thread CPU time burnt so far.
    """

    def __init__(self, name: str, span_id: int, root_id: int) -> None:
        self.name = name
        self.span_id = span_id
        self.root_id = root_id
        self.cpu_ns = 0
        self._function = _function(name)

    def __call__(self, seconds: float) -> None:
        """Stay in the generated function for so many seconds of the thread's CPU time."""
        began = time.thread_time_ns()
        self._function(seconds)
        self.cpu_ns += time.thread_time_ns() - began


def _function(name: str) -> Callable[[float], None]:
    source = (
        f"def {name}(seconds):\n"
        "    end = clock() + seconds\n"
        "    x = 1\n"
        "    while clock() < end:\n"
        "        for i in range(200):\n"
        "            x = (x * 33 + i) % 65521\n"
    )
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict[str, Any] = {"clock": time.thread_time}
    exec(compile(source, filename, "exec"), scope)
    function: Callable[[float], None] = scope[name]
    return function


class Truth:
    """All units of a process; any thread may add to them."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._numbers = itertools.count()

    def unit(self, span: Span | None = None, root: Span | None = None) -> Unit:
        """A new unit; `root` is the local root of `span`, itself if there is no other."""
        own = 0 if span is None else span.get_span_context().span_id
        top = own if root is None else root.get_span_context().span_id
        made = Unit(f"{PREFIX}{next(self._numbers):06d}", own, top)
        self.units.append(made)
        return made

    def write(self, file: Path) -> None:
        """As JSON, for `benchmarks.accuracy_score`."""
        units = [[unit.name, unit.span_id, unit.root_id, unit.cpu_ns] for unit in self.units]
        file.write_text(json.dumps({"units": units, "pid": os.getpid()}), encoding="utf-8")
