# SPDX-License-Identifier: Apache-2.0
"""`ProflinkSpanProcessor`: links spans as they start, keeps them for the capture as they end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import SpanProcessor

from . import lifecycle, runtime_context
from ._linker import SpanHooks, enrich_spans
from .profiler import Profiler, waits_for_first_span

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span

logger = logging.getLogger(__name__)


class ProflinkSpanProcessor(SpanHooks, SpanProcessor):
    """All that a manual user adds: ``provider.add_span_processor(ProflinkSpanProcessor())``.

    The constructor puts the context hook in place and starts the profiler. In a process that only
    supervises forked workers, profiling waits for the first span (``OTEL_PROFLINK_START``).

    It may be called from any thread, also from those of `ConcurrentMultiSpanProcessor`, and never
    raises. `on_start` (native, in `SpanHooks`) computes the span's link from that of its parent.

    Args:
        profiler: the one to use; default: one with the settings of the environment. One that runs
            already is flushed, not stopped, by `shutdown`.
    """

    def __init__(self, profiler: Profiler | None = None) -> None:
        super().__init__()
        self._profiler = profiler if profiler is not None else Profiler()
        # What this processor started, its shutdown stops.
        self._owns = not self._profiler.running
        try:
            self._begin()
        except Exception:
            logger.exception("otel-proflink could not start; the application goes on")

    def _begin(self) -> None:
        config = self._profiler.settings()
        if config is not None and not config.enabled:
            self._use("on_start", _ignore_start)
            return
        runtime_context.install()
        if config is not None:
            enrich_spans(config.span_attributes)
        if config is None:
            return  # a bad setting, logged: links are made, nothing is sampled
        # A subclass that does something of its own at span end calls `on_end` below.
        if type(self).on_end is ProflinkSpanProcessor.on_end:
            lifecycle.inbox.connect(self)
        if waits_for_first_span(config):
            if config.flush_on_sigterm:
                # Now, because only the main thread may; the first span can be anywhere.
                lifecycle.hook_sigterm()
            self._use("on_start", self._on_first_start)
        else:
            self._profiler.start()

    def _use(self, name: str, function: object) -> None:
        """Shadow a method by a function, for this one object."""
        self.__dict__[name] = function

    def _on_first_start(self, span: Span, parent_context: Context | None = None) -> None:
        """`on_start` until the first span: starts the profiler, then gets out of the way."""
        self.__dict__.pop("on_start", None)
        self._profiler.start()
        self.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        """Keep an ended span for the capture, and for the endpoint of its samples."""
        lifecycle.inbox.put(span)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Write what was sampled.

        Returns:
            False when that did not succeed within `timeout_millis` milliseconds.
        """
        return self._profiler.flush(timeout_millis / 1000)

    def shutdown(self) -> None:
        """Write what was sampled, and stop the profiler if this processor started it."""
        if self.__dict__.get("on_start") == self._on_first_start:
            del self.__dict__["on_start"]  # nothing is to start any more
        if self._owns:
            self._profiler.stop()
        else:
            self._profiler.flush()


def _ignore_start(span: Span, parent_context: Context | None = None) -> None:
    """`on_start` of a processor that is switched off."""
