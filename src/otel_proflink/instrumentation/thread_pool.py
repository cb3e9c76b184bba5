# SPDX-License-Identifier: Apache-2.0
"""`concurrent.futures.ThreadPoolExecutor`: a task runs under its submitter's context.

`submit` is wrapped so that the worker attaches a copy of the submitter's context, with the
propagation record in it, for exactly as long as the task runs. `_worker`, the loop that a pool's
thread runs, is wrapped so that nothing is attached between tasks:
`opentelemetry-instrumentation-threading` leaves a pool's thread under the context of whoever
submitted first, for life.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import thread as _pool_module
from typing import Any, Final

from opentelemetry.context import Context, attach, detach

from otel_proflink._linker import PropagatedCall, propagated
from otel_proflink.instrumentation.wrappers import install, remove

logger = logging.getLogger(__name__)

_ABSENT: Final = object()

# Off: wrappers that someone still holds, or that another library's wrapper hides, do nothing.
_active = False


def instrument() -> None:
    """Wrap the thread pool. Does nothing where it is wrapped already."""
    global _active
    _active = True
    if not install(ThreadPoolExecutor, "submit", _propagating):
        logger.warning("ThreadPoolExecutor.submit was not found: pool work will carry no span")
    # A detail of CPython's. Where it is missing, only idle time between tasks may carry a label,
    # and only beside an instrumentation that gives threads a context for life.
    install(_pool_module, "_worker", _unlabelled)


def uninstrument() -> None:
    """Take our wrappers out, and nobody else's. Tasks that are queued keep their context."""
    global _active
    _active = False
    remove(ThreadPoolExecutor, "submit")
    remove(_pool_module, "_worker")


def _propagating(stock: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
    @functools.wraps(stock)
    def submit(
        self: ThreadPoolExecutor, fn: Any = _ABSENT, /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        if fn is _ABSENT:
            # Positional-only since Python 3.9, but by name it has only one meaning; subclasses and
            # their callers that are older than that still use it.
            if not _active or "fn" not in kwargs:
                return stock(self, *args, **kwargs)
            fn = kwargs.pop("fn")
        # A PropagatedCall comes from a wrapper of ours further out.
        if _active and type(fn) is not PropagatedCall and not _runs_elsewhere(type(self)):
            try:
                fn = propagated(fn)
            except Exception:  # the task matters more than its label
                logger.debug("a task is submitted without its context", exc_info=True)
        return stock(self, fn, *args, **kwargs)

    return submit


def _runs_elsewhere(pool_class: type) -> bool:
    """Tell whether tasks leave this interpreter (`InterpreterPoolExecutor`, Python 3.14).

    Such a pool pickles the callable, and a `Context` means nothing on the other side.
    """
    if pool_class is ThreadPoolExecutor:
        return False
    prepare = getattr(pool_class, "prepare_context", None)
    stock = getattr(ThreadPoolExecutor, "prepare_context", None)
    return getattr(prepare, "__func__", None) is not getattr(stock, "__func__", None)


def _unlabelled(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def run_worker(*args: Any, **kwargs: Any) -> None:
        if not _active:
            return stock(*args, **kwargs)
        token = attach(Context())
        try:
            return stock(*args, **kwargs)
        finally:
            detach(token)

    return run_worker
