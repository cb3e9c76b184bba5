# SPDX-License-Identifier: Apache-2.0
"""`ProflinkInstrumentor`: all of it switched on, by `opentelemetry-instrument` or by one call."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]

from otel_proflink import runtime_context
from otel_proflink.instrumentation import modules
from otel_proflink.instrumentation.provider import add_processor
from otel_proflink.profiler import Profiler

logger = logging.getLogger(__name__)


class ProflinkInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Links OpenTelemetry's context to the profiler, and profiles.

    `instrument(tracer_provider=...)` puts the context hook in place, adds a
    `ProflinkSpanProcessor` to the provider (default: the global one), makes threads, processes and
    the tasks of pools run under their submitter's context, and starts the profiler with the
    environment's settings. With `OTEL_PROFLINK_ENABLED=false` or `OTEL_SDK_DISABLED=true` it does
    nothing at all. A provider that takes no processors (none is configured) is no obstacle: spans
    of any origin are linked when they are attached.

    `uninstrument()` undoes it. A provider cannot be rid of a processor: ours stays, and does
    nothing that can be seen, until `instrument()` makes use of it again.

    Neither of them raises, whatever happens: an exception would end all auto-instrumentation.
    """

    # One for life: the processor that stays behind is its processor at the next `instrument`, too.
    _profiler: Final = Profiler()
    _put_hook = False

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return nothing: what is instrumented is the standard library."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        try:
            self._switch_on(kwargs.get("tracer_provider"))
        except Exception:
            logger.exception("otel-proflink could not be switched on; the application goes on")

    def _switch_on(self, provider: object) -> None:
        # None: a bad setting, which is logged. Linking needs no settings.
        config = self._profiler.settings()
        if config is not None and not config.enabled:
            return
        hook = runtime_context.installed()
        self._put_hook = hook is None or not hook.linking
        runtime_context.install()
        modules.instrument()
        if provider is None:
            provider = trace.get_tracer_provider()
        if not add_processor(provider, self._profiler):
            self._profiler.start()

    def _uninstrument(self, **kwargs: Any) -> None:
        try:
            modules.uninstrument()
            self._profiler.stop()
            if self._put_hook:
                runtime_context.uninstall()
        except Exception:
            logger.exception("otel-proflink could not be switched off; the application goes on")
