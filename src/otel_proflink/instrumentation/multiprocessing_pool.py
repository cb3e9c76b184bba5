# SPDX-License-Identifier: Apache-2.0
"""`multiprocessing.pool.Pool` and `ThreadPool`: a task runs under its submitter's context.

`apply`, `map`, `starmap`, `imap` and their asynchronous and unordered forms come down to four
methods, which are wrapped: they send the function with a carrier, or in a `ThreadPool` with the
context itself. The functions, results and exceptions stay what they are; callbacks carry no label.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from otel_proflink._linker import PropagatedCall, propagated
from otel_proflink.instrumentation.carrier import carried
from otel_proflink.instrumentation.wrappers import install, remove, when_imported

logger = logging.getLogger(__name__)

_MODULE: Final = "multiprocessing.pool"
_METHODS: Final = ("apply_async", "_map_async", "imap", "imap_unordered")

_active = False


def instrument() -> None:
    """Wrap the pools, once they are imported. Does nothing where they are wrapped already."""
    global _active
    _active = True
    when_imported(_MODULE, _wrap)


def uninstrument() -> None:
    """Take our wrappers out, and nobody else's. Tasks that are queued keep their context."""
    global _active
    _active = False
    module = sys.modules.get(_MODULE)
    if module is not None:
        for name in _METHODS:
            remove(module.Pool, name)


def _wrap(module: ModuleType) -> None:
    if _active:
        for name in _METHODS:
            install(module.Pool, name, functools.partial(_carrying, module.ThreadPool))


def _carrying(thread_pool: type, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active:
            send = _attached if isinstance(self, thread_pool) else carried
            if args:
                args = (send(args[0]), *args[1:])
            elif "func" in kwargs:
                kwargs["func"] = send(kwargs["func"])
        return stock(self, *args, **kwargs)

    return method


def _attached(function: Any) -> Any:
    if type(function) is PropagatedCall:
        return function
    try:
        return propagated(function)
    except Exception:  # the work matters more than its label
        logger.debug("a task is submitted without its context", exc_info=True)
        return function
