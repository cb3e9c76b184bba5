# SPDX-License-Identifier: Apache-2.0
"""What the handlers of all these apps do: burn CPU in functions made for one request, and tell.

An app has no business with the package under test: what it says of a unit comes from the
OpenTelemetry API alone. The unit's name comes with the request, so it is unique in the whole test.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opentelemetry import trace

SECONDS = 0.05
SLICES = 5

tracer = trace.get_tracer("app")
_pools: dict[int, ThreadPoolExecutor] = {}
_settled: set[int] = set()


def pool() -> ThreadPoolExecutor:
    """A pool that lives as long as its process does: the one of a parent has no threads here."""
    return _pools.setdefault(os.getpid(), ThreadPoolExecutor(2))


def make(name: str) -> Callable[[float], int]:
    """A function of this name that stays in its frame for so much CPU time of its thread."""
    source = (
        f"def {name}(seconds):\n"
        "    end = clock() + seconds\n"
        "    x = 1\n"
        "    while clock() < end:\n"
        "        for i in range(200):\n"
        "            x = (x * 33 + i) % 65521\n"
        "    return x\n"
    )
    scope: dict[str, Any] = {"clock": time.thread_time}
    exec(compile(source, f"<generated {name}>", "exec"), scope)
    made: Callable[[float], int] = scope[name]
    return made


def _settle() -> None:
    """In a process whose sampler the first span has just started: on a busy machine it needs some
    time to come up."""
    if os.getpid() not in _settled:
        time.sleep(0.1)
        _settled.add(os.getpid())


class Work:
    """The work of one request, made where the server's span is the current one."""

    def __init__(self, name: str) -> None:
        _settle()
        self.name = name
        self.root = trace.get_current_span().get_span_context()
        self.truth: dict[str, list[int]] = {}

    def unit(self, what: str, seconds: float = SECONDS) -> Callable[[], int]:
        """A callable to be run under the span that is current now, here or elsewhere."""
        name = f"{self.name}_{what}"
        span = trace.get_current_span().get_span_context()
        self.truth[name] = [span.trace_id, span.span_id, self.root.span_id]
        function = make(name)
        # The generated frame is the one that is called: no lambda around it.
        function.__defaults__ = (seconds,)  # type: ignore[attr-defined]
        return function  # type: ignore[return-value]

    def told(self) -> dict[str, Any]:
        """What the test is to know."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "trace_id": self.root.trace_id,
            "root": self.root.span_id,
            "truth": self.truth,
        }

    def after_the_response(self, what: str) -> None:
        """Run a unit, and leave in a file what the response could not tell any more."""
        self.truth = {}
        self.unit(what)()
        path = Path(f"told-{self.name}-{what}.json")
        path.with_suffix(".tmp").write_text(json.dumps(self.told()), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)


def synchronous(name: str) -> dict[str, Any]:
    """A handler's work without `await`: under the request's span, a child's, and in a pool."""
    work = Work(name)
    plain = work.unit("plain", SECONDS / SLICES)
    for _ in range(SLICES):
        plain()
        time.sleep(0)  # under gevent: others run in between, under spans of theirs
    with tracer.start_as_current_span(f"child of {name}"):
        work.unit("child")()
        in_pool = pool().submit(work.unit("pooled"))
        in_pool.result()
    work.unit("after")()
    return work.told()
