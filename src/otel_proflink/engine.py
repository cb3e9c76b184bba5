# SPDX-License-Identifier: Apache-2.0
"""One run of the profiler: the native sampler, and the thread that exports what it saw.

Everything that touches a capture, the queue of spans or a file happens on the exporter thread;
others only send it requests and wait, for a bounded time. So a signal handler, an exit handler and
a processor's `force_flush` can ask for a flush at any moment, whatever locks their thread holds,
and a hung file system holds up nobody for longer than they agreed to.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any, Final

from . import _linker, server_exits
from .awaits import AwaitSampler
from .config import Config
from .endpoints import EndpointTable
from .exporters import Batch, Exporter, ExportError, create_exporter
from .native_thread import NativeThread, original
from .sampling import Capture, Sampler
from .span_inbox import SpanInbox
from .span_type import ENDPOINT_TYPES
from .thread_names import ThreadNames

if TYPE_CHECKING:
    from queue import SimpleQueue

    from .stats import ExportStats, RunStats, SamplerStats

logger = logging.getLogger(__name__)

THREAD_NAME: Final = "otel-proflink-exporter"

# Seconds between two looks at the tables' fill and at the span queue, when nothing presses.
_WAKE_S: Final = 1.0
# The sampler's tables have room for what one more wake may bring.
_FILL_LIMIT: Final = 0.75
# Spans are encoded while they are few enough to be cheap to hold, many enough to be worth waking.
_ENCODE_FROM: Final = 512
# Spans encoded before others get a turn at the GIL: some 0.3 ms.
_CHUNK: Final = 32
# Under a flood of spans, encoding may take this share of a core; what does not fit is counted.
_ENCODE_SHARE: Final = 0.05
_MIN_WAKE_S: Final = 0.05
# Encoded spans that may wait for the next flush.
_SPAN_BYTES_LIMIT: Final = 4 * 1024 * 1024
# Batches that wait for their destination to work again.
_PENDING_LIMIT: Final = 8
_PENDING_BYTES_LIMIT: Final = 16 * 1024 * 1024
_ANSWER_SLICE_S: Final = 0.2
# What stop() waits for the thread's own end, after its work is done.
_JOIN_S: Final = 1.0


def _new_queue() -> SimpleQueue[Any]:
    """A queue written in C: its `put` may run anywhere, a signal handler included."""
    queue: SimpleQueue[Any] = original("queue", "SimpleQueue")()
    return queue


@dataclass(frozen=True, slots=True)
class _Request:
    stop: bool = False
    #: gets whether everything reached its destination
    answer: SimpleQueue[bool] = field(default_factory=_new_queue)


@dataclass(frozen=True, slots=True)
class _Names:
    """What a capture's numbers stand for. Taken with the capture: they may be forgotten later."""

    threads: Mapping[int, str]
    spans: Mapping[int, str]
    tasks: Mapping[int, tuple[str, int]]

    def encode(self, capture: Capture, endpoints: Mapping[int, str]) -> bytes:
        return capture.encode_pprof(
            endpoints=endpoints,
            thread_names=self.threads,
            span_names=self.spans,
            tasks=self.tasks,
        )


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A capture already exported, with local roots whose endpoint was not known then."""

    sequence: int
    capture: Capture
    endpoints: dict[int, str]
    missing: set[int]
    names: _Names


class Engine:
    """Runs from `start` to `stop`, once, in the process that made it."""

    def __init__(self, config: Config, sampler: Sampler, inbox: SpanInbox) -> None:
        self.config = config
        self.pid = os.getpid()
        self._sampler = sampler
        self._inbox = inbox
        self._exporter: Exporter = create_exporter(config, start_unix_s=int(time.time()))
        self._endpoints = EndpointTable() if config.endpoint_collection else None
        self._thread_names = ThreadNames()
        self._awaits = AwaitSampler(config.await_rate_hz, sampler)
        self._requests: SimpleQueue[_Request] = _new_queue()
        self._thread: NativeThread | None = None
        self._sequence = 0
        self._encoded_spans: list[bytes] = []
        self._encoded_size = 0
        self._pending: deque[Batch] = deque()
        self._unfinished: _Unfinished | None = None
        self._failing = False
        self._swept = False  # although timers were asked for; said
        self._counters: ExportStats = {
            "exports_ok": 0,
            "exports_failed": 0,
            "exports_dropped": 0,
            "endpoint_fixups": 0,
            "exporter_errors": 0,
            "exporter_cpu_ns": 0,
            "spans_dropped": 0,
        }
        #: of the sampler, once it has stopped: it may start again, for another engine
        self._last: SamplerStats | None = None

    # -- what other threads call ------------------------------------------------------------------

    def start(self) -> None:
        """Start the sampler, then the exporter thread.

        Raises:
            Exception: the sampler's `SamplerError` when it refuses, or what starting a thread may
                raise; nothing runs then.
        """
        self._sampler.set_budget((self.config.max_overhead_percent or 0.0) / 100)
        self._sampler.set_max_frames(self.config.max_frames)
        self._sampler.start(self.config.sample_rate_hz, self._awaits.enabled, self.config.engine)
        self._thread_names.install()
        wants_endpoints = self._endpoints is not None and self._exporter.wants_profiles
        if self._exporter.wants_spans or wants_endpoints:
            self._inbox.open()
        thread = NativeThread(self._run, THREAD_NAME)
        try:
            # In an empty context: instrumentation that carries contexts into threads would
            # otherwise keep the starter's span current, and alive, in ours for ever.
            contextvars.Context().run(thread.start)
        except BaseException:
            # Limits, or the interpreter's end: no thread, and so no sampler either.
            self._end()
            raise
        self._thread = thread
        self._awaits.start()

    def flush(self, timeout_s: float) -> bool:
        """Export what there is.

        Returns:
            Whether all of it reached its destination within `timeout_s` seconds.
        """
        return self._ask(_Request(), timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Stop sampling and export what there is; the sampler is stopped in any case.

        Returns:
            Whether all of it reached its destination within `timeout_s` seconds.
        """
        succeeded = self._ask(_Request(stop=True), timeout_s)
        thread = self._thread
        if thread is not None and not thread.is_current():
            # After a timeout it may hang in a write for good; it is a daemon.
            thread.join(_JOIN_S if succeeded else 0.0)
        self._end()
        self._last = self._sampler.stats()
        self._counters["spans_dropped"] = self._inbox.dropped
        if logger.isEnabledFor(logging.DEBUG):
            figures = ", ".join(f"{key}={value}" for key, value in self.stats().items())
            logger.debug("otel-proflink has stopped sampling process %d: %s", self.pid, figures)
        return succeeded

    def _end(self) -> None:
        self._awaits.stop()
        self._sampler.stop()
        self._thread_names.uninstall()
        self._inbox.close()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's data without sending any of it."""
        self._thread_names.uninstall()
        self._inbox.forget()
        self._pending.clear()
        self._unfinished = None
        self._encoded_spans.clear()

    def stats(self) -> RunStats:
        """The sampler's counters and ours, of this run. Takes no lock."""
        if self._last is not None:
            return {**self._last, **self._counters, **self._exporter.stats()}
        return {
            **self._sampler.stats(),
            **self._counters,
            "spans_dropped": self._inbox.dropped,
            **self._exporter.stats(),
        }

    def memory_bytes(self) -> int:
        """Bytes of memory that sampling takes up now. Takes no lock, but some 50 us."""
        unfinished = self._unfinished
        waiting = 0 if unfinished is None else unfinished.capture.memory_bytes
        return self._sampler.memory_bytes() + waiting

    def _ask(self, request: _Request, timeout_s: float) -> bool:
        thread = self._thread
        if thread is None:
            return True
        if thread.is_current():
            # A finaliser or a log handler that runs on our own thread: it cannot wait for itself.
            return False
        self._requests.put(request)
        deadline = time.monotonic() + timeout_s
        while True:
            # In slices: the thread may have been about to end, and will answer nobody any more.
            alive = thread.is_alive()
            left = deadline - time.monotonic()
            try:
                return request.answer.get(timeout=max(0.0, min(_ANSWER_SLICE_S, left)))
            except Empty:
                if not alive or left <= 0:
                    return False

    # -- the exporter thread ----------------------------------------------------------------------

    def _run(self) -> None:
        interval = self.config.export_interval_ms / 1000
        native_id = threading.get_native_id()
        self._guarded(lambda: self._sampler.ignore_thread(native_id))
        self._guarded(self._prepare)
        next_flush = time.monotonic() + interval
        wake = _WAKE_S
        stopping = False
        while not stopping:
            requests = self._wait(min(wake, next_flush - time.monotonic()))
            stopping = any(request.stop for request in requests)
            wake = _WAKE_S
            succeeded = False
            if not stopping:
                self._awaits.start()
                server_exits.look()
                self._guarded(self._notice_engine)
            try:
                if requests or time.monotonic() >= next_flush or self._is_filling():
                    next_flush = time.monotonic() + interval
                    succeeded = self._flush(final=stopping)
                else:
                    wake = self._collect_some()
            except Exception:
                self._failed_inside()
            self._counters["exporter_cpu_ns"] = time.thread_time_ns()
            for request in requests:
                request.answer.put(succeeded)
        self._guarded(self._exporter.shutdown)
        # The places are few, and the kernel hands thread ids out again.
        self._guarded(lambda: self._sampler.unignore_thread(native_id))

    def _wait(self, timeout_s: float) -> list[_Request]:
        requests: list[_Request] = []
        try:
            requests.append(self._requests.get(timeout=max(0.0, timeout_s)))
            while True:
                requests.append(self._requests.get_nowait())
        except Empty:
            return requests

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception:
            self._failed_inside()

    def _notice_engine(self) -> None:
        """Say, once, that CPU is not sampled as was asked for."""
        if self.config.engine == "cpu_timer" and not self._swept:
            stats = self._sampler.stats()
            self._swept = not stats["cpu_timer"]
            if self._swept:
                why = "somebody else took SIGPROF" if stats["stood_back"] else "it could not start"
                logger.warning(
                    "otel-proflink samples with the engine sweep, not cpu_timer: %s", why
                )

    def _prepare(self) -> None:
        try:
            self._exporter.prepare()
        except ExportError as error:
            self._report_failure(error)

    def _is_filling(self) -> bool:
        return self._encoded_size > _SPAN_BYTES_LIMIT or self._sampler.fill() > _FILL_LIMIT

    def _collect_some(self) -> float:
        """Between two flushes: keep the queue short. Returns when to look again, in seconds."""
        waiting = len(self._inbox)
        if waiting < _ENCODE_FROM:
            return _WAKE_S
        before = time.thread_time()
        self._collect(polite=True)
        if waiting < self._inbox.limit // 2:
            return _WAKE_S
        spent = time.thread_time() - before
        return min(_WAKE_S, max(_MIN_WAKE_S, spent / _ENCODE_SHARE))

    def _collect(self, *, polite: bool) -> None:
        """Take the spans that wait: note endpoints, encode."""
        left = len(self._inbox)
        sleep = original("time", "sleep")
        while left > 0:
            spans = self._inbox.take(_CHUNK)
            left -= _CHUNK
            if self._endpoints is not None:
                for span in spans:
                    self._endpoints.record(span)
            if self._exporter.wants_spans:
                data = self._exporter.encode_spans(spans)
                self._encoded_spans.append(data)
                self._encoded_size += len(data)
            del spans
            if polite:
                sleep(0)

    def _flush(self, *, final: bool) -> bool:
        """Export everything. Returns whether nothing is left waiting."""
        if final:
            self._sampler.stop()
        capture = self._sampler.swap()
        self._collect(polite=False)
        self._finish_previous()
        self._queue_batch(capture)
        self._send()
        succeeded = not self._pending
        if final and self._pending:
            self._counters["exports_dropped"] += len(self._pending)
            self._pending.clear()
        if final:
            self._unfinished = None
        return succeeded

    def _queue_batch(self, capture: Capture | None) -> None:
        names = self._take_names()
        profile: bytes | None = None
        if capture is not None and capture.sample_count and self._exporter.wants_profiles:
            roots = capture.local_roots() if self._endpoints is not None else {}
            wanted = {root for root, span_type in roots.items() if span_type in ENDPOINT_TYPES}
            known = self._endpoints.find(wanted) if self._endpoints is not None else {}
            profile = names.encode(capture, known)
            missing = wanted.difference(known)
            if missing:
                self._unfinished = _Unfinished(self._sequence, capture, known, missing, names)
        spans = b"".join(self._encoded_spans) or None
        self._encoded_spans.clear()
        self._encoded_size = 0
        if profile is None and spans is None:
            return
        self._pending.append(Batch(sequence=self._sequence, profile=profile, spans=spans))
        self._sequence += 1
        while len(self._pending) > _PENDING_LIMIT or (
            len(self._pending) > 1
            and sum(batch.size for batch in self._pending) > _PENDING_BYTES_LIMIT
        ):
            self._pending.popleft()
            self._counters["exports_dropped"] += 1

    def _take_names(self) -> _Names:
        return _Names(
            threads=self._thread_names.take(),
            spans=_linker.span_names() if self.config.span_names else {},
            tasks=_linker.tasks(),
        )

    def _finish_previous(self) -> None:
        """Late fix-up: add endpoints that have become known to the capture before this one.

        One capture is kept, for one interval: its native memory is worth more than the endpoint of
        a request that runs for minutes.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None or self._endpoints is None:
            return
        found = self._endpoints.find(unfinished.missing)
        if not found:
            return
        profile = unfinished.names.encode(unfinished.capture, {**unfinished.endpoints, **found})
        for index, waiting in enumerate(self._pending):
            if waiting.sequence == unfinished.sequence:
                self._pending[index] = Batch(
                    sequence=waiting.sequence, profile=profile, spans=waiting.spans
                )
                return
        try:
            if self._exporter.replace_profile(Batch(sequence=unfinished.sequence, profile=profile)):
                self._counters["endpoint_fixups"] += 1
        except ExportError as error:
            # The older file still stands, only without these endpoints.
            self._report_failure(error)

    def _send(self) -> None:
        while self._pending:
            try:
                self._exporter.export(self._pending[0])
            except ExportError as error:
                self._counters["exports_failed"] += 1
                self._report_failure(error)
                return
            self._pending.popleft()
            self._counters["exports_ok"] += 1
            if self._failing:
                self._failing = False
                logger.info("otel-proflink exports again")

    def _report_failure(self, error: ExportError) -> None:
        """Once for each time that it stops working, not once for each export interval."""
        if not self._failing:
            self._failing = True
            logger.error(
                "otel-proflink %s; it tries again every %g s, keeps at most %d captures meanwhile, "
                "and the application goes on",
                error,
                self.config.export_interval_ms / 1000,
                _PENDING_LIMIT,
            )

    def _failed_inside(self) -> None:
        """A mistake of ours: worth a trace, once; never worth the application."""
        self._counters["exporter_errors"] += 1
        level = logging.ERROR if self._counters["exporter_errors"] == 1 else logging.DEBUG
        logger.log(level, "otel-proflink failed to export; it goes on", exc_info=True)
