# SPDX-License-Identifier: Apache-2.0
"""A tracer provider and our span processor: one of ours on each is enough."""

from __future__ import annotations

from otel_proflink.profiler import Profiler
from otel_proflink.span_processor import ProflinkSpanProcessor


def add_processor(provider: object, profiler: Profiler) -> bool:
    """Add a `ProflinkSpanProcessor` to `provider`, unless it has one or takes none.

    Returns:
        Whether it was added; it then starts `profiler`, now or when it should.
    """
    add = getattr(provider, "add_span_processor", None)
    if add is None or _has_processor(provider):
        return False
    add(ProflinkSpanProcessor(profiler))
    return True


def _has_processor(provider: object) -> bool:
    # Private, so only looked for: a second processor of ours would do no more than cost time.
    multi = getattr(provider, "_active_span_processor", None)
    processors = getattr(multi, "_span_processors", ())
    return any(isinstance(processor, ProflinkSpanProcessor) for processor in processors)
