# SPDX-License-Identifier: Apache-2.0
"""What `instructions` counts: each case a warm-up, then its sections between two marks.

A mark is a call of `getpgrp`, at which callgrind writes down what was counted since the last one;
nobody else calls it. Nothing here runs beside the main thread while a section is counted.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Tracer, set_span_in_context

from otel_proflink import ProflinkSpanProcessor, _sampler, lifecycle, runtime_context
from otel_proflink.config import Config
from otel_proflink.profiler import Profiler

REPETITIONS = 200
WARM_UP = 100
MARK = "getpgrp"
TRY_AGAIN = 75  # EX_TEMPFAIL
SPAN_ON, SPAN_OFF = "span start + end", "span start + end without us"

#: name of the case, repetitions in the section
_sections: list[tuple[str, int]] = []
mark = os.getpgrp


def count(name: str, run: Callable[[int], object], repetitions: int = REPETITIONS) -> None:
    """Count N and 2 N repetitions: their difference is N, without what surrounds them."""
    run(WARM_UP)
    for times in (repetitions, 2 * repetitions):
        mark()
        run(times)
        mark()
        _sections.append((name, times))


def attach_detach(context: Context) -> Callable[[int], None]:
    """As OpenTelemetry's API does it."""

    def run(times: int) -> None:
        for _ in repeat(None, times):
            detach(attach(context))

    return run


def spans(tracer: Tracer) -> Callable[[int], None]:
    """Spans that are made current, under a local parent."""

    def run(times: int) -> None:
        for _ in repeat(None, times):
            with tracer.start_as_current_span("work"):
                pass

    return run


def tracer_of(*processors: SpanProcessor) -> Tracer:
    """A tracer of a provider with these processors."""
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider.get_tracer("instructions")


class Workers:
    """Threads that sleep ten frames deep under a span, and burn a little when told to."""

    def __init__(self, number: int, tracer: Tracer) -> None:
        self._go = [threading.Semaphore(0) for _ in range(number)]
        self._done = threading.Semaphore(0)
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(go, tracer), daemon=True) for go in self._go
        ]
        for thread in self._threads:
            thread.start()
            self._done.acquire()

    def _work(self, go: threading.Semaphore, tracer: Tracer) -> None:
        with tracer.start_as_current_span("root"), tracer.start_as_current_span("work"):
            self._deep(5, go)

    def _deep(self, left: int, go: threading.Semaphore) -> None:
        if left:
            self._deep(left - 1, go)
            return
        while not self._stopping:
            self._done.release()
            go.acquire()
            sum(range(2000))

    def settle(self) -> None:
        """Wait until every thread sleeps, and its CPU clock with it."""
        for thread in self._threads:
            path = Path(f"/proc/self/task/{thread.native_id}/syscall")
            while path.read_text().startswith("running"):
                time.sleep(0.001)
        time.sleep(0.02)

    def move(self) -> None:
        """Let each of them burn."""
        for go in self._go:
            go.release()
            self._done.acquire()
        self.settle()

    def stop(self) -> None:
        """End them."""
        self._stopping = True
        for go in self._go:
            go.release()
        for thread in self._threads:
            thread.join()


def ticks(name: str, number: int, tracer: Tracer, *, burning: bool) -> None:
    """One tick over threads that have all run since the last one, or over none that has."""
    workers = Workers(number, tracer)
    workers.settle()
    _sampler.start(0.001)  # its own thread sleeps all along
    for _ in range(3):
        if burning:
            workers.move()
        _sampler.tick()
    # A tick happens once, so nothing is counted twice as often: an empty section is taken off.
    mark()
    mark()
    _sections.append((name, 0))
    before = _sampler.stats()
    for _ in range(3):
        if burning:
            workers.move()
        mark()
        _sampler.tick()
        mark()
        _sections.append((name, 1))
    stats = {key: value - before[key] for key, value in _sampler.stats().items()}
    read = 3 * number if burning else 0
    if stats["retries"] or stats["snapshots"] != read or stats["threads"]:
        print(f"{name}: not what was to be counted: {stats}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    _sampler.stop()
    _sampler.swap()
    workers.stop()


def main() -> None:
    """Run all cases; the sections go to the file in the first argument."""
    random.seed(0)
    sys.setswitchinterval(1000)
    runtime_context.install()
    # The profiler itself stays off, and does not start with the first span either: its threads
    # would share the main one's GIL.
    processor = ProflinkSpanProcessor(Profiler(Config(start="first_span")))
    del vars(processor)["on_start"]
    ours = tracer_of(processor)
    lifecycle.inbox.open()
    gc.disable()
    context = set_span_in_context(ours.start_span("work"), Context())
    count("attach + detach", attach_detach(context))
    with ours.start_as_current_span("parent"):
        count(SPAN_ON, spans(ours))
        count(SPAN_OFF, spans(tracer_of()))
    lifecycle.inbox.close()
    _sampler.self_test()
    _sampler.ignore_thread(threading.get_native_id())
    ticks("tick, 1 thread that has run", 1, ours, burning=True)
    ticks("tick, 50 threads that have run", 50, ours, burning=True)
    ticks("tick, 50 idle threads", 50, ours, burning=False)
    Path(sys.argv[1]).write_text(json.dumps(_sections), encoding="utf-8")


if __name__ == "__main__":
    main()
