# SPDX-License-Identifier: Apache-2.0
"""The other end of a carrier: a child process that may never have heard of us.

What is sent to a child refers to functions of this module only. It is imported there, early, by
`pickle`; so it imports nothing but the standard library until it is called, and whatever is wrong
with this package in the child costs the label and not the work.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otel_proflink.instrumentation.carrier import Carrier

logger = logging.getLogger(__name__)

#: whether this process, or the one that it was forked from, has been instrumented at any time
prepared = False


def receive_call(function: Callable[..., Any], carrier: Carrier) -> Callable[..., Any]:
    """Return `function` so that it runs under the context that travelled with it."""
    try:
        from otel_proflink._linker import PropagatedCall
        from otel_proflink.instrumentation.carrier import unpack

        _prepare(carrier)
        return PropagatedCall(function, unpack(carrier))
    except Exception:
        logger.debug("work arrived without its context", exc_info=True)
        return function


def begin_process(carrier: Carrier) -> None:
    """In place of `BaseProcess._after_fork`: make this process what the carrier says."""
    from multiprocessing.process import BaseProcess

    BaseProcess._after_fork()  # type: ignore[attr-defined]
    try:
        from opentelemetry.context import attach

        from otel_proflink.instrumentation.carrier import unpack
        from otel_proflink.instrumentation.propagation import extract

        _prepare(carrier)
        if carrier["headers"]:
            context, _link = extract(unpack(carrier))
            attach(context)
            end_label_with_run()
    except Exception:
        logger.debug("a process begins without its context", exc_info=True)


def end_label_with_run() -> None:
    """What `multiprocessing` does after `run()` is not the work of the span that started it."""
    from multiprocessing.util import Finalize

    from opentelemetry.context import Context, attach

    Finalize(None, attach, (Context(),), exitpriority=1_000_000)


def begin(carrier: Carrier) -> Callable[[], None]:
    """Return what makes the process that it arrives in what the carrier says; picklable."""
    return functools.partial(begin_process, carrier)


def _prepare(carrier: Carrier) -> None:
    """Instrument this process as the sender was, and profile it as the sender was profiled."""
    try:
        _prepare_process(carrier)
    except Exception:  # a package of another version, for one: the label may be right all the same
        logger.debug("a process is not profiled as its parent is", exc_info=True)


def _prepare_process(carrier: Carrier) -> None:
    if carrier["pid"] == os.getpid():
        return
    if not prepared:
        from otel_proflink import runtime_context
        from otel_proflink.instrumentation import modules

        runtime_context.install()
        modules.instrument()
    settings = carrier["settings"]
    if settings is None:
        return
    from otel_proflink import lifecycle

    # Once: whoever has stopped it since wants it stopped.
    if not lifecycle.has_run():
        from otel_proflink.config import Config
        from otel_proflink.profiler import Profiler

        profiler = Profiler(Config(**settings)).start()
        if profiler.running and "opentelemetry.sdk.trace" in sys.modules:
            from opentelemetry import trace

            from otel_proflink.instrumentation.provider import add_processor

            add_processor(trace.get_tracer_provider(), profiler)
