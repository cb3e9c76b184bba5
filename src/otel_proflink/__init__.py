# SPDX-License-Identifier: Apache-2.0
"""otel-proflink: every profile sample knows its OpenTelemetry span."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_proflink._linker import Link as Link
    from otel_proflink._linker import current_link as current_link
    from otel_proflink.instrumentation import ProflinkInstrumentor as ProflinkInstrumentor
    from otel_proflink.profiler import Profiler as Profiler
    from otel_proflink.profiler import start as start
    from otel_proflink.profiler import stop as stop
    from otel_proflink.span_processor import ProflinkSpanProcessor as ProflinkSpanProcessor

__version__ = "0.1.0"

# Lazy (PEP 562): the context entry point imports this package while `opentelemetry.context` is
# half initialised, and must not pull in the SDK.
_EXPORTS = {
    "Link": "otel_proflink._linker",
    "ProflinkInstrumentor": "otel_proflink.instrumentation",
    "ProflinkSpanProcessor": "otel_proflink.span_processor",
    "Profiler": "otel_proflink.profiler",
    "current_link": "otel_proflink._linker",
    "start": "otel_proflink.profiler",
    "stop": "otel_proflink.profiler",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
