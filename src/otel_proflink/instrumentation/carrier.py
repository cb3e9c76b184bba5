# SPDX-License-Identifier: Apache-2.0
"""What travels to another process: context, link and settings, as plain data.

The context goes as the headers that the configured propagator writes
(https://opentelemetry.io/docs/specs/otel/context/api-propagators/), as if the work were a request.
The propagation record goes beside them, because that propagator may not carry baggage; so do the
ids of the span, because a child that has not run the parent's set-up may read other headers. With
a propagator that writes nothing, context does not leave the process, and no label does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any, TypedDict

from opentelemetry import propagate
from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)

from otel_proflink import lifecycle
from otel_proflink._linker import link_for_context
from otel_proflink.instrumentation import arrival, propagation

logger = logging.getLogger(__name__)


class Carrier(TypedDict):
    """A dict of plain values, so that it can be read back before anything of ours is imported."""

    #: of the process that made it
    pid: int
    headers: dict[str, str]
    #: trace id, span id, trace flags
    ids: tuple[int, int, int] | None
    record: dict[str, object]
    #: of `Config`, if a profiler runs in the process that made it
    settings: dict[str, Any] | None


class CarriedCall:
    """A function on its way to another process, where it arrives under its sender's context.

    It arrives as a native callable, so that it adds no frame to any stack there. Where it does not
    leave this process after all, it is just the function.
    """

    __slots__ = ("carrier", "function")

    def __init__(self, function: Callable[..., Any], carrier: Carrier) -> None:
        self.function = function
        self.carrier = carrier

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return arrival.receive_call, (self.function, self.carrier)


def carried(function: Any) -> Any:
    """Return `function` as it is to be sent under the current context. Never raises."""
    if type(function) is CarriedCall:  # from a wrapper of ours further out
        return function
    try:
        carrier = pack(get_current())
        if carrier is not None and carrier["headers"]:
            return CarriedCall(function, carrier)
    except Exception:  # the work matters more than its label
        logger.debug("work leaves this process without its context", exc_info=True)
    return function


def pack(context: Context) -> Carrier | None:
    """Return what is to travel with work done under `context`, None if there is nothing."""
    headers: dict[str, str] = {}
    if context:
        propagate.inject(headers, context)
    link = link_for_context(context) if headers else None
    engine = lifecycle.engine()
    if not headers and engine is None:
        return None
    carrier: Carrier = {
        "pid": os.getpid(),
        "headers": headers,
        "ids": None,
        "record": {},
        "settings": None if engine is None else dataclasses.asdict(engine.config),
    }
    if link is not None:
        carrier["ids"] = link.trace_id, link.span_id, link.trace_flags
        # Of a span that is remote here already no local root is known: it is for the child to say.
        if not link.is_remote:
            carrier["record"] = propagation.entries_of(link)
    return carrier


def unpack(carrier: Carrier) -> Context:
    """Return the context that travelled, with the propagation record in its baggage."""
    context = propagate.extract(carrier["headers"], Context())
    if carrier["ids"] is not None:
        trace_id, span_id, flags = carrier["ids"]
        found = get_current_span(context).get_span_context()
        if (found.trace_id, found.span_id) != (trace_id, span_id):
            own = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
            context = set_span_in_context(NonRecordingSpan(own), context)
    return propagation.with_record(context, carrier["record"])
